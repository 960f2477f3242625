"""What users see of speculative decoding: metrics, /load, the last line of `minidcp generate`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families
from servers import PROMPT, Local, run_local

from minidcp.cli import describe_drafts, main
from minidcp.config import ServeConfig
from minidcp.engine.listener import EngineStats

pytest_plugins = ["servers"]
MOST = 3  # drafts of a request in one step
NUM_TOKENS = 60
PREFIX = "vllm:spec_decode_num_"


@pytest.fixture(scope="module")
def speculating(demo: Path) -> Iterator[Local]:
    """A server that has answered one request, whose text repeats itself."""
    options = {"speculative_method": "ngram", "num_speculative_tokens": MOST}
    with run_local(demo, ServeConfig(), **options) as local:
        local.api.complete([0, 5, 6, 7], max_tokens=NUM_TOKENS, logit_bias={9: 100})
        yield local


def read_samples(local: Local) -> dict[str, float]:
    """Samples by name, with their position or their kind if they have one."""
    samples = {}
    for family in text_string_to_metric_families(local.api.http.get("/metrics").text):
        for sample in family.samples:
            label = sample.labels.get("position", sample.labels.get("kind", ""))
            samples[f"{sample.name} {label}".strip()] = sample.value
    return samples


def test_accepted_drafts_are_tokens_that_needed_no_step(speculating: Local) -> None:
    samples = read_samples(speculating)
    num_steps = samples["minidcp:step_seconds_count decode"]
    accepted = samples[f"{PREFIX}accepted_tokens_total"]
    assert samples["vllm:generation_tokens_total"] == NUM_TOKENS
    assert accepted == NUM_TOKENS - 1 - num_steps > 0  # the prompt's step gives the first token


def test_drafts_have_vllm_s_metrics(speculating: Local) -> None:
    """As its `vllm/v1/spec_decode/metrics.py` has them: one `draft` is a row's, for all places."""
    samples = read_samples(speculating)
    by_place = [samples[f"{PREFIX}accepted_tokens_per_pos_total {i}"] for i in range(MOST)]
    num_rows = samples[f"{PREFIX}drafts_total"]
    assert num_rows >= by_place[0] >= by_place[1] >= by_place[2]
    assert sum(by_place) == samples[f"{PREFIX}accepted_tokens_total"]
    assert num_rows <= samples[f"{PREFIX}draft_tokens_total"] <= MOST * num_rows
    assert f"{PREFIX}accepted_tokens_per_pos_total {MOST}" not in samples


def test_load_has_the_same_numbers(speculating: Local) -> None:
    samples = read_samples(speculating)
    assert speculating.api.http.get("/load").json()["drafts"] == {
        "rows": samples[f"{PREFIX}drafts_total"],
        "proposed": samples[f"{PREFIX}draft_tokens_total"],
        "accepted": samples[f"{PREFIX}accepted_tokens_total"],
        "accepted_by_place": [
            samples[f"{PREFIX}accepted_tokens_per_pos_total {i}"] for i in range(MOST)
        ],
    }


def test_rows_without_drafts_do_not_count() -> None:
    stats = EngineStats()
    for num_drafts, num_accepted in [(3, 2), (0, 0), (1, 0), (2, 2)]:
        stats.note_drafts(num_drafts, num_accepted)
    assert (stats.rows_with_drafts, stats.drafts, stats.accepted_drafts) == (3, 6, 4)
    assert stats.accepted_by_place == [2, 2, 0]


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([], "; drafts: none"),
        ([(3, 2), (1, 0)], "; drafts: 2 of 4 accepted, 1.00 per request and step that had some"),
    ],
)
def test_how_generate_describes_drafts(rows: list[tuple[int, int]], text: str) -> None:
    stats = EngineStats()
    for num_drafts, num_accepted in rows:
        stats.note_drafts(num_drafts, num_accepted)
    config = SimpleNamespace(num_speculative_tokens=MOST)
    assert describe_drafts(SimpleNamespace(engine=SimpleNamespace(stats=stats, config=config))) == (
        text
    )


def test_generate_ends_with_the_drafts(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = f"generate {demo} --device cpu --ranks threads --max-tokens 8 --ignore-eos"
    flags = ["--prompt", PROMPT, "--speculative-method", "ngram"]
    assert main([*command.split(), *flags]) == 0
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        r"8 tokens in .* tokens/s; drafts: (none|\d+ of \d+ accepted, .*)", last_line
    )
