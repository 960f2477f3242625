"""From logits to tokens: greedy, or the Gumbel-max trick with temperature, top-k, top-p and min-p. Randomness is a
function of (seed, position, token id): a request's tokens do not depend on what runs beside it or on preemption."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minidcp.batch import Admission, StepPlan
from minidcp.request import SamplingParams, TokenLogprobs


@dataclass(frozen=True)
class Sampled:
    """What the S sampling rows of a step got and the K scored tokens have, and the log-probabilities of
    the W that are `wanted`: (index, how many of the most likely)."""

    tokens: Tensor  # [S + K]
    num_sampled: int = 0
    wanted: Sequence[tuple[int, int]] = ()
    logprobs: tuple[Tensor, ...] = ()  # of the tokens [W]; ids and values of the most likely [W, most], best first

    def map(self, change: Callable[[Tensor], Tensor]) -> "Sampled":
        return replace(self, tokens=change(self.tokens), logprobs=tuple(map(change, self.logprobs)))

    def list_logprobs(self) -> list[TokenLogprobs | None] | None:
        """For each of the S + K, from tensors that are on the host by now."""
        if not self.wanted:
            return None
        tokens = self.tokens.tolist()
        out: list[TokenLogprobs | None] = [None] * len(tokens)
        for (index, count), own, ids, top in zip(self.wanted, *(x.tolist() for x in self.logprobs), strict=True):
            out[index] = TokenLogprobs(tokens[index], own, tuple(zip(ids[:count], top[:count], strict=True)))
        return out


class Sampler:
    """Chooses as each slot's request wants. Penalties' counts are on the device: steps are planned ahead of tokens."""

    def __init__(self) -> None:
        self.admitted: dict[int, Admission] = {}
        self.counts: dict[int, Tensor] = {}  # [2, vocab] how often each token is in prompt and output

    def admit(self, plan: StepPlan) -> None:
        for admission in plan.admitted:
            self.admitted[admission.slot] = admission
            self.counts.pop(admission.slot, None)

    def list_rows(self, plan: StepPlan) -> list[Admission]:
        return [self.admitted[plan.slots[row]] for row in plan.sampling]

    def takes_best(self, plan: StepPlan) -> bool:
        """Whether every row gets its most likely token."""
        rows = (a.params for a in self.list_rows(plan))
        return not any(params.temperature > 0 or params.is_adjusted for params in rows)

    def reads_logits(self, plan: StepPlan) -> bool:
        """Whether `sample` wants more than the best tokens."""
        wanted = any(a.params.logprobs is not None for a in self.list_rows(plan))
        return bool(plan.scored) or wanted or not self.takes_best(plan)

    def sample(self, logits: Tensor, plan: StepPlan, best: Tensor) -> Sampled:
        """Tokens of S sampling rows from logits [S + K, vocab] (float32) with best `best`, and all that is wanted."""
        rows = self.list_rows(plan)
        params = [a.params for a in rows]
        positions = [plan.starts[row] + plan.lengths[row] for row in plan.sampling]
        tokens, adjusted = best, logits[: len(rows)]
        if any(p.is_adjusted for p in params):
            adjusted = adjusted.clone()
            for row, (a, position) in enumerate(zip(rows, positions, strict=True)):
                if a.params.is_adjusted:
                    adjusted[row] = self.adjust(adjusted[row], a, position)
            tokens = adjusted.argmax(-1)
        if any(p.temperature > 0 for p in params):
            temperature = column([p.temperature for p in params], torch.float32, logits)
            scaled = adjusted / temperature.clamp(min=1e-5)[:, None]
            if any(p.top_k > 0 or p.top_p < 1 or p.min_p > 0 for p in params):
                scaled = mask_unlikely(scaled, params)
            seeds, places = (column(x, torch.int64, logits) for x in ([a.seed for a in rows], positions))
            noise = gumbel_noise(seeds, places, logits.shape[1])
            tokens = torch.where(temperature > 0, (scaled + noise).argmax(-1), tokens)
        for row, a in enumerate(rows):
            if a.params.is_penalised:
                self.counts[a.slot][1, tokens[row : row + 1]] += 1

        wanted = [(row, p.logprobs) for row, p in enumerate(params) if p.logprobs is not None]
        if plan.scored:
            tokens = torch.cat([tokens, column([known for _, _, known in plan.scored], torch.int64, logits)])
            owners = (self.admitted[plan.slots[row]].params for row, _, _ in plan.scored)
            wanted += [(index, p.prompt_logprobs or 0) for index, p in enumerate(owners, len(rows))]
        if not wanted:
            return Sampled(tokens, len(rows), wanted)
        indices = column([index for index, _ in wanted], torch.int64, logits)
        logprobs = logits[indices].log_softmax(-1)
        most = min(max(count for _, count in wanted), logits.shape[1])
        top_values, top_ids = logprobs.topk(most, -1)
        own = logprobs.gather(1, tokens[indices][:, None])[:, 0]
        return Sampled(tokens, len(rows), wanted, (own, top_ids, top_values))

    def adjust(self, x: Tensor, a: Admission, position: int) -> Tensor:
        """Logits x [vocab] of the token at `position`, with penalties, biases and bans. Presence and frequency (of the
        output) are as in OpenAI's API, repetition (of prompt and output) is as in CTRL, arXiv:1909.05858."""
        p = a.params
        if p.is_penalised:
            if a.slot not in self.counts:
                self.counts[a.slot] = torch.zeros(2, len(x), dtype=torch.int32, device=x.device)
                parts = a.history[: a.num_prompt], a.history[a.num_prompt :]
                for part, count in zip(parts, self.counts[a.slot], strict=True):
                    tokens = column(part, torch.int64, x)
                    count.index_add_(0, tokens, torch.ones_like(tokens, dtype=torch.int32))
            prompt, output = self.counts[a.slot]
            repeated = torch.where(x > 0, x / p.repetition_penalty, x * p.repetition_penalty)
            x = torch.where(prompt + output > 0, repeated, x)
            x = x - p.frequency_penalty * output - p.presence_penalty * (output > 0)
        if p.logit_bias:
            ids, biases = list(p.logit_bias), list(p.logit_bias.values())
            x = x.index_add(0, column(ids, torch.int64, x), column(biases, torch.float32, x))
        if position - a.num_prompt < p.min_tokens and a.stop_ids:
            x = x.index_fill(0, column(a.stop_ids, torch.int64, x), -torch.inf)
        return x


def column(values: Sequence[float], dtype: torch.dtype, like: Tensor) -> Tensor:
    """On the device, without waiting for it."""
    host = torch.tensor(values, dtype=dtype, pin_memory=like.is_cuda)
    return host.to(like.device, non_blocking=True)


def mask_unlikely(logits: Tensor, params: list[SamplingParams]) -> Tensor:
    """-inf for all but the top_k, the fewest of them that reach top_p, and those min_p times as likely as the best."""
    vocab = logits.shape[1]
    ordered, ids = logits.sort(-1, descending=True)
    top_k = column([p.top_k if p.top_k > 0 else vocab for p in params], torch.int64, logits)
    rank = torch.arange(vocab, device=logits.device)
    ordered = ordered.masked_fill(rank >= top_k[:, None], -torch.inf)
    probs = ordered.softmax(-1)
    before = probs.cumsum(-1) - probs  # of the more likely tokens; 0 for the first, which always stays
    top_p = column([p.top_p for p in params], torch.float32, logits)[:, None]
    ordered = ordered.masked_fill((rank > 0) & (before >= top_p) & (top_p < 1), -torch.inf)
    min_p = column([p.min_p for p in params], torch.float32, logits)[:, None]
    ordered = ordered.masked_fill(probs < min_p * probs[:, :1], -torch.inf)
    return torch.empty_like(ordered).scatter_(1, ids, ordered)


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab: int) -> Tensor:
    """Standard Gumbel noise [S, vocab] from seeds [S] and positions [S]. The bits come from the splitmix64 finaliser
    (Steele, Lea, Flood, 2014), twice, so that neither neighbouring seeds nor positions correlate."""
    stream = mix64(mix64(seeds) + positions)
    bits = mix64(stream[:, None] + torch.arange(vocab, device=seeds.device))
    # 23 bits, in (0, 1): with 24, + 0.5 rounds the largest to 1.0, whose noise is infinite.
    uniform = (shift_right(bits, 41).float() + 0.5) * 2.0**-23
    return -(-uniform.log()).log()


def mix64(x: Tensor) -> Tensor:
    x = x + (0x9E3779B97F4A7C15 - 2**64)  # as int64
    x = (x ^ shift_right(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ shift_right(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ shift_right(x, 31)


def shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's is arithmetic on int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
