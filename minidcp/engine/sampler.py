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
class Sampled:
    """Device tensors: a token per row, and for `rows` of them the log-probabilities behind the choice."""

    tokens: Tensor  # [S]
    rows: list[int]
    own: Tensor | None = None  # [len(rows)] of the sampled tokens
    top_ids: Tensor | None = None  # [len(rows), K] the most likely ones, best first
    top_values: Tensor | None = None


def sample(logits: Tensor, columns: SampleColumns, tokens: Tensor) -> Sampled:
    """Choose one token per row of logits [S, vocab] (float32), whose best are `tokens`, as `columns` say."""
    if any(columns.temperature):
        temperature = column(columns.temperature, torch.float32, logits)
        scaled = logits / temperature.clamp(min=1e-5)[:, None]
        if any(columns.top_k) or any(p < 1 for p in columns.top_p):
            scaled = mask_unlikely(scaled, columns)
        seeds, positions = (column(c, torch.int64, logits) for c in (columns.seed, columns.position))
        noise = gumbel_noise(seeds, positions, logits.shape[1])
        tokens = torch.where(temperature > 0, (scaled + noise).argmax(-1), tokens)
    rows = [row for row, count in enumerate(columns.logprobs) if count >= 0]
    if not rows:
        return Sampled(tokens, rows)
    index = column(rows, torch.int64, logits)
    logprobs = logits[index].log_softmax(-1)
    top_values, top_ids = logprobs.topk(min(max(columns.logprobs), logits.shape[1]), -1)
    own = logprobs.gather(1, tokens[index][:, None])[:, 0]
    return Sampled(tokens, rows, own, top_ids, top_values)


def column(values: list[int] | list[float], dtype: torch.dtype, like: Tensor) -> Tensor:
    """On the device, without waiting for it."""
    host = torch.tensor(values, dtype=dtype, pin_memory=like.is_cuda)
    return host.to(like.device, non_blocking=True)


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
    ordered = ordered.masked_fill((rank > 0) & (before >= top_p) & (top_p < 1), -torch.inf)
    return torch.empty_like(ordered).scatter_(1, ids, ordered)


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab: int) -> Tensor:
    """Standard Gumbel noise [S, vocab] from seeds [S] and positions [S].

    The bits come from the splitmix64 finaliser (Steele, Lea, Flood: "Fast splittable pseudorandom
    number generators", 2014) applied twice, so that neither neighbouring seeds nor positions correlate.
    """
    stream = mix64(mix64(seeds) + positions)
    bits = mix64(stream[:, None] + torch.arange(vocab, device=seeds.device))
    # 23 bits, in (0, 1): with 24, + 0.5 rounds the largest to 1.0, whose noise is infinite.
    uniform = (shift_right(bits, 41).float() + 0.5) * 2.0**-23
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


def list_logprobs(
    sampled: Sampled, tokens: list[int], columns: SampleColumns
) -> list[TokenLogprobs | None] | None:
    """Per row what was asked for, from tensors that are on the host by now."""
    if sampled.own is None or sampled.top_ids is None or sampled.top_values is None:
        return None
    out: list[TokenLogprobs | None] = [None] * len(tokens)
    entries = zip(
        sampled.rows, sampled.own.tolist(), sampled.top_ids.tolist(), sampled.top_values.tolist(), strict=True
    )
    for row, own, ids, values in entries:
        count = columns.logprobs[row]
        out[row] = TokenLogprobs(tokens[row], own, tuple(zip(ids[:count], values[:count], strict=True)))
    return out
