"""A step whose result may not be there yet, because the device is still working on it."""

import time

import torch
from torch import Tensor

from minidcp.batch import StepResult
from minidcp.worker.sampler import Sampled


class PendingResult:
    """A step that the device may still be working on; `wait` gives its result.

    The copy to the host is started here, so that nothing else has to wait for the device.
    """

    def __init__(
        self,
        sampled: Sampled,
        drafts: Tensor | None,
        begin: float | torch.cuda.Event,
        received_bytes: int,
    ) -> None:
        """`drafts`: those that were checked, if the ranks had made them."""
        self.sampled = sampled
        self.drafts = drafts
        self.begin = begin
        self.received_bytes = received_bytes
        if isinstance(begin, torch.cuda.Event):
            self.sampled = sampled.map(copy_to_host)
            if drafts is not None:
                self.drafts = copy_to_host(drafts)
            self.end = torch.cuda.Event(enable_timing=True)
            self.end.record()

    def wait(self) -> StepResult:
        if isinstance(self.begin, torch.cuda.Event):
            self.end.synchronize()
            seconds = self.begin.elapsed_time(self.end) * 1e-3
        else:
            seconds = time.perf_counter() - self.begin
        sampled = self.sampled
        tokens = sampled.tokens[: sampled.num_sampled].tolist()
        drafts = None if self.drafts is None else self.drafts.tolist()
        return StepResult(tokens, sampled.list_logprobs(), seconds, self.received_bytes, drafts)


def copy_to_host(x: Tensor) -> Tensor:
    """Start a copy into pinned memory, without waiting for it."""
    on_host = torch.empty_like(x, device="cpu", pin_memory=True)
    return on_host.copy_(x, non_blocking=True)
