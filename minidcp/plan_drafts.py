"""How many drafts `minidcp plan` counts in a decode step, and how many of them are right. What the
step takes with them is in `plan.py`."""

from minidcp.config import require
from minidcp.resolve import ResolvedConfig


def check_acceptance(acceptance: float | None, config: ResolvedConfig) -> None:
    """Raise a ValueError unless it is None, or a probability where there are drafts."""
    if acceptance is None:
        return
    given = f"--acceptance {acceptance}"
    require(0 <= acceptance <= 1, f"{given}: must be a probability, from 0 to 1")
    require(
        config.num_speculative_tokens > 0,
        f"{given}: there are no drafts to accept; add --speculative-method ngram",
    )


def count_drafts(requests: int, config: ResolvedConfig) -> int:
    """All drafts that the requests may have, as far as a step has room for them."""
    room = config.max_decode_tokens - requests
    return min(requests * config.num_speculative_tokens, room)


def expect_accepted(requests: int, num_drafts: int, acceptance: float) -> float:
    """How many of a step's drafts are right, on average.

    A draft is right with probability `acceptance` if those before it are, else it never is. Every
    request has a first draft before any has a second, as in the engine.
    """
    accepted = 0.0
    likelihood = 1.0
    while num_drafts > 0:
        likelihood *= acceptance
        accepted += likelihood * min(requests, num_drafts)
        num_drafts -= requests
    return accepted
