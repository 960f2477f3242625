"""From logits to tokens: greedy, or the Gumbel-max trick with temperature, top-k, top-p and min-p.
Noise is a function of (seed, position, token id), so a request's noise depends neither on what runs
beside it nor on preemption. Next: `worker.py`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minidcp.batch import Admission, StepPlan
from minidcp.request import SamplingParams, TokenLogprobs
from minidcp.worker.drafts import find_preceding_drafts, judge


@dataclass(frozen=True)
class Wanted:
    """A token whose log-probability is wanted, and those of the `num_top` most likely tokens."""

    index: int  # in Sampled.tokens
    num_top: int


class Logprobs(NamedTuple):
    """Log-probabilities of W tokens, and of the k most likely tokens in the place of each."""

    chosen: Tensor  # [W]
    top_ids: Tensor  # [W, k], the most likely first
    top_values: Tensor  # [W, k]


@dataclass(frozen=True)
class Sampled:
    """The tokens of one step: S that were sampled, then K known ones that are only scored."""

    tokens: Tensor  # [S + K]
    num_sampled: int = 0
    wanted: Sequence[Wanted] = ()
    logprobs: Logprobs | None = None  # of the wanted ones

    def map(self, change: Callable[[Tensor], Tensor]) -> "Sampled":
        """The same with every tensor changed, for example copied to the host."""
        logprobs = self.logprobs
        if logprobs is not None:
            logprobs = Logprobs(*(change(x) for x in logprobs))
        return replace(self, tokens=change(self.tokens), logprobs=logprobs)

    def list_logprobs(self) -> list[TokenLogprobs | None] | None:
        """An entry for each of the S + K tokens; None if none are wanted. Needs host tensors."""
        if self.logprobs is None:
            return None
        tokens = self.tokens.tolist()
        chosen = self.logprobs.chosen.tolist()
        top_ids = self.logprobs.top_ids.tolist()
        top_values = self.logprobs.top_values.tolist()

        entries: list[TokenLogprobs | None] = [None] * len(tokens)
        for row, wanted in enumerate(self.wanted):
            ids = top_ids[row][: wanted.num_top]
            values = top_values[row][: wanted.num_top]
            top = tuple(zip(ids, values, strict=True))
            entries[wanted.index] = TokenLogprobs(tokens[wanted.index], chosen[row], top)
        return entries


class Sampler:
    """Chooses tokens as the request in each slot wants.

    The counts for penalties are on the device, because steps are planned before tokens are known.
    """

    def __init__(self) -> None:
        self.admitted: dict[int, Admission] = {}  # by slot
        # By slot: how often each token occurs in the prompt and in the output, [2, vocab].
        self.counts: dict[int, Tensor] = {}

    def admit(self, plan: StepPlan) -> None:
        for admission in plan.admitted:
            self.admitted[admission.slot] = admission
            self.counts.pop(admission.slot, None)  # of the slot's previous request

    def get_admissions(self, plan: StepPlan) -> list[Admission]:
        """What is known about the requests of the sampling rows."""
        return [self.admitted[plan.slots[row]] for row in plan.sampling]

    def takes_best(self, plan: StepPlan) -> bool:
        """Whether every sampling row gets its most likely token."""
        if plan.masks:
            return False
        for admission in self.get_admissions(plan):
            params = admission.params
            if params.temperature > 0 or params.adjusts_logits:
                return False
        return True

    def reads_logits(self, plan: StepPlan) -> bool:
        """Whether `sample` needs the logits, and not only the most likely tokens."""
        if plan.scored or not self.takes_best(plan):
            return True
        return any(a.params.logprobs is not None for a in self.get_admissions(plan))

    def sample(
        self,
        logits: Tensor,
        plan: StepPlan,
        best: Tensor,
        decode_tokens: Tensor | None = None,
    ) -> Sampled:
        """Choose a token for each of S sampling rows, and collect the wanted log-probabilities.

        logits: [S + K, vocab] float32, of the sampling rows and then of the scored tokens.
        best: [S] the most likely token of each sampling row.
        decode_tokens: [D] the tokens of the decode rows; None: none of them are drafts.
        """
        if decode_tokens is None:
            decode_tokens = best[:0]
        if plan.masks:
            logits = mask_forbidden(logits, plan.masks)
            best = logits[: len(best)].argmax(-1)
        admissions = self.get_admissions(plan)
        positions: list[int] = plan.sampled_positions.tolist()

        adjusted = logits[: len(admissions)]
        if any(a.params.adjusts_logits for a in admissions):
            adjusted = self.adjust_rows(adjusted, admissions, positions, plan, decode_tokens)
            best = adjusted.argmax(-1)
        tokens = choose_tokens(adjusted, best, admissions, positions)
        self.count_tokens(tokens, admissions, plan, decode_tokens)
        return self.collect_logprobs(logits, tokens, plan)

    def adjust_rows(
        self,
        logits: Tensor,
        admissions: list[Admission],
        positions: list[int],
        plan: StepPlan,
        decode_tokens: Tensor,
    ) -> Tensor:
        """A copy of the logits [S, vocab], adjusted where a request asks for it."""
        adjusted = logits.clone()  # log-probabilities are taken from the logits as they were
        preceding = find_preceding_drafts(plan)
        for index, admission in enumerate(admissions):
            if admission.params.adjusts_logits:
                drafts = decode_tokens[preceding[index]]
                adjusted[index] = self.adjust(logits[index], admission, positions[index], drafts)
        return adjusted

    def adjust(
        self, logits: Tensor, admission: Admission, position: int, drafts: Tensor | None = None
    ) -> Tensor:
        """Logits [vocab] of the token at `position` with penalties, biases and bans.

        `drafts` [n] are taken to be the last tokens before it.
        """
        params = admission.params
        device = logits.device

        if params.has_penalties:
            slot = admission.slot
            if slot not in self.counts:
                self.counts[slot] = count_history(admission, len(logits), device)
            counts = self.counts[slot]
            if drafts is not None and len(drafts) > 0:
                counts = counts.clone()
                counts[1].index_add_(0, drafts, torch.ones_like(drafts, dtype=torch.int32))
            logits = penalise(logits, counts, params)

        if params.logit_bias:
            ids = ints_to_device(list(params.logit_bias), device)
            biases = floats_to_device(list(params.logit_bias.values()), device)
            logits = logits.index_add(0, ids, biases)

        num_outputs = position - admission.num_prompt + 1  # once it has this token
        if admission.stop_ids and not params.may_stop_after(num_outputs):
            banned = ints_to_device(admission.stop_ids, device)
            logits = logits.index_fill(0, banned, -torch.inf)
        return logits

    def count_tokens(
        self,
        tokens: Tensor,
        admissions: list[Admission],
        plan: StepPlan,
        decode_tokens: Tensor,
    ) -> None:
        """Count sampled tokens [S] as output, where penalties depend on it."""
        if not any(admission.params.has_penalties for admission in admissions):
            return
        ones = torch.ones(len(tokens), dtype=torch.int32, device=tokens.device)
        if plan.drafts:
            ones = judge(tokens, plan, decode_tokens).counts.int()
        for index, admission in enumerate(admissions):
            if admission.params.has_penalties:
                place = slice(index, index + 1)  # stays on the device: the host need not wait
                self.counts[admission.slot][1].index_add_(0, tokens[place], ones[place])

    def collect_logprobs(self, logits: Tensor, tokens: Tensor, plan: StepPlan) -> Sampled:
        """Append the scored tokens to the sampled ones, and take the wanted log-probabilities."""
        num_sampled = len(tokens)
        if plan.scored:
            scored = [token for _, _, token in plan.scored]
            tokens = torch.cat([tokens, ints_to_device(scored, logits.device)])

        wanted = self.list_wanted(plan)
        if not wanted:
            return Sampled(tokens, num_sampled)
        logprobs = compute_logprobs(logits, tokens, wanted)
        return Sampled(tokens, num_sampled, wanted, logprobs)

    def list_wanted(self, plan: StepPlan) -> list[Wanted]:
        wanted = []
        for index, admission in enumerate(self.get_admissions(plan)):
            if admission.params.logprobs is not None:
                wanted.append(Wanted(index, admission.params.logprobs))

        num_sampled = len(plan.sampling)
        for index, (row, _, _) in enumerate(plan.scored, start=num_sampled):
            params = self.admitted[plan.slots[row]].params
            assert params.prompt_logprobs is not None  # else the scheduler scores none
            wanted.append(Wanted(index, params.prompt_logprobs))
        return wanted


def mask_forbidden(logits: Tensor, masks: dict[int, bytes]) -> Tensor:
    """A copy of logits [S + K, vocab] with -inf where a mask has no bit. masks: by row.

    The bits are unpacked on the device. The host does not wait for it.
    """
    vocab_size = logits.shape[1]
    packed = np.frombuffer(bytearray().join(masks.values()), np.uint8)
    on_host = torch.from_numpy(packed).view(len(masks), -1)  # [R, bytes]
    if logits.device.type == "cuda":
        on_host = on_host.pin_memory()
    on_device = on_host.to(logits.device, non_blocking=True)

    shifts = torch.arange(8, dtype=torch.uint8, device=logits.device)
    bits = (on_device[:, :, None] >> shifts) & 1  # [R, bytes, 8]
    is_forbidden = bits.flatten(1)[:, :vocab_size] == 0
    rows = ints_to_device(list(masks), logits.device)
    masked = logits[rows].masked_fill(is_forbidden, -torch.inf)
    return logits.index_copy(0, rows, masked)


def ints_to_device(values: Sequence[int], device: torch.device) -> Tensor:
    return to_device(values, torch.int64, device)


def floats_to_device(values: Sequence[float], device: torch.device) -> Tensor:
    return to_device(values, torch.float32, device)


def to_device(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values as a tensor on the device, in a copy that the host does not wait for."""
    is_pinned = device.type == "cuda"
    host = torch.tensor(values, dtype=dtype, pin_memory=is_pinned)
    return host.to(device, non_blocking=True)


def count_history(admission: Admission, vocab_size: int, device: torch.device) -> Tensor:
    """How often each token occurs in the prompt and in the output so far: [2, vocab] int32."""
    counts = torch.zeros(2, vocab_size, dtype=torch.int32, device=device)
    prompt = admission.history[: admission.num_prompt]
    output = admission.history[admission.num_prompt :]
    for row, history in enumerate([prompt, output]):
        tokens = ints_to_device(history, device)
        ones = torch.ones_like(tokens, dtype=torch.int32)
        counts[row].index_add_(0, tokens, ones)  # not bincount, which waits for the device
    return counts


def penalise(logits: Tensor, counts: Tensor, params: SamplingParams) -> Tensor:
    """Logits [vocab] with penalties for the tokens in `counts` [2, vocab].

    Presence and frequency penalties look at the output, as in OpenAI's API. The repetition penalty
    looks at prompt and output, as in CTRL (arXiv:1909.05858).
    """
    prompt_counts, output_counts = counts.unbind()
    repetition = params.repetition_penalty
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(prompt_counts + output_counts > 0, repeated, logits)

    frequency = params.frequency_penalty * output_counts
    presence = params.presence_penalty * (output_counts > 0)
    return logits - frequency - presence


def choose_tokens(
    logits: Tensor, best: Tensor, admissions: list[Admission], positions: list[int]
) -> Tensor:
    """A token for each row of logits [S, vocab]: `best` [S] where temperature is 0, else sampled.

    The argmax of logits with Gumbel noise is a sample of their softmax (the Gumbel-max trick).
    """
    params = [admission.params for admission in admissions]
    if all(p.temperature == 0 for p in params):
        return best
    device = logits.device

    temperature = floats_to_device([p.temperature for p in params], device)
    scaled = logits / temperature.clamp(min=1e-5)[:, None]
    if any(p.rules_out_tokens for p in params):
        scaled = mask_unlikely(scaled, params)

    seeds = ints_to_device([admission.seed for admission in admissions], device)
    noise = gumbel_noise(seeds, ints_to_device(positions, device), logits.shape[1])
    sampled = (scaled + noise).argmax(-1)
    return torch.where(temperature > 0, sampled, best)


def mask_unlikely(logits: Tensor, params: list[SamplingParams]) -> Tensor:
    """-inf for the tokens of logits [S, vocab] that top_k, top_p or min_p rules out.

    What remains: the top_k most likely tokens; of these, the fewest whose probabilities add up to
    top_p, and those at least min_p times as likely as the most likely one.
    """
    vocab_size = logits.shape[1]
    device = logits.device
    ordered, ids = logits.sort(-1, descending=True)
    rank = torch.arange(vocab_size, device=device)

    num_kept = [p.top_k if p.top_k > 0 else vocab_size for p in params]
    top_k = ints_to_device(num_kept, device)[:, None]
    ordered = ordered.masked_fill(rank >= top_k, -torch.inf)
    probs = ordered.softmax(-1)

    # How likely the more likely tokens are together. The first token always stays.
    preceding = probs.cumsum(-1) - probs
    top_p = floats_to_device([p.top_p for p in params], device)[:, None]
    is_outside = (rank > 0) & (preceding >= top_p) & (top_p < 1)
    ordered = ordered.masked_fill(is_outside, -torch.inf)

    min_p = floats_to_device([p.min_p for p in params], device)[:, None]
    best_prob = probs[:, :1]
    ordered = ordered.masked_fill(probs < min_p * best_prob, -torch.inf)
    return torch.empty_like(ordered).scatter_(1, ids, ordered)


def compute_logprobs(logits: Tensor, tokens: Tensor, wanted: list[Wanted]) -> Logprobs:
    """The wanted log-probabilities from logits [S + K, vocab] and tokens [S + K]."""
    vocab_size = logits.shape[1]
    indices = ints_to_device([w.index for w in wanted], logits.device)
    logprobs = logits[indices].log_softmax(-1)  # [W, vocab]

    wanted_tokens = tokens[indices][:, None]
    chosen = logprobs.gather(1, wanted_tokens)[:, 0]

    max_top = max(w.num_top for w in wanted)
    top_values, top_ids = logprobs.topk(min(max_top, vocab_size), -1)
    return Logprobs(chosen, top_ids, top_values)


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise [S, vocab] from seeds [S] and positions [S].

    The bits come from the splitmix64 finaliser (Steele, Lea, Flood, 2014). It is applied twice, so
    that neither neighbouring seeds nor neighbouring positions correlate.
    """
    token_ids = torch.arange(vocab_size, device=seeds.device)
    stream = mix64(mix64(seeds) + positions)
    bits = mix64(stream[:, None] + token_ids)

    # 23 bits, in (0, 1): with 24, + 0.5 rounds the largest to 1.0, whose noise is infinite.
    high_bits = shift_right(bits, 64 - 23).float()
    uniform = (high_bits + 0.5) * 2.0**-23
    return -(-uniform.log()).log()


# The constants of splitmix64, as int64.
INCREMENT = 0x9E3779B97F4A7C15 - 2**64
MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - 2**64
MULTIPLIER_2 = 0x94D049BB133111EB - 2**64


def mix64(x: Tensor) -> Tensor:
    x = x + INCREMENT
    x = (x ^ shift_right(x, 30)) * MULTIPLIER_1
    x = (x ^ shift_right(x, 27)) * MULTIPLIER_2
    return x ^ shift_right(x, 31)


def shift_right(x: Tensor, num_bits: int) -> Tensor:
    """Logical shift of int64: torch's is arithmetic."""
    mask = (1 << (64 - num_bits)) - 1
    return (x >> num_bits) & mask
