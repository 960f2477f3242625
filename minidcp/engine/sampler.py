"""From logits to tokens: greedy, or the Gumbel-max trick with temperature, top-k and top-p.

Randomness is a function of (seed, position, token id), not of a generator's state: a request's tokens
do not depend on what runs beside it, on preemption, or on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minidcp.batch import SampleColumns
from minidcp.request import TokenLogprobs


@dataclass
class SampleResult:
    """Sampled tokens [S] on the device, and where asked for the log-probabilities behind them."""

    tokens: Tensor
    logprobs: list[TokenLogprobs | None] | None = None


def sample(logits: Tensor, columns: SampleColumns) -> SampleResult:
    """Choose one token per row of logits [S, vocab] (float32) as `columns` say."""
    greedy = logits.argmax(-1)
    tokens = greedy
    if any(columns.temperature):
        temperature = column(columns.temperature, torch.float32, logits)
        scaled = logits / temperature.clamp(min=1e-5)[:, None]
        if any(columns.top_k) or any(p < 1 for p in columns.top_p):
            scaled = mask_unlikely(scaled, columns)
        noise = gumbel_noise(
            column(columns.seed, torch.int64, logits),
            column(columns.position, torch.int64, logits),
            logits.shape[1],
        )
        tokens = torch.where(temperature > 0, (scaled + noise).argmax(-1), greedy)
    return SampleResult(tokens, gather_logprobs(logits, tokens, columns.logprobs))


def column(values: list[int] | list[float], dtype: torch.dtype, like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=like.device)


def mask_unlikely(logits: Tensor, columns: SampleColumns) -> Tensor:
    """-inf for all but the top_k tokens, and then but the fewest whose probabilities reach top_p."""
    vocab = logits.shape[1]
    ordered, ids = logits.sort(-1, descending=True)
    top_k = column([k or vocab for k in columns.top_k], torch.int64, logits)
    rank = torch.arange(vocab, device=logits.device)
    ordered = ordered.masked_fill(rank >= top_k[:, None], -torch.inf)
    probs = ordered.softmax(-1)
    before = probs.cumsum(-1) - probs  # of the more likely tokens; 0 for the first, which always stays
    top_p = column(columns.top_p, torch.float32, logits)[:, None]
    ordered = ordered.masked_fill((before >= top_p) & (top_p < 1), -torch.inf)
    return torch.empty_like(ordered).scatter_(1, ids, ordered)


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab: int) -> Tensor:
    """Standard Gumbel noise [S, vocab] from seeds [S] and positions [S].

    The bits come from the splitmix64 finaliser (Steele, Lea, Flood: "Fast splittable pseudorandom
    number generators", 2014) applied twice, so that neither neighbouring seeds nor positions correlate.
    """
    stream = mix64(mix64(seeds) + positions)
    bits = mix64(stream[:, None] + torch.arange(vocab, device=seeds.device))
    uniform = (shift_right(bits, 40).float() + 0.5) * 2.0**-24  # 24 bits, in (0, 1)
    return -(-uniform.log()).log()


def mix64(x: Tensor) -> Tensor:
    x = x + signed64(0x9E3779B97F4A7C15)
    x = (x ^ shift_right(x, 30)) * signed64(0xBF58476D1CE4E5B9)
    x = (x ^ shift_right(x, 27)) * signed64(0x94D049BB133111EB)
    return x ^ shift_right(x, 31)


def shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's is arithmetic on int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def signed64(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x


def gather_logprobs(logits: Tensor, tokens: Tensor, counts: list[int]) -> list[TokenLogprobs | None] | None:
    """For rows with counts[i] >= 0: the sampled token's log-probability and the counts[i] highest."""
    rows = [row for row, count in enumerate(counts) if count >= 0]
    if not rows:
        return None
    logprobs = logits[rows].log_softmax(-1)
    chosen = tokens[rows]
    most = min(max(counts), logits.shape[1])
    values, ids = logprobs.topk(most, -1)
    own = logprobs.gather(1, chosen[:, None])[:, 0].tolist()
    out: list[TokenLogprobs | None] = [None] * len(counts)
    for row, token, lp, top_ids, top_values in zip(
        rows, chosen.tolist(), own, ids.tolist(), values.tolist(), strict=True
    ):
        top = tuple(zip(top_ids[: counts[row]], top_values[: counts[row]], strict=True))
        out[row] = TokenLogprobs(token, lp, top)
    return out
