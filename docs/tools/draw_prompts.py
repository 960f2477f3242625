"""Chapter 7: three new tokens on six cached ones, on four ranks."""

from svg import Picture

from minidcp.kv_cache.interleave import Interleave

LAYOUT = Interleave(size=4, block_size=2)
CACHED, NEW = 6, 3
CELL = 40
LEFT, TOP = 96, 92


def draw_prompts() -> Picture:
    picture = Picture(
        "Three new tokens on six cached ones",
        "A rectangle: each of the tokens 6, 7, 8 sees the cached tokens 0 to 5, which are spread "
        "over four ranks. Beside it a triangle: they see each other causally.",
        height=318,
    )
    picture.text(14, 26, "who sees whom: 3 new tokens, 6 in the cache, 4 ranks", "bold")
    picture.text(LEFT, 54, "in the cache of rank r0, r1, …", "small")
    picture.text(LEFT + CACHED * CELL + 24, 54, "new, on every rank", "small")
    picture.text(14, TOP - 12, "sees token", "small soft")
    picture.text(14, TOP + 26, "token", "small soft")
    for key in range(CACHED + NEW):
        picture.text(key_x(key) + CELL / 2 - 1, TOP - 12, str(key), "middle small")
    for row in range(NEW):
        query = CACHED + row
        y = TOP + row * CELL
        picture.text(LEFT - 20, y + 25, str(query), "middle")
        for key in range(CACHED):
            picture.rect(key_x(key), y, CELL - 3, CELL - 3, f"r{LAYOUT.owner_of(key)}")
            picture.text(
                key_x(key) + CELL / 2 - 1, y + 24, f"r{LAYOUT.owner_of(key)}", "middle small"
            )
        for key in range(CACHED, CACHED + NEW):
            is_seen = key <= query
            css = "box" if is_seen else "edge dash"
            picture.rect(key_x(key), y, CELL - 3, CELL - 3, css, "" if is_seen else 'opacity="0.5"')
            if is_seen:
                picture.text(key_x(key) + CELL / 2 - 1, y + 24, "✓", "middle small")
    y = TOP + NEW * CELL + 26
    held = [LAYOUT.local_len(CACHED, rank) for rank in range(LAYOUT.size)]
    lens = ", ".join(map(str, held))
    picture.text(14, y, f"The rectangle: no mask within it. Ranks hold {lens} of its columns.")
    picture.text(14, y + 22, "gather KV: the columns cross, and each rank attends for its heads.")
    picture.text(14, y + 44, "gather q: the rows cross, and each rank attends to its columns.")
    picture.text(14, y + 66, "Then rectangle and triangle are merged by their LSEs.")
    return picture


def key_x(key: int) -> float:
    return LEFT + key * CELL + (24 if key >= CACHED else 0)
