"""Drafts: proposals for the next tokens of a request, which the next step checks (speculative
decoding). Where they come from is in `proposers.py`. How many are worth their time is learnt here:
from how many were right, and from how long steps take. Next: `engine.py`."""

import bisect
import time
from collections import deque
from dataclasses import dataclass, field

from minidcp.batch import StepPlan
from minidcp.engine.proposers import Predictions, PromptLookup, Proposer
from minidcp.request import Request
from minidcp.resolve import ResolvedConfig

PRIOR = 0.5  # how likely a draft is right, before anything is known
PRIOR_WEIGHT = 2.0  # as many drafts as this
FORGET = 0.995  # what is known counts so much less a token later
# Where nobody knows a draft's value before it is checked, one of each request is tried now and
# then, though it may not seem to pay, and again in the next step if half of them were right. Not in
# every step, because steps with drafts make the next one wait. After each trial that fails the next
# one is twice as many steps away, up to a limit.
TRIAL_STEPS = 32
MAX_TRIAL_STEPS = 128
# After so many steps with drafts there are none until a plain step was measured again: drafts are
# judged by what plain steps take.
PLAIN_STEPS = 64
SAMPLES = 8  # how many of the last steps of a size count for its time
REMEMBERED_STEPS = 512  # so long a size is known; then it may be tried again


def count_accepted(tokens: list[int], drafts: list[int]) -> int:
    """How many drafts are what was sampled in their places, up to the first that is not.

    tokens: those sampled after a row's first token and after each of its drafts.
    """
    for index, draft in enumerate(drafts):
        if draft != tokens[index]:
            return index
    return len(drafts)


@dataclass
class RequestDrafts:
    """What is known about the drafts of one request.

    Attributes:
        guess: where its next unknown token stands, and what the proposer takes it for. Once the
            token is known, that tells as much as a draft would have, and costs nothing.
    """

    right: float = PRIOR * PRIOR_WEIGHT
    tried: float = PRIOR_WEIGHT
    guess: tuple[int, int] | None = None

    @property
    def rate(self) -> float:
        """How likely a draft is right if those before it are."""
        return self.right / self.tried

    def note(self, num_drafts: int, num_accepted: int) -> None:
        """Drafts behind the first wrong one tell nothing."""
        self.right += num_accepted
        self.tried += min(num_drafts, num_accepted + 1)

    def forget(self) -> None:
        """Move towards the prior."""
        self.right = FORGET * self.right + (1 - FORGET) * PRIOR * PRIOR_WEIGHT
        self.tried = FORGET * self.tried + (1 - FORGET) * PRIOR_WEIGHT


class StepTimes:
    """Seconds of decode steps by their number of tokens, as measured.

    Attributes:
        wait: seconds for which nothing runs after a step with drafts, because no step is planned
            while their result is not known.
    """

    def __init__(self) -> None:
        self.sizes: list[int] = []  # rising
        self.seconds: dict[int, float] = {}
        self.samples: dict[int, deque[float]] = {}  # of which `seconds` are the least
        self.num_noted = 0
        self.last_noted: dict[int, int] = {}  # by size: how many steps were noted then
        self.wait = 0.0
        self.waits: deque[float] = deque(maxlen=SAMPLES)  # of which `wait` is the least
        self.last_end = 0.0
        self.last_had_drafts = False

    def note_end(self, now: float, seconds: float, has_drafts: bool) -> None:
        """A step of so many seconds has ended."""
        if self.last_had_drafts:
            # The least of the last waits counts: others may hold time in which there was nothing
            # to do.
            self.waits.append(max(0.0, now - self.last_end - seconds))
            self.wait = min(self.waits)
        self.last_end = now
        self.last_had_drafts = has_drafts

    def note(self, num_tokens: int, seconds: float) -> None:
        """The fastest of the last steps of a size counts, because what makes some of them slower
        has nothing to do with their size. The first one never does: it may load what it uses."""
        self.num_noted += 1
        self.forget()
        samples = self.samples.get(num_tokens)
        if samples is None:
            self.samples[num_tokens] = deque(maxlen=SAMPLES)
            return
        if not samples:
            bisect.insort(self.sizes, num_tokens)
        samples.append(seconds)
        self.seconds[num_tokens] = min(samples)
        self.last_noted[num_tokens] = self.num_noted

    def forget(self) -> None:
        """Forget sizes that were not measured for long: what made them slow may be over."""
        oldest = self.num_noted - REMEMBERED_STEPS
        for size in [size for size in self.sizes if self.last_noted[size] < oldest]:
            self.sizes.remove(size)
            self.samples[size].clear()

    def estimate(self, num_tokens: int) -> float:
        """Between two known sizes on a line. Beyond the largest no more than that one takes: so
        larger steps are tried, and then known."""
        if not self.sizes:
            return 1.0
        place = bisect.bisect_left(self.sizes, num_tokens)
        if place == len(self.sizes):
            return self.seconds[self.sizes[-1]]
        above = self.sizes[place]
        if above == num_tokens or place == 0:
            return self.seconds[above]
        below = self.sizes[place - 1]
        share = (num_tokens - below) / (above - below)
        return self.seconds[below] + share * (self.seconds[above] - self.seconds[below])


@dataclass
class Drafter:
    """Proposes drafts for requests that decode.

    Attributes:
        most: drafts of a request in one step at most.
        max_tokens: of the decode rows of a step, drafts included.
    """

    proposer: Proposer
    most: int
    max_tokens: int
    times: StepTimes = field(default_factory=StepTimes)
    requests: dict[str, RequestDrafts] = field(default_factory=dict)  # by request id
    trial_steps: int = TRIAL_STEPS
    steps_since_trial: int = 0
    steps_since_plain: int = 0
    on_trial: dict[str, bool] = field(default_factory=dict)  # by request id: whether it was right

    def propose(self, decoding: list[Request]) -> dict[str, list[int]]:
        """Drafts for some of the requests that are about to decode, by request id."""
        if len(decoding) >= self.max_tokens or self.steps_since_plain >= PLAIN_STEPS:
            return {}
        proposals = {}
        self.proposer.begin_step()
        for request in decoding:
            drafts = self.propose_for(request)
            if drafts:
                proposals[request.request_id] = drafts
        if not proposals:
            return {}
        counts = self.choose_counts(len(decoding), proposals)
        room = self.max_tokens - len(decoding) - sum(counts.values())
        if self.steps_since_trial >= self.trial_steps:
            untried = [name for name in proposals if self.must_try(name, counts)]
            self.on_trial = dict.fromkeys(untried[:room], False)
            counts.update(dict.fromkeys(self.on_trial, 1))
        return {name: drafts[: counts[name]] for name, drafts in proposals.items() if counts[name]}

    def must_try(self, name: str, counts: dict[str, int]) -> bool:
        return counts[name] == 0 and self.requests[name].guess is None

    def propose_for(self, request: Request) -> list[int]:
        """What may follow the request's next token, whether that is known yet or not."""
        if request.params.structured_outputs is not None:
            return []  # only the next token's mask is known
        known = self.requests.setdefault(request.request_id, RequestDrafts())
        num_outputs = request.num_outputs + request.num_in_flight
        most = min(self.most, request.max_tokens - num_outputs - 1)
        drafts = self.proposer.propose(request, max(0, most))
        guess = self.proposer.guess(request)
        known.guess = None if guess is None else (len(request.tokens), guess)
        return drafts

    def choose_counts(self, num_rows: int, proposals: dict[str, list[int]]) -> dict[str, int]:
        """How many of each request's drafts give the most tokens a second, by request id.

        A draft counts for as many tokens as it is likely to be right, with all before it. There are
        none while not even a smaller step was measured: nobody could say what they cost.
        """
        if not self.times.sizes or num_rows < self.times.sizes[0]:
            return dict.fromkeys(proposals, 0)
        gains = []
        for name, drafts in proposals.items():
            rate = self.requests[name].rate
            gains += [(rate ** (i + 1), name) for i in range(len(drafts))]
        gains.sort(reverse=True)

        expected = float(num_rows)
        best_rate = expected / self.times.estimate(num_rows)
        best_count = 0
        for count, (gain, _) in enumerate(gains[: self.max_tokens - num_rows], start=1):
            expected += gain
            rate = expected / (self.times.estimate(num_rows + count) + self.times.wait)
            if rate > best_rate:
                best_rate = rate
                best_count = count

        counts = dict.fromkeys(proposals, 0)
        for _, name in gains[:best_count]:
            counts[name] += 1
        return counts

    def note(self, request: Request, num_drafts: int, num_accepted: int) -> None:
        known = self.requests.get(request.request_id)
        if known is not None:
            known.forget()
            if num_drafts > 0:
                known.note(num_drafts, num_accepted)
            elif known.guess is not None:
                place, token = known.guess
                known.note(1, int(request.tokens[place] == token))
            known.guess = None
        if request.request_id in self.on_trial:
            self.on_trial[request.request_id] = num_accepted > 0

    def note_step(self, plan: StepPlan, seconds: float) -> None:
        """A step has ended, that took so long."""
        # A plain step behind one with drafts begins while nothing runs: it would seem slower than
        # plain steps are.
        is_plain = not plan.drafts and not self.times.last_had_drafts
        self.times.note_end(time.perf_counter(), seconds, has_drafts=bool(plan.drafts))
        if plan.num_decode == len(plan.slots) and (is_plain or plan.drafts):
            self.times.note(plan.num_decode_tokens, seconds)
        self.steps_since_plain = 0 if is_plain else self.steps_since_plain + 1
        self.steps_since_trial += 1
        if self.on_trial:
            if 2 * sum(self.on_trial.values()) >= len(self.on_trial):
                self.trial_steps = TRIAL_STEPS
                self.steps_since_trial = TRIAL_STEPS
            else:
                self.trial_steps = min(2 * self.trial_steps, MAX_TRIAL_STEPS)
                self.steps_since_trial = 0
            self.on_trial = {}

    def drop(self, request: Request) -> None:
        self.requests.pop(request.request_id, None)
        self.proposer.drop(request)


def make_drafter(config: ResolvedConfig) -> Drafter | None:
    """None if nothing is to be drafted."""
    if config.num_speculative_tokens == 0:
        return None
    proposer: Proposer = PromptLookup(config.prompt_lookup_min, config.prompt_lookup_max)
    if config.num_predicted > 0:
        proposer = Predictions(config.num_predicted)
    return Drafter(
        proposer,
        most=config.num_speculative_tokens,
        max_tokens=min(config.max_decode_tokens, config.max_num_batched_tokens),
    )
