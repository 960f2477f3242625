"""How far FA3 may split sequences: what it allocates for that must not eat up the cache."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from minidcp.attention.fa3 import FA3Backend
from minidcp.kernels.fa3 import LATENT_DIM, Operators

QUARTER_GIB = 2**28


@given(num_rows=st.integers(1, 8192), num_heads=st.sampled_from([16, 20, 32, 64, 128]))
def test_partial_outputs_are_bounded(num_rows: int, num_heads: int) -> None:
    backend = FA3Backend(Operators("none", None), 1.0, num_heads, block_size=16)
    num_splits = backend.limit_splits(num_rows)
    bytes_per_split = num_rows * num_heads * LATENT_DIM * 4
    if num_splits == 0:  # FA3 chooses: 64 at most, about
        assert 64 * bytes_per_split <= QUARTER_GIB
    else:
        assert num_splits == 1 or num_splits * bytes_per_split <= QUARTER_GIB
        assert (num_splits + 1) * bytes_per_split > QUARTER_GIB, "as far as there is room"
