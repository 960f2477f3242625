"""FA3, FlashInfer and our Triton kernels against attention in fp64, with NaN where nothing may be
read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from backends import GPU_BACKENDS

from minidcp.attention import AttentionBackend
from minidcp.attention.fa3 import FA3Backend
from minidcp.attention.flashinfer import FlashInferBackend
from minidcp.attention.triton import TritonBackend
from minidcp.batch import CacheQueries, Varlen
from minidcp.kernels.fa3 import load_operators
from minidcp.kernels.flashinfer import load_library

pytestmark = pytest.mark.gpu
SCALE = 192**-0.5
LENS = [594, 0, 1, 15, 16, 17]


def make_backend(name: str, heads: int, block_size: int) -> AttentionBackend:
    if name == "fa3":
        return FA3Backend(load_operators(), SCALE, heads, block_size)
    if name == "flashinfer":
        library = load_library(512, 64, torch.cuda.get_device_capability())
        return FlashInferBackend(library, SCALE, heads, block_size, torch.device("cuda"))
    return TritonBackend(SCALE)


def make_case(
    lens: list[int], heads: int, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, CacheQueries]:
    generator = torch.Generator("cuda").manual_seed(len(lens) * heads + block_size)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator).bfloat16()

    blocks_each = max(1, -(-max(lens) // block_size))
    table = torch.randperm(len(lens) * blocks_each, device="cuda", generator=generator)
    table = table.view(len(lens), -1).to(torch.int32)
    kv = normal(len(lens) * blocks_each, block_size, 576)
    rows = kv[table.long()].view(len(lens), -1, 576)
    local_lens = torch.tensor(lens, dtype=torch.int32, device="cuda")
    unused = torch.arange(rows.shape[1], device="cuda") >= local_lens[:, None]
    kv[table.long()] = rows.masked_fill(unused[..., None], torch.nan).view(
        len(lens), blocks_each, block_size, 576
    )
    batch = CacheQueries(table, local_lens, np.array(lens), narrow=False)
    return normal(len(lens), heads, 512), normal(len(lens), heads, 64), kv, batch


def check_rows(
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    kv: torch.Tensor,
    batch: CacheQueries,
    rows: range,
) -> None:
    for row in rows:
        length = int(batch.local_lens[row])
        if length == 0:
            assert (lse[row] == -torch.inf).all()
            continue
        keys = kv[batch.block_table[row].long()].view(-1, 576)[:length].double()
        scores = q[row].double() @ keys.T * SCALE
        expected = scores.softmax(-1) @ keys[:, :512]
        assert (out[row].double() - expected).norm() / expected.norm() < 5e-3, (
            f"row {row} of length {length}"
        )
        assert (lse[row].double() - scores.logsumexp(-1)).abs().max() < 1e-4, (
            f"row {row} of length {length}"
        )


@pytest.mark.parametrize(
    ("heads", "block_size"),
    [(16, 1), (16, 16), (32, 16), (64, 8), (128, 1), (128, 8), (128, 16), (128, 32)],
)
@pytest.mark.parametrize("batch_size", [1, 2, 32, 128, 512])
@pytest.mark.parametrize("name", GPU_BACKENDS)
def test_decode(name: str, batch_size: int, heads: int, block_size: int) -> None:
    cases = [
        [(LENS * 100)[i + shift] for i in range(batch_size)]
        for shift in (range(6) if batch_size == 1 else [0])
    ]
    if batch_size <= 2:
        cases.append([16384] * batch_size)
    for lens in cases:
        q_latent, q_pe, kv, batch = make_case(lens, heads, block_size)
        backend = make_backend(name, heads, block_size)
        backend.plan(batch)
        backend.prepare(batch)
        out, lse = backend.decode(q_latent, q_pe, kv, batch)
        assert out.shape == q_latent.shape
        assert lse.shape == (batch_size, heads)
        assert lse.dtype == torch.float32
        q = torch.cat([q_latent, q_pe], -1)
        check_rows(out, lse, q, kv, batch, range(0, batch_size, max(1, batch_size // 12)))


@pytest.mark.parametrize("lens", [[594] * 64, [16384]], ids=["unsplit", "split"])
@pytest.mark.parametrize("name", GPU_BACKENDS)
def test_decode_writes_where_it_is_told(name: str, lens: list[int]) -> None:
    q_latent, q_pe, kv, batch = make_case(lens, 128, 16)
    backend = make_backend(name, 128, 16)
    backend.plan(batch)
    backend.prepare(batch)
    expected, expected_lse = backend.decode(q_latent, q_pe, kv, batch)
    memory = torch.full_like(q_latent, torch.nan)
    out, lse = backend.decode(q_latent, q_pe, kv, batch, memory)
    assert out.data_ptr() == memory.data_ptr() and out.is_contiguous()
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", GPU_BACKENDS)
def test_prefill(name: str, causal: bool) -> None:
    lens_q = [5, 1, 300, 1025]
    lens_k = lens_q if causal else [100, 0, 17, 2000]
    heads = 4
    cu = [
        torch.tensor([0, *lens], device="cuda").cumsum(0).to(torch.int32)
        for lens in (lens_q, lens_k)
    ]
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(n, heads, d, device="cuda").bfloat16()
        for n, d in ((sum(lens_q), 192), (sum(lens_k), 192), (sum(lens_k), 128))
    )
    out, lse = make_backend(name, heads, 16).prefill(q, k, v, Varlen(*cu, lens_q, lens_k, causal))
    assert lse.shape == (sum(lens_q), heads)
    parts = zip(
        q.split(lens_q),
        k.split(lens_k),
        v.split(lens_k),
        out.split(lens_q),
        lse.split(lens_q),
        strict=True,
    )
    for q_i, k_i, v_i, out_i, lse_i in parts:
        if not len(k_i):
            assert (lse_i == -torch.inf).all()
            continue
        scores = torch.einsum("qhd,khd->hqk", q_i.double(), k_i.double()) * SCALE
        if causal:
            hidden = torch.ones(scores.shape[1:], device="cuda", dtype=torch.bool).triu(1)
            scores = scores.masked_fill(hidden, -torch.inf)
        expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v_i.double())
        assert (out_i.double() - expected).norm() / expected.norm() < 5e-3
        assert (lse_i.double() - scores.logsumexp(-1).T).abs().max() < 1e-4


@pytest.mark.parametrize("name", GPU_BACKENDS)
def test_a_graph_serves_other_lengths(name: str) -> None:
    """A graph is captured with one set of lengths and replayed with others, also with zero."""
    q_latent, q_pe, kv, batch = make_case([594] * 8, 128, 16)
    batch.is_replayed = True
    backend = make_backend(name, 128, 16)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        backend.prepare(batch)
        return backend.decode(q_latent, q_pe, kv, batch)

    backend.plan(batch)
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = step()
    for lens in ([0] * 8, [1, 0, 16, 17, 594, 593, 2, 0], [594] * 8):
        batch.local_lens.copy_(torch.tensor(lens, dtype=torch.int32))
        batch.host_lens[:] = lens
        backend.plan(batch)
        graph.replay()
        check_rows(out, lse, torch.cat([q_latent, q_pe], -1), kv, batch, range(8))
