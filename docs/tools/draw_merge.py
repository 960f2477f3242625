"""Chapter 3: the sums Z of four shards, drawn from scores that the engine's `attend` was given."""

import torch
from svg import Picture

from minidcp.attention.reference import attend
from minidcp.kv_cache.interleave import Interleave

SCORES = [0.3, -0.6, 0.9]  # three tokens on four ranks: the last rank has none
BASE = 214
HEIGHT = 150


def draw_merge() -> Picture:
    layout = Interleave(size=4, block_size=16)
    scores = torch.tensor(SCORES)
    values = torch.zeros(len(SCORES), 1)
    sums = []
    for rank in range(layout.size):
        mine = [token for token in range(len(SCORES)) if layout.owner_of(token) == rank]
        _, lse = attend(scores[None, mine], values[mine])
        sums.append(lse.exp().item())
    _, lse = attend(scores[None], values)
    whole = lse.exp().item()

    picture = Picture(
        "Sums of shards add up",
        "Four bars Z0 to Z3, one for each rank; Z3 is zero because rank 3 has no token. Stacked "
        "they are as high as Z of the whole context.",
        height=286,
    )
    picture.text(14, 26, "three tokens, four ranks: what each has of Z = Σ exp(score)", "bold")
    scale = HEIGHT / whole
    picture.line((20, BASE), (540, BASE))
    top = float(BASE)
    for rank, size in enumerate(sums):
        x = 34 + rank * 84
        height = size * scale
        if size > 0:
            picture.rect(x, BASE - height, 52, height, f"r{rank}")
            picture.text(x + 26, BASE - height - 6, f"{size:.2f}", "small middle")
        else:
            picture.rect(x, BASE - 22, 52, 22, "edge dash")
            picture.text(x + 26, BASE - 28, "0: empty", "small middle mark")
        picture.text(x + 26, BASE + 18, f"Z{subscript(rank)}", "middle")
        share = size / whole
        picture.text(x + 26, BASE + 38, f"{share:.0%} of out", "small middle soft")
        picture.rect(424, top - height, 72, height, f"r{rank}")
        top -= height
    picture.text(390, BASE - 60, "=", "middle bold")
    picture.text(460, top - 6, f"{whole:.2f}", "small middle")
    picture.text(460, BASE + 18, "Z", "middle")
    picture.text(14, 274, "out = Σ (Zᵢ / Z) · outᵢ;  an empty shard's outᵢ may be NaN: mask it")
    return picture


def subscript(digit: int) -> str:
    return "₀₁₂₃"[digit]
