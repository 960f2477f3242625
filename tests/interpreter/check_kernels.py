"""Triton kernels in Triton's interpreter, and their torch definitions, against fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from minidcp.attention.reference import ReferenceBackend
from minidcp.batch import CacheQueries
from minidcp.kernels import (
    DeviceProperties,
    absorb,
    align,
    dense,
    experts,
    fp8,
    grouped,
    kv_store,
    linear,
    merge,
    mla_decode,
    norm,
    peer,
    peer_norm,
    route,
    tiles,
)
from minidcp.kernels.tokens import read_tokens, read_tokens_ref
from minidcp.model_config import ModelConfig

DTYPES = [torch.float32, torch.bfloat16]


def partials(
    size: int, tokens: int, heads: int, dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random partials. About a third of the shards are empty and hold NaN."""
    torch.manual_seed(size * 1000 + dim)
    outs = torch.randn(size, tokens, heads, dim).to(dtype)
    lses = torch.randn(size, tokens, heads) * 5
    empty = torch.rand(size, tokens, heads) < 0.35
    empty[:, 0, 0] = True  # a token and head for which all shards are empty
    return outs.masked_fill(empty[..., None], torch.nan), lses.masked_fill(empty, -torch.inf)


def merged_in_fp64(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weights = lses.double().exp()
    parts = outs.double().masked_fill((lses == -torch.inf)[..., None], 0)
    total = weights.sum(0)
    out = (weights[..., None] * parts).sum(0) / total.clamp(min=1e-300)[..., None]
    return out, total.log()


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    # The interpreter rounds to bf16 by truncation, with an error of up to 2^-7. A kernel rounds at
    # most three times.
    return (
        {"atol": 1e-5, "rtol": 1e-5}
        if dtype == torch.float32
        else {"atol": 2e-2, "rtol": 3 * 2**-7}
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size", "tokens", "heads", "dim"), [(2, 3, 2, 128), (8, 2, 3, 512), (3, 4, 2, 16)]
)
def test_merge(size: int, tokens: int, heads: int, dim: int, dtype: torch.dtype) -> None:
    outs, lses = partials(size, tokens, heads, dim, dtype)
    expected, expected_lse = merged_in_fp64(outs, lses)
    for function in (merge.merge_partials_ref, merge.merge_partials):
        out, lse = function(outs, lses, dtype, None)
        torch.testing.assert_close(out.double(), expected, **tolerance(dtype))
        torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)
        assert out.dtype == dtype and lse[0, 0] == -torch.inf and (out[0, 0] == 0).all()


def test_merge_reads_the_packed_layout() -> None:
    """The exchange passes strided views of one buffer."""
    outs, lses = partials(4, 3, 2, 32, torch.bfloat16)
    packed = torch.empty(4, 3, 2, 34, dtype=torch.bfloat16)
    packed[..., :32] = outs
    packed[..., 32:].view(torch.float32)[..., 0] = lses
    views = packed[..., :32], packed[..., 32:].view(torch.float32)[..., 0]
    packed_result = merge.merge_partials(*views, torch.bfloat16)
    for a, b in zip(
        packed_result, merge.merge_partials_ref(outs, lses, torch.bfloat16, None), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size", "tokens", "heads", "dim"), [(2, 3, 2, 128), (8, 1, 4, 512), (3, 2, 3, 16)]
)
def test_rescale(size: int, tokens: int, heads: int, dim: int, dtype: torch.dtype) -> None:
    outs, lses = partials(size, tokens, heads, dim, dtype)
    expected, expected_lse = merged_in_fp64(outs, lses)
    for function in (merge.merge_partials_ref, merge.merge_partials):
        shares = (function(outs[r].expand(size, -1, -1, -1), lses, dtype, r) for r in range(size))
        parts, merged = zip(*shares, strict=True)
        torch.testing.assert_close(torch.stack(parts).double().sum(0), expected, **tolerance(dtype))
        for lse in merged:
            torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("latent", "rope_dim"), [(512, 64), (32, 8)])
def test_store(latent: int, rope_dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    kv, weight = torch.randn(6, latent + rope_dim).to(dtype), torch.rand(latent).to(dtype) + 0.5
    queries = torch.randn(6, 5, 8 + rope_dim).to(dtype)
    cos_sin, turn = random_angles(6, rope_dim)
    slots = torch.tensor([5, -1, 0, 11, -1, 7], dtype=torch.int32)
    results = []
    for function in (kv_store.store_latents_ref, kv_store.store_latents):
        cache = torch.full((3, 4, latent + rope_dim), torch.nan, dtype=dtype)
        q = queries.clone()
        new = kv_store.NewLatents(kv, weight, 1e-6, cos_sin, cache, slots)
        latents = function(new, q[..., 8:])
        close(q[..., 8:], turned(queries[..., 8:], turn[:, None]), dtype)
        assert torch.equal(q[..., :8], queries[..., :8])
        rows = cache.view(12, -1)
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                assert torch.equal(rows[slot], latents[token])
        assert rows[[i for i in range(12) if i not in slots.tolist()]].isnan().all()
        results.append(latents)
        close(latents[:, latent:], turned(kv[:, latent:], turn), dtype)
    close(results[1], results[0], dtype)


# bf16 with single tokens only, as in `test_multiply`.
@pytest.mark.parametrize(
    ("tokens", "dtype"),
    [*((n, torch.float32) for n in (1, 2, 17, 32)), (1, torch.bfloat16)],
)
@pytest.mark.parametrize(
    ("heads", "nope", "latent", "rope_dim"), [(1, 24, 40, 8), (3, 16, 72, 64), (16, 32, 64, 8)]
)
@pytest.mark.parametrize("in_place", [False, True])
def test_absorb(
    in_place: bool, heads: int, nope: int, latent: int, rope_dim: int, tokens: int,
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In one kernel: what its parts do to the cache, the products, and the rotated queries."""
    torch.manual_seed(tokens)
    width = latent + rope_dim
    down, norm_weight = torch.randn(tokens, 5 + width).to(dtype), torch.rand(latent).to(dtype) + 0.5
    queries = torch.randn(tokens, heads, nope + rope_dim).to(dtype)
    w_uk = torch.randn(heads, 3 + nope, latent).to(dtype)[:, 3:]  # W_UV's rows come before
    cos_sin, turn = random_angles(tokens, rope_dim)
    slots = torch.randperm(36)[:tokens].to(torch.int32)
    slots[1::3] = -1

    caches = []
    for is_fused in (True, False):
        q = queries.clone()
        cache = torch.full((9, 4, width), torch.nan, dtype=dtype)
        new = kv_store.NewLatents(down[:, 5:], norm_weight, 1e-6, cos_sin, cache, slots)
        if is_fused:
            with monkeypatch.context() as patch:
                patch.setattr(absorb, "store_latents", None)  # which only the other way calls
                place = (
                    None if in_place else torch.full((tokens, heads, width), torch.nan).to(dtype)
                )
                q_latent, q_pe = absorb.absorb_query(q, w_uk, new, place)
            if place is not None:
                assert torch.equal(torch.cat([q_latent, q_pe], -1), place)
            expected = torch.einsum("thn,hnc->thc", queries[..., :nope].double(), w_uk.double())
            close(q_latent / nope**0.5, expected / nope**0.5, dtype)
            close(q_pe, turned(queries[..., nope:], turn[:, None]), dtype)
        else:
            kv_store.store_latents_ref(new, q[..., nope:])
        caches.append(cache.view(36, width))
    assert torch.equal(caches[0].isnan(), caches[1].isnan())
    close(caches[0].nan_to_num(), caches[1].nan_to_num(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 100, 5120])
@pytest.mark.parametrize(
    ("with_residual", "top_k"), [(False, None), (True, None), (True, 1), (True, 3)]
)
def test_rms_norm(dim: int, with_residual: bool, top_k: int | None, dtype: torch.dtype) -> None:
    """The norm of x, or of a weighted sum of `top_k` parts."""
    torch.manual_seed(0)
    x, weight = torch.randn(3, dim).to(dtype), torch.rand(dim).to(dtype) + 0.5
    residual = torch.randn(3, dim).to(dtype) if with_residual else None
    given, scales = x, None
    if top_k is not None:
        given, scales = torch.randn(3, top_k, dim).to(dtype), torch.rand(3, top_k)
        x = (given.double() * scales[..., None].double()).sum(1).to(dtype)
    total = x if residual is None else x + residual
    expected = torch.nn.functional.rms_norm(total.double(), (dim,), weight.double(), 1e-6)
    for function in (norm.rms_norm_ref, norm.rms_norm):
        normed, kept = function(given, weight, 1e-6, residual, scales)
        close(normed, expected, dtype)
        close(kept, total, dtype)


# Triton's interpreter multiplies bf16 matrices wrongly. So bf16 is tested only with single tokens,
# which use no tensor cores.
SHAPES = [(1, 1, 100, 40), (1, 3, 700, 24), (5, 2, 520, 33), (40, 1, 64, 7)]


@pytest.mark.parametrize(
    ("tokens", "heads", "dim_in", "dim_out", "dtype"),
    [
        *((*shape, torch.float32) for shape in SHAPES),
        *((*shape, torch.bfloat16) for shape in SHAPES[:2]),
    ],
)
def test_multiply(tokens: int, heads: int, dim_in: int, dim_out: int, dtype: torch.dtype) -> None:
    """Weights of any strides. Input and output are parts of wider rows."""
    torch.manual_seed(0)
    x = torch.randn(tokens, heads, dim_in + 8).to(dtype)[..., 8:]
    weight = torch.randn(heads, dim_out, dim_in).to(dtype)
    expected = torch.einsum("thi,hoi->tho", x.double(), weight.double())
    scale = dim_in**0.5
    for w in (weight, weight.mT.contiguous().mT):
        wide = torch.full((tokens, heads, dim_out + 4), torch.nan, dtype=dtype)
        assert linear.multiply_by_head(x, w, wide[..., :dim_out]).data_ptr() == wide.data_ptr()
        close(wide[..., :dim_out] / scale, expected / scale, dtype)
        assert wide[..., dim_out:].isnan().all()
        exact = linear.multiply_by_head(x, w, torch.empty(tokens, heads, dim_out))
        close(exact / scale, expected / scale, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim_in", "dim_out"), [(40, 24), (100, 33), (1536, 10)])
def test_norm_and_multiply(
    dim_in: int, dim_out: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token in one kernel. Input, weight and output are parts of wider rows."""
    torch.manual_seed(0)
    x = torch.randn(1, dim_in + 8).to(dtype)[:, :dim_in]
    norm_weight = torch.rand(dim_in).to(dtype) + 0.5
    weight = (torch.randn(dim_out, dim_in + 3) / dim_in**0.5).to(dtype)[:, 3:]
    normed = F.rms_norm(x.double(), (dim_in,), norm_weight.double(), 1e-6)
    wide = torch.full((1, dim_out + 4), torch.nan, dtype=dtype)
    monkeypatch.setattr(dense, "rms_norm", None)  # which only other numbers of tokens go to
    out = dense.norm_and_multiply(x, norm_weight, 1e-6, weight, wide[:, :dim_out])
    assert out.data_ptr() == wide.data_ptr() and wide[:, dim_out:].isnan().all()
    close(out, normed @ weight.double().T, dtype)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    ("count", "groups", "chosen", "top_k"),
    [(12, 1, 1, 3), (18, 3, 2, 5), (20, 4, 2, 6), (160, 8, 3, 6), (256, 8, 4, 8)],
)
def test_route(
    count: int, groups: int, chosen: int, top_k: int, has_bias: bool, normalise: bool
) -> None:
    torch.manual_seed(0)
    keys = ("n_routed_experts", "n_group", "topk_group", "num_experts_per_tok", "norm_topk_prob")
    values = count, groups, chosen, top_k, normalise
    config = ModelConfig(
        *[8] * 9,
        routed_scaling_factor=3.0,
        sigmoid_router=has_bias,
        **dict(zip(keys, values, strict=True)),
    )
    logits = torch.randn(7, count) * 3
    bias = 7 + torch.rand(count) if has_bias else None
    for a, b in zip(
        route.route(logits, config, 2, bias), route.route_ref(logits, config, 2, bias), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about NaN
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("count", "groups", "chosen"), [(12, 1, 1), (18, 3, 2), (160, 8, 3)])
def test_route_of_equals(count: int, groups: int, chosen: int, has_bias: bool) -> None:
    """The first experts are chosen; with NaN everywhere, different ones."""
    config = ModelConfig(
        *[8] * 9, n_routed_experts=count, n_group=groups, topk_group=chosen, num_experts_per_tok=7
    )
    bias = torch.full([count], 7.0) if has_bias else None
    ids = route.route(torch.zeros(1, count), config, 2, bias)[1]
    assert torch.equal(ids[0], torch.arange(2 + 7, dtype=torch.int32))

    weights, ids = route.route(torch.full((1, count), torch.nan), config, 2, bias)
    assert weights[0, 2:].isnan().all()
    assert len(ids.unique()) == 2 + 7 and ids.max() < 2 + count


@pytest.mark.parametrize("is_sorted", [False, True])
@pytest.mark.parametrize(
    ("tokens", "count", "bm"), [(1, 5, 16), (1, 5, 1), (2, 5, 1), (9, 7, 16), (40, 4, 32)]
)
def test_experts(
    tokens: int, count: int, bm: int, is_sorted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dims that are not multiples of a tile's, and experts that no token chooses."""
    dtype = torch.bfloat16 if bm == 1 else torch.float32
    torch.manual_seed(0)
    hidden, inter = 48, 24
    x, weights = torch.randn(tokens, hidden).to(dtype), torch.rand(tokens, 4)
    gate_up = torch.randn(count, 2 * inter, hidden).to(dtype) / 7
    down = torch.randn(count, hidden, inter).to(dtype) / 5
    ids = torch.rand(tokens, count).topk(min(4, count - 1)).indices.to(torch.int32)
    weights = weights[:, : ids.shape[1]].contiguous()
    gate, up = torch.einsum("th,teoh->teo", x.double(), gate_up[ids.long()].double()).chunk(2, -1)
    parts = torch.einsum(
        "tei,tehi->teh", torch.nn.functional.silu(gate) * up, down[ids.long()].double()
    )
    expected = (parts * weights[..., None].double()).sum(1)
    tile = tiles.Tile(16, 32, 4, 3)
    close(experts.run_experts_ref(x, gate_up, down, weights, ids).sum(), expected, dtype)
    if is_sorted:
        monkeypatch.setattr(grouped, "get_device_properties", lambda: DeviceProperties((9, 0)))
        monkeypatch.setattr(align, "MAX_CHUNK", 16)
        monkeypatch.setattr(align, "MAX_TOKENS", 8)
    given = tiles.Tiles(bm, is_sorted, tile, tile)
    monkeypatch.setattr(tiles, "list_tiles", lambda *shape: {tokens: given})
    close(experts.run_experts(x, gate_up, down, weights, ids).sum(), expected, dtype)


@pytest.mark.parametrize("chunk", [16, 4096])
def test_align(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every choice appears once, in the blocks of its expert and in order.

    Of an expert that a token chose twice, as with NaN logits, one choice is missing. Its place says
    so.
    """
    monkeypatch.setattr(align, "MAX_CHUNK", chunk)
    monkeypatch.setattr(align, "MAX_TOKENS", 8)
    torch.manual_seed(0)
    for tokens, count, bm in ((3, 5, 16), (21, 9, 4), (64, 6, 16)):
        ids = torch.rand(tokens, count).topk(3).indices.to(torch.int32)
        for twice in (False, True):
            if twice:
                ids[::2, 1] = ids[::2, 0]
            blocks = align.align(ids, count, bm)
            assert blocks.choices is not None and blocks.experts is not None
            used = int(blocks.experts[-1])
            choices = blocks.choices.view(-1, bm)[:used]
            there = choices < ids.numel()
            assert (choices >= 0).all() and (choices[~there] == ids.numel()).all()
            by_block = blocks.experts[:used, None].expand(-1, bm)[there]
            assert (ids.flatten()[choices[there].long()] == by_block).all()
            assert (choices[there].diff()[by_block.diff() == 0] > 0).all()
            expected = len({(t, int(e)) for t, row in enumerate(ids) for e in row})
            assert len(choices[there].unique()) == int(there.sum()) == expected


def close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), **tolerance(dtype))


def random_angles(tokens: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random cos_sin [T, dim], and the same rotations as complex numbers [T, dim / 2]."""
    angles = torch.randn(tokens, dim // 2)
    return torch.cat([angles.cos(), angles.sin()], -1), torch.polar(
        torch.ones(1).double(), angles.double()
    )


def turned(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Rotate by a complex multiplication, like the checkpoint's authors."""
    product = torch.complex(*x.double().chunk(2, -1)) * turn
    return torch.cat([product.real, product.imag], -1)


def paged(lens: list[int], block_size: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A cache with NaN everywhere except for the rows' tokens, and a scattered block table."""
    torch.manual_seed(1)
    blocks_each = -(-max(lens) // block_size) + 1
    table = torch.randperm(blocks_each * len(lens)).view(len(lens), -1).to(torch.int32)
    kv = torch.full((table.numel(), block_size, width), torch.nan)
    for row, length in enumerate(lens):
        for token in range(length):
            kv[table[row, token // block_size], token % block_size] = torch.randn(width)
    return kv, table


@pytest.mark.parametrize("programs", [1, 64])
@pytest.mark.parametrize("block_size", [1, 8, 16])
def test_mla_decode(block_size: int, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare with the reference back-end, with splits and without. Empty rows give 0 and -inf."""
    lens = [0, 1, 15, 70]
    kv, table = paged(lens, block_size, 64 + 16)
    q_latent, q_pe = torch.randn(4, 5, 64), torch.randn(4, 5, 16)
    local_lens = torch.tensor(lens, dtype=torch.int32)
    batch = CacheQueries(table, local_lens, local_lens.numpy(), narrow=False)
    backend = ReferenceBackend(0.1)
    backend.prepare(batch)
    properties = DeviceProperties(multiprocessors=programs)
    monkeypatch.setattr(mla_decode, "get_device_properties", lambda: properties)
    expected, expected_lse = backend.decode(q_latent, q_pe, kv, batch)
    out, lse = mla_decode.mla_decode(q_latent, q_pe, kv, table, local_lens, 0.1)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(lse, expected_lse, atol=1e-4, rtol=1e-4)
    assert (out[0] == 0).all() and (lse[0] == -torch.inf).all()


@pytest.mark.parametrize(("size", "programs"), [(2, 1), (4, 3), (8, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_peers(dtype: torch.dtype, size: int, programs: int) -> None:
    """Read, sum and merge the buffers of peers that have come to every meeting already."""
    tokens, own, dim, rank = 5, 2, 32, size - 1
    outs, lses = partials(size, tokens, own * size, dim, dtype)
    lse_offset = outs[0].nbytes
    buffers = torch.zeros(size, lse_offset + lses[0].nbytes, dtype=torch.uint8)
    staged = [
        buffer[lse_offset:].view(torch.float32).view(tokens, own * size) for buffer in buffers
    ]
    for buffer, lse_place, out, lse in zip(buffers, staged, outs, lses, strict=True):
        buffer[:lse_offset].view(dtype).view(out.shape).copy_(out)
        lse_place.copy_(lse)
    staged[rank].zero_()  # the kernel writes its own LSEs there
    most = peer.MAX_PROGRAMS.value
    pads = torch.full((size, size, most), 1000, dtype=torch.int32)
    meeting = peer.Meeting(
        rank,
        torch.tensor([pad.data_ptr() for pad in pads]),
        torch.zeros(most, dtype=torch.int32),
        programs,
    )
    pointers = torch.tensor([buffer.data_ptr() for buffer in buffers])

    mine = slice(rank * own, (rank + 1) * own)
    expected, expected_lse = merged_in_fp64(outs[:, :, mine], lses[:, :, mine])
    out, lse = torch.empty(tokens, own, dim, dtype=dtype), torch.empty(tokens, own)
    peer.merge_peers(meeting, pointers, lse_offset, staged[rank], lses[rank], out, lse)
    close(out, expected, dtype)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)
    assert torch.equal(staged[rank], lses[rank])
    assert meeting.epochs.max() == 1 and (pads[:, rank, 0] == 1).all()

    width, stride = own * dim, size * own * dim
    read = torch.empty(tokens, size, width, dtype=dtype)
    peer.read_peers(meeting, pointers, stride, rank * width, read)
    rows = outs.view(size, tokens, stride)[:, :, rank * width :][:, :, :width]
    torch.testing.assert_close(read, rows.transpose(0, 1), equal_nan=True)
    total = torch.empty(tokens, width, dtype=dtype)
    peer.sum_peers(meeting, pointers, stride, rank * width, total)
    torch.testing.assert_close(
        total, rows.float().sum(0).to(dtype), equal_nan=True, **tolerance(dtype)
    )


@pytest.mark.parametrize(("size", "programs"), [(2, 1), (4, 3), (8, 64)])
@pytest.mark.parametrize("has_parts", [True, False])
def test_norm_of_peers(has_parts: bool, size: int, programs: int) -> None:
    """The sum of the peers' buffers, which are there, and of this rank's, which is copied there."""
    tokens, dim, rank = 5, 40, size - 1
    buffers = torch.randn(size, tokens, dim)
    residual, weight = torch.randn(tokens, dim), torch.randn(dim)
    x, scales, place = buffers[rank].clone(), None, None
    if has_parts:
        x, scales, place = torch.randn(tokens, 3, dim), torch.rand(tokens, 3), buffers[rank]
        own = (x * scales[..., None]).sum(1)
    most = peer.MAX_PROGRAMS.value
    pads = torch.full((size, size, most), 1000, dtype=torch.int32)
    meeting = peer.Meeting(
        rank,
        torch.tensor([pad.data_ptr() for pad in pads]),
        torch.zeros(most, dtype=torch.int32),
        programs,
    )
    pointers = torch.tensor([buffer.data_ptr() for buffer in buffers])
    normed, total = peer_norm.norm_peers(
        meeting, pointers, x, scales, place, residual, weight, 1e-6, quantizes=False
    )
    if has_parts:
        torch.testing.assert_close(buffers[rank], own)
    expected = buffers.sum(0) + residual
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(normed, F.rms_norm(expected, (dim,), weight, 1e-6))


@pytest.mark.parametrize("quantizes", [False, True])
@pytest.mark.parametrize(
    ("size", "tokens", "programs"), [(2, 7, 1), (3, 9, 64), (4, 5, 3), (4, 13, 2), (8, 9, 2)]
)
def test_norm_of_shared_rows(size: int, tokens: int, programs: int, quantizes: bool) -> None:
    """Runs of equal length, a last run that is shorter, and ranks that have none."""
    dim = 200  # two blocks of FP8, of which the second is not full
    buffers = torch.randn(size, tokens, dim)
    residual, weight = torch.randn(tokens, dim), torch.randn(dim)
    rows = -(-tokens // size)
    staged = torch.full((size, rows, dim), 1e4)
    pointers = torch.tensor([buffer.data_ptr() for buffer in buffers])
    normed_pointers = torch.tensor([place.data_ptr() for place in staged])
    expected_total = buffers.sum(0) + residual
    expected = F.rms_norm(expected_total, (dim,), weight, 1e-6)

    most = peer.MAX_PROGRAMS.value
    pads = torch.full((size, size, most), 1000, dtype=torch.int32)
    results = []
    for rank in [*range(size), *range(size)]:  # in the second round all rows are there
        run = slice(rank * rows, (rank + 1) * rows)
        pad_pointers = torch.tensor([pad.data_ptr() for pad in pads])
        epochs = torch.zeros(most, dtype=torch.int32)
        meeting = peer.Meeting(rank, pad_pointers, epochs, programs)
        normed, total = peer_norm.norm_shared_rows(
            meeting, pointers, normed_pointers, staged[rank], residual[run], tokens,
            weight, 1e-6, quantizes,
        )  # fmt: skip
        torch.testing.assert_close(total, expected_total[run])
        assert epochs.tolist() == [2] * min(programs, rows) + [0] * (most - min(programs, rows))
        results.append(normed)
    for normed in results[size:]:
        torch.testing.assert_close(fp8.widen(normed), expected)
        if quantizes:
            assert isinstance(normed, fp8.Quantized)
            wanted = fp8.quantize_ref(normed.rows)
            assert torch.equal(normed.fp8.scales, wanted.scales)
            is_close = (normed.fp8.dequantize() - wanted.dequantize()).abs() < 1e-5
            assert is_close.float().mean() > 0.95  # see check_fp8.py for what the interpreter does


@pytest.mark.parametrize("rows", [1, 7, 300])
def test_tokens_of_decode_rows(rows: int) -> None:
    """Given ones, and those that are remembered of a slot."""
    remembered = torch.randint(1000, 2000, (9, 4))
    codes = torch.randint(-4, 20, (rows,), dtype=torch.int32)
    slots = torch.randint(9, (rows,), dtype=torch.int32)
    pairs = zip(codes.tolist(), slots.tolist(), strict=True)
    expected = [code if code >= 0 else int(remembered[slot, -1 - code]) for code, slot in pairs]
    assert read_tokens(codes, remembered, slots).tolist() == expected
    assert read_tokens_ref(codes, remembered, slots).tolist() == expected
