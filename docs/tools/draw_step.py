"""Chapter 6: driver and ranks over time, and the architecture's picture of one request."""

from typing import NamedTuple

from svg import Picture

STEP = 144  # pixels of a step
LEFT = 76


def draw_step() -> Picture:
    """A swimlane. The driver plans step n + 1 while the ranks run step n."""
    picture = Picture(
        "Driver and ranks over time",
        "The driver plans step 2 while all ranks run step 1. Rank 0 reports the tokens of step 1; "
        "the driver takes them in after it has sent plan 2.",
        height=316,
    )
    picture.text(14, 26, "the driver plans step n + 1 while the ranks run step n", "bold")
    lanes = [("driver", 48), ("rank 0", 134), ("rank 1", 196)]
    for name, y in lanes:
        picture.text(14, y + 29, name, "bold")
        picture.line((LEFT - 4, y + 52), (552, y + 52), css="line dash")
    first = LEFT + 42
    for step in range(3):
        x = first + step * STEP
        for row, (_, y) in enumerate(lanes[1:]):
            picture.labelled(x, y, STEP - 6, 46, [f"step {step + 1}"], f"r{row}")
        # Plan 1 goes out at once. Plan n + 1 follows when the result of step n - 1 is taken in.
        plan_x = (LEFT, first + 8, first + STEP + 54)[step]
        picture.labelled(plan_x, 48, 38, 46, ["plan", str(step + 1)])
        picture.arrow((plan_x + 19, 94), (x + 4, 132))
        if step < 2:
            end = x + STEP - 6
            picture.labelled(end + 2, 48, 50, 46, ["take", f"in {step + 1}"])
            picture.arrow((end - 8, 134), (end + 16, 97))
    picture.text(14, 276, "Every rank gets the same plan, of integers. Each makes its own tensors")
    picture.text(14, 296, "of it. Rank 0 alone reports tokens.")
    return picture


class Hop(NamedTuple):
    """A box of the architecture's picture: functions of one file, by column and row."""

    column: int
    row: int
    names: tuple[str, ...]
    path: str


COLUMNS = (("driver: event loop", 10), ("driver: engine thread", 264), ("each rank", 518))
HOPS = [
    Hop(0, 1, ("Gate.__call__",), "server/middleware.py"),
    Hop(0, 2, ("complete",), "server/app.py"),
    Hop(0, 3, ("Generation.answer",), "server/generation.py"),
    Hop(0, 4, ("AsyncEngine.generate", "AsyncEngine.deliver"), "server/async_engine.py"),
    Hop(0, 6, ("LLMEngine.tokenize",), "minidcp/engine/engine.py"),
    Hop(1, 1, ("AsyncEngine.run",), "server/async_engine.py"),
    Hop(1, 2, ("LLMEngine.step",), "minidcp/engine/engine.py"),
    Hop(1, 3, ("Scheduler.schedule", "Scheduler.update"), "minidcp/engine/scheduler.py"),
    Hop(1, 4, ("Executor.submit", "Executor.collect"), "minidcp/engine/executor.py"),
    Hop(1, 5, ("Executor.read_reports",), "minidcp/engine/executor.py"),
    Hop(1, 6, ("Detokenizer.append",), "minidcp/engine/detokenizer.py"),
    Hop(2, 1, ("watch",), "minidcp/worker/worker.py"),
    Hop(2, 2, ("serve_commands",), "minidcp/worker/worker.py"),
    Hop(2, 3, ("ModelRunner.execute",), "minidcp/worker/model_runner.py"),
    Hop(2, 4, ("DeepseekForCausalLM",), "minidcp/models/deepseek.py"),
    Hop(2, 5, ("Sampler.sample",), "minidcp/worker/sampler.py"),
    Hop(2, 6, ("PendingResult.wait",), "minidcp/worker/pending.py"),
]
BOX, HEIGHT, PITCH = 206, 46, 76


def hop_y(row: int) -> float:
    return 52 + (row - 1) * PITCH


def draw_request() -> Picture:
    """One request from HTTP to a token and back."""
    picture = Picture(
        "One request from HTTP to a token and back",
        "The event loop takes the request, the engine thread plans steps, the ranks run them and "
        "rank 0 reports tokens, which go back the same way.",
        height=530,
        width=734,
    )
    for title, x in COLUMNS:
        picture.text(x, 24, title, "bold")
    for hop in HOPS:
        x = COLUMNS[hop.column][1]
        y = hop_y(hop.row)
        first = hop.names[0]
        more = [f".{name.split('.')[1]}" for name in hop.names[1:]]
        picture.rect(x, y, BOX, HEIGHT, f"r{hop.column}")
        picture.text(x + 8, y + 19, ", ".join([first, *more]), "small")
        picture.text(x + 8, y + 37, hop.path.removeprefix("minidcp/"), "small", 'opacity="0.8"')
    draw_arrows(picture)
    return picture


def draw_arrows(picture: Picture) -> None:
    driver, engine, rank = (x for _, x in COLUMNS)
    for x, rows in ((driver, (1, 2, 3)), (engine, (1, 2)), (rank, (1, 2, 3, 4, 5))):
        for row in rows:
            picture.arrow((x + 20, hop_y(row) + HEIGHT), (x + 20, hop_y(row + 1)))
    picture.text(rank + 28, hop_y(1) + 66, "queue", "small soft")
    picture.text(rank + 28, hop_y(4) + 66, "↔ other ranks: q, LSEs, sums", "small soft")
    picture.text(driver + 28, hop_y(6) + 64, "in the tokenizer thread", "small soft")
    picture.text(engine + 28, hop_y(5) + 64, "in a thread for each rank", "small soft")
    picture.text(rank + 28, hop_y(6) + 64, "in the results thread, on GPUs", "small soft")

    # From the HTTP handler to the tokenizer and back.
    left = driver + BOX + 8
    picture.line((driver + BOX, hop_y(3) + 14), (left, hop_y(3) + 14), (left, hop_y(6) + 14))
    picture.arrow((left, hop_y(6) + 14), (driver + BOX, hop_y(6) + 14))
    picture.text(left - 8, hop_y(5) + 30, "text ↓ token ids ↑", "small soft end")

    # Requests into the engine thread, deltas back.
    rail = driver + BOX + 24
    picture.line((driver + BOX, hop_y(4) + 14), (rail, hop_y(4) + 14), (rail, hop_y(1) + 14))
    picture.arrow((rail, hop_y(1) + 14), (engine, hop_y(1) + 14))
    rail += 12
    picture.line((engine, hop_y(1) + 34), (rail, hop_y(1) + 34), (rail, hop_y(4) + 34))
    picture.arrow((rail, hop_y(4) + 34), (driver + BOX, hop_y(4) + 34))
    picture.text(driver + 46, hop_y(4) + 64, "inbox ↑  OutputDeltas ↓", "small soft")

    # Within the engine thread, from `step` down to what it calls.
    right = engine + BOX + 10
    picture.line((engine + BOX, hop_y(2) + 24), (right, hop_y(2) + 24), (right, hop_y(6) + 24))
    picture.arrow((right, hop_y(6) + 24), (engine + BOX, hop_y(6) + 24))
    picture.arrow((right, hop_y(4) + 12), (engine + BOX, hop_y(4) + 12))
    picture.arrow((engine + 20, hop_y(5)), (engine + 20, hop_y(4) + HEIGHT))
    picture.text(engine + 28, hop_y(4) + 66, "queue", "small soft")

    # Plans to the ranks, results back.
    rail = engine + BOX + 24
    picture.line((engine + BOX, hop_y(4) + 34), (rail, hop_y(4) + 34), (rail, hop_y(1) + 24))
    picture.arrow((rail, hop_y(1) + 24), (rank, hop_y(1) + 24))
    picture.text(engine + 56, hop_y(3) + 66, "StepPlan, by pipes, to all", "small soft")
    rail = engine + BOX + 36
    picture.line((rank, hop_y(6) + 24), (rail, hop_y(6) + 24), (rail, hop_y(5) + 24))
    picture.arrow((rail, hop_y(5) + 24), (engine + BOX, hop_y(5) + 24))
    picture.text(engine + 86, hop_y(5) - 10, "StepResult: rank 0's", "small soft")
