"""What the engine says about its steps: counters, and calls to whoever wants to hear of each one.
The server makes its metrics of the calls."""

from dataclasses import dataclass, field
from typing import Protocol

from minidcp.batch import StepResult
from minidcp.engine.scheduler import ScheduledStep


@dataclass
class EngineStats:
    """Counters since the start."""

    steps: int = 0
    prompt_tokens: int = 0  # computed: without cached ones, and again after a preemption
    generated_tokens: int = 0
    step_seconds: float = 0.0  # that rank 0 spent in steps
    received_bytes: int = 0  # by rank 0 from other ranks
    rows_with_drafts: int = 0  # in every step, one for each request that had some
    drafts: int = 0  # proposed tokens that a step has checked
    accepted_drafts: int = 0
    # How often the first, the second, … draft of a row was accepted.
    accepted_by_place: list[int] = field(default_factory=list)

    def note_drafts(self, num_drafts: int, num_accepted: int) -> None:
        """One row of a step had so many drafts, of which so many were right."""
        if num_drafts > 0:
            self.rows_with_drafts += 1
        self.drafts += num_drafts
        self.accepted_drafts += num_accepted
        missing = num_drafts - len(self.accepted_by_place)
        self.accepted_by_place += [0] * missing
        for place in range(num_accepted):
            self.accepted_by_place[place] += 1


class StepListener(Protocol):
    """Hears about every step, twice."""

    def on_scheduled(self, step: ScheduledStep) -> None: ...

    def on_finished(self, step: ScheduledStep, result: StepResult) -> None: ...
