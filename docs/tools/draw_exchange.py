"""Chapter 5: the wide and the narrow pipeline, with the bytes that cross for one rank and token."""

from facts import deploy
from svg import Picture

from minidcp.model_config import ModelConfig

SIZE = 8
ITEM_BYTES = 2  # bf16
LSE_BYTES = 4


def draw_exchange(config: ModelConfig) -> Picture:
    picture = Picture(
        "What crosses, wide and narrow",
        "Wide: W_UK, gather, attend, merge, W_UV. Narrow: gather, W_UK, attend, W_UV, merge.",
        height=330,
    )
    picture.text(14, 26, "DeepSeek-V2, tp = dcp = 8: a rank receives, per token and layer", "bold")
    own_heads = config.num_attention_heads // SIZE
    wide = (config.latent_dim, config.kv_lora_rank)
    narrow = (config.qk_head_dim, config.v_head_dim)
    draw_pipeline(picture, 46, "wide", ["W_UK", "attend", "W_UV"], (1, 2), wide, own_heads)
    draw_pipeline(picture, 200, "narrow", ["W_UK", "attend", "W_UV"], (0, 3), narrow, own_heads)
    return picture


def draw_pipeline(
    picture: Picture,
    y: float,
    policy: str,
    operations: list[str],
    crossings: tuple[int, int],
    widths: tuple[int, int],
    own_heads: int,
) -> None:
    """Three operations in a row. Before operation number crossings[0] queries cross, and before
    number crossings[1] results do; crossing 3 is behind the last one."""
    peers = SIZE - 1
    heads = peers * own_heads  # as many queries come as results
    q_bytes = heads * widths[0] * ITEM_BYTES
    out_bytes = heads * (widths[1] * ITEM_BYTES + LSE_BYTES)
    total = deploy(SIZE, SIZE, policy, memory=1e12).count_dcp_bytes(1)
    assert q_bytes + out_bytes == total, "the planner counts otherwise"

    picture.text(14, y + 20, policy, "bold")
    picture.text(80, y + 20, f"{total:,} bytes", "bold mark")
    middle = y + 78
    factor = f"{peers} × {own_heads} heads:"
    labels = [
        (f"q {widths[0]} × {ITEM_BYTES} bytes", factor, f"{q_bytes:,}"),
        (f"out {widths[1]} × {ITEM_BYTES} + {LSE_BYTES}", factor, f"{out_bytes:,}"),
    ]
    x = 14.0
    all_heads = False
    for index in range(4):
        if index in crossings:
            lines = labels[crossings.index(index)]
            picture.arrow((x, middle), (x + 112, middle), css="marked")
            picture.text(x + 54, middle - 26, lines[0], "small middle")
            picture.text(x + 54, middle - 10, lines[1], "small middle soft")
            picture.text(x + 54, middle + 20, lines[2], "small middle mark")
            picture.text(x + 54, middle + 36, "merge" if all_heads else "gather", "small middle")
            all_heads = not all_heads
            x += 116
        if index < 3:
            css = "r2" if all_heads else "r0"
            heads_text = "all heads" if all_heads else "own heads"
            picture.labelled(x, middle - 24, 86, 48, [operations[index], heads_text], css)
            x += 90
