"""What the engine says about its steps: counters, and calls to whoever wants to hear of each one.
The server makes its metrics of the calls."""

from dataclasses import dataclass
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


class StepListener(Protocol):
    """Hears about every step, twice."""

    def on_scheduled(self, step: ScheduledStep) -> None: ...

    def on_finished(self, step: ScheduledStep, result: StepResult) -> None: ...
