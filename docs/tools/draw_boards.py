"""Chapter 4: two boards in turn, over time."""

from svg import Picture

LEFT, STEP = 76, 150  # of the first collective, and to the next one


def draw_boards() -> Picture:
    picture = Picture(
        "Two boards in turn",
        "Rank 0 is fast: it writes on board B for collective 2 while rank 1 still reads board A. "
        "It cannot write on A again before rank 1 has come to barrier 2.",
        height=270,
    )
    picture.text(14, 26, "two boards, A and B, and one barrier per collective", "bold")
    for index, board in enumerate("ABA"):
        barrier = LEFT + index * STEP + 52
        picture.line((barrier, 48), (barrier, 176), css="marked")
        picture.text(barrier, 192, f"barrier {index + 1}", "small middle mark")
        picture.text(barrier, 208, f"board {board}", "small middle soft")

    for row, (rank, y) in enumerate(((0, 58), (1, 118))):
        css = f"r{row}"
        picture.text(14, y + 27, f"rank {rank}", "bold")
        for index, board in enumerate("ABA"):
            barrier = LEFT + index * STEP + 52
            write_x = barrier - 48 if rank == 1 else barrier - 92 + (44 if index == 0 else 0)
            picture.labelled(write_x, y, 44, 44, ["write", board], css, "small middle")
            if index < 2:
                read_x = barrier + (4 if rank == 0 else 48)
                picture.labelled(read_x, y, 44, 44, ["read", board], css, "small middle")
    picture.text(
        14, 238, "Rank 0 writes B while rank 1 still reads A. To write A again it must pass"
    )
    picture.text(14, 258, "barrier 2, and rank 1 comes there only after it has read A.")
    return picture
