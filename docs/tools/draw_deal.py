"""The moving picture of DCP on four ranks: deal, gather, attend, merge; wide and narrow. And cards
of one block enlarged to cache rows. Every token's place comes from the engine's `Interleave`."""

from svg import Picture

from minidcp.kv_cache.interleave import Interleave
from minidcp.model_config import ModelConfig

LAYOUT = Interleave(size=4, block_size=2)
SEQ_LEN = 18
BLOCK_TABLE = [7, 3, 9]
SECONDS = 16

CELL = 26
ROW = 62
TOP = 118  # of rank 0's row
SHARD_X, Q_X, PARTIAL_X, OUT_X = 62, 228, 340, 448
PITCH = 27
PIXELS_PER_VALUE = 18 / 576

# The base state is the still frame. Each keyframe rule begins before its step and ends after the
# whole, so that the loop starts from an empty table.
MOTION = f"""
.pic .card, .pic .q, .pic .part, .pic .sum {{ animation: {SECONDS}s ease-in-out infinite both; }}
.pic .card {{ animation-name: mdcp-deal; }}
.pic .q {{ animation-name: mdcp-gather; }}
.pic .part {{ animation-name: mdcp-attend; }}
.pic .sum {{ animation-name: mdcp-merge; }}
.pic .plus {{ animation: {SECONDS}s linear infinite mdcp-add; }}
.pic .head {{ animation: {SECONDS}s linear infinite mdcp-now; }}
@keyframes mdcp-deal {{
  0%, 3% {{ transform: translate(var(--dx), var(--dy)); }}
  9%, 100% {{ transform: none; }}
}}
@keyframes mdcp-gather {{
  0%, 27% {{ transform: translate(0, var(--dy)); opacity: 0; }}
  30%, 34% {{ transform: translate(0, var(--dy)); opacity: 1; }}
  42%, 100% {{ transform: none; opacity: 1; }}
}}
@keyframes mdcp-attend {{
  0%, 49% {{ opacity: 0; transform: translate(-60px, 0); }}
  57%, 100% {{ opacity: 1; transform: none; }}
}}
@keyframes mdcp-merge {{
  0%, 66% {{ opacity: 0; transform: translate(var(--dx), var(--dy)); }}
  67%, 70% {{ opacity: 1; transform: translate(var(--dx), var(--dy)); }}
  80%, 100% {{ opacity: 1; transform: none; }}
}}
@keyframes mdcp-add {{
  0%, 78% {{ opacity: 0; }}
  80%, 100% {{ opacity: 1; }}
}}
@keyframes mdcp-now {{
  0%, 20% {{ fill: var(--mark); }}
  25%, 100% {{ fill: var(--fg); }}
}}
@media (prefers-reduced-motion: reduce) {{ .pic * {{ animation: none !important; }} }}
@media print {{ .pic * {{ animation: none !important; }} }}
"""


def cell_x(slot: int) -> float:
    """Where local slot `slot` of a shard is drawn, with a gap between blocks."""
    return SHARD_X + slot * CELL + slot // LAYOUT.block_size * 6


def row_y(rank: int) -> float:
    return TOP + rank * ROW


def draw_dcp(narrow: bool, config: ModelConfig, received_bytes: int) -> Picture:
    """Deal → gather → attend → merge. `received_bytes` is what a rank receives per token and layer
    with `config` on four ranks."""
    q_width = config.qk_head_dim if narrow else config.latent_dim
    out_width = config.v_head_dim if narrow else config.kv_lora_rank
    name = "narrow" if narrow else "wide"
    picture = Picture(
        f"Decode context parallelism on four ranks, {name} exchange",
        f"{SEQ_LEN} tokens are dealt to four ranks. Every rank gets the queries of all heads, "
        "attends over its own tokens, and sends each rank the partial results for its heads. "
        "There they are merged.",
        height=424,
    )
    picture.styles.append(MOTION)
    draw_deck(picture)
    draw_headings(picture, q_width, out_width)
    for rank in range(LAYOUT.size):
        picture.rect(6, row_y(rank) - 10, 548, ROW - 10, "box")
        picture.text(14, row_y(rank) + 20, f"rank {rank}", "small bold")
    draw_cards(picture)
    draw_chips(picture, q_width * PIXELS_PER_VALUE, out_width * PIXELS_PER_VALUE)

    y = row_y(LAYOUT.size) + 12
    picture.text(14, y, "Colours of q and results: whose heads they are. Widths: values per head.")
    picture.text(
        14,
        y + 22,
        f"DeepSeek-V2 on four ranks, {name}: a rank receives {received_bytes:,} bytes",
        "bold",
    )
    picture.text(14, y + 40, "for each token and layer.", "bold")
    return picture


def draw_deck(picture: Picture) -> None:
    """The undealt tokens, as outlines."""
    picture.text(14, 25, f"{SEQ_LEN} tokens", "small soft")
    for token in range(SEQ_LEN):
        picture.rect(deck_x(token), 10, 24, 22, "edge", 'opacity="0.5"')


def deck_x(token: int) -> float:
    return 80 + token * CELL


def draw_headings(picture: Picture, q_width: int, out_width: int) -> None:
    columns = [
        (SHARD_X, "1 deal", "tokens p % 4", "stay here"),
        (Q_X, "2 gather", "q of all heads", f"{q_width} a head"),
        (PARTIAL_X, "3 attend", "own tokens,", "all heads"),
        (OUT_X, "4 merge", "own heads", f"{out_width} + LSE"),
    ]
    for index, (x, heading, first, second) in enumerate(columns):
        delay = f'style="animation-delay: {fmt_seconds(index * SECONDS / 4)}"'
        picture.text(x, 56, heading, "bold head", delay)
        picture.text(x, 74, first, "small soft")
        picture.text(x, 90, second, "small soft")


def draw_cards(picture: Picture) -> None:
    for token in range(SEQ_LEN):
        rank = LAYOUT.owner_of(token)
        x = cell_x(LAYOUT.local_slot(token))
        y = row_y(rank) + 4
        move = f"--dx: {deck_x(token) - x:.0f}px; --dy: {10 - y:.0f}px"
        delay = fmt_seconds(token * 0.13)
        picture.add(f'<g class="card" style="{move}; animation-delay: {delay}">')
        picture.rect(x, y, 24, 22, f"r{rank}")
        picture.text(x + 12, y + 16, str(token), "small middle")
        picture.add("</g>")


def draw_chips(picture: Picture, q_pixels: float, out_pixels: float) -> None:
    """Queries, partial results, and what is merged. Chip `owner` belongs to that rank's heads."""
    for rank in range(LAYOUT.size):
        y = row_y(rank) + 2
        for owner in range(LAYOUT.size):
            from_owner = f'style="--dy: {(owner - rank) * ROW}px"'
            picture.rect(Q_X + owner * PITCH, y, q_pixels, 26, f"q r{owner}", from_owner)
            picture.rect(PARTIAL_X + owner * PITCH, y, out_pixels, 26, f"part r{owner}")
        for source in range(LAYOUT.size):
            x = OUT_X + source * PITCH
            dx = PARTIAL_X + rank * PITCH - x
            move = f'style="--dx: {dx}px; --dy: {(source - rank) * ROW}px"'
            picture.rect(x, y, out_pixels, 26, f"sum r{rank}", move)
            if source > 0:
                picture.text(x - (PITCH - out_pixels) / 2, y + 18, "+", "small middle plus")


def fmt_seconds(seconds: float) -> str:
    return f"{seconds:.2f}s"


def draw_grid() -> Picture:
    """The README's grid, and the column of one block as rows of each rank's cache."""
    picture = Picture(
        "One block of four ranks, enlarged to cache rows",
        f"Tokens 0 to {SEQ_LEN - 1} on four ranks with block size 2. The second entry of the block "
        "table is block 3, so its tokens lie in cache rows 6 and 7 of every rank.",
        height=272,
    )
    index = 1  # the enlarged entry of the block table
    size = LAYOUT.block_size
    picture.text(14, 30, "block table", "small soft")
    for entry, block in enumerate(BLOCK_TABLE):
        middle = (cell_x(entry * size) + cell_x(entry * size + size - 1) + CELL) / 2 + 30
        picture.text(middle, 30, f"[{entry}] = {block}", "small middle")
    picture.text(340, 30, f"block {BLOCK_TABLE[index]} in each cache", "small bold")
    picture.text(340, 50, "row", "small soft")
    picture.text(392, 50, "token", "small soft")

    for rank in range(LAYOUT.size):
        y = 60 + rank * 46
        picture.text(14, y + 20, f"rank {rank}", "small bold")
        for slot in range(LAYOUT.local_len(SEQ_LEN, rank)):
            token = slot * LAYOUT.size + rank
            assert LAYOUT.owner_of(token) == rank and LAYOUT.local_slot(token) == slot
            x = cell_x(slot) + 30
            picture.rect(x, y + 4, 24, 22, f"r{rank}")
            picture.text(x + 12, y + 20, str(token), "small middle")
        for offset in range(size):
            slot = index * size + offset
            cache_row = LAYOUT.cache_row(BLOCK_TABLE[index], slot)
            row_y = y - 3 + offset * 20
            picture.text(352, row_y + 14, str(cache_row), "small middle")
            picture.rect(392, row_y, 60, 18, f"r{rank}")
            picture.text(422, row_y + 14, str(slot * LAYOUT.size + rank), "small middle")
    x = cell_x(index * size) + 27
    picture.rect(x, 40, 2 * CELL + 4, 196, "marked")
    picture.arrow((x + 2 * CELL + 6, 141), (338, 141))
    tokens = LAYOUT.tokens_per_block
    picture.text(
        14,
        260,
        f"{LAYOUT.size} ranks, block size {size}: a block covers {tokens} tokens. "
        f"Row = block · {size} + place in it.",
        "small soft",
    )
    return picture
