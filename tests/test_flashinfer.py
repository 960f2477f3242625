"""The adapter for FlashInfer on a CPU: a stand-in for the library computes in torch what the real
one does on a GPU, with its contract: metadata in CSR form, base 2, fixed buffers for graphs."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import Oracle, make_prompt

from minidcp import LLM, SamplingParams
from minidcp.attention.flashinfer import FlashInferBackend
from minidcp.attention.reference import ReferenceBackend
from minidcp.batch import CacheQueries
from minidcp.kernels.flashinfer import load_library
from minidcp.worker.cuda_graph import GraphInputs

HEADS = 4
LATENT = 128
ROPE = 64
BLOCK_SIZE = 16
SCALE = 0.07
LENS = [594, 0, 1, 15, 16, 17]
CPU = torch.device("cpu")
compiled: list[tuple[object, ...]] = []


@dataclass(frozen=True)
class Metadata:
    qo_indptr: torch.Tensor
    kv_indptr: torch.Tensor
    kv_indices: torch.Tensor
    kv_len_arr: torch.Tensor

    @classmethod
    def csr(cls, **tensors: torch.Tensor) -> Metadata:
        return cls(**tensors)


class Wrapper:
    """What FlashInfer 0.7.2's BatchMLAPagedAttentionWrapper promises, for one query a row.

    Without `use_cuda_graph` it keeps the tensors that it is given; with it, it copies them into the
    buffers that it was made with, which alone a graph reads.
    """

    def __init__(
        self, workspace: torch.Tensor, use_cuda_graph: bool = False, *, backend: str, **buffers: Any
    ) -> None:
        assert workspace.dtype == torch.uint8 and backend in ("fa2", "fa3")
        assert use_cuda_graph == bool(buffers)
        self.buffers = buffers

    def plan(self, *, metadata: Metadata, num_heads: int, page_size: int, **options: Any) -> None:
        lens = metadata.kv_len_arr
        assert options["lse_mode"] == "base2" and options["causal"] is False
        assert options["query_layout"] == options["kv_cache_layout"] == "split"
        assert (options["head_dim_ckv"], options["head_dim_kpe"]) == (LATENT, ROPE)
        pages = metadata.kv_indptr.diff()
        assert torch.equal(pages, (lens + page_size - 1) // page_size)
        assert metadata.qo_indptr.tolist() == list(range(len(lens) + 1))
        # What is read on the host is there: else planning waits for the device.
        assert all(x.device == CPU for x in (metadata.qo_indptr, metadata.kv_indptr, lens))

        given = vars(metadata)
        assert all(tensor.dtype == torch.int32 and tensor.ndim == 1 for tensor in given.values())
        if self.buffers:
            for name, tensor in given.items():
                buffer = self.buffers[name]
                assert len(buffer) == len(tensor) or name == "kv_indices"
                buffer[: len(tensor)] = tensor
        self.read = self.buffers or given
        self.num_heads = num_heads
        self.scale = options["sm_scale"]

    def run(
        self,
        *,
        query: tuple[torch.Tensor, torch.Tensor],
        kv_cache: tuple[torch.Tensor, torch.Tensor],
        out: torch.Tensor | None,
        return_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert return_lse
        q_latent, q_pe = query
        assert q_latent.shape[1] == self.num_heads
        if out is None:
            out = torch.empty_like(q_latent)
        lse = torch.full(q_latent.shape[:2], -torch.inf)
        for row, length in enumerate(self.read["kv_len_arr"].tolist()):
            begin, end = self.read["kv_indptr"][row : row + 2].tolist()
            blocks = self.read["kv_indices"][begin:end].long()
            latents, ropes = (part[blocks].flatten(0, 1)[:length] for part in kv_cache)
            scores = (q_latent[row] @ latents.T + q_pe[row] @ ropes.T) * self.scale
            out[row] = scores.softmax(-1) @ latents
            lse[row] = scores.logsumexp(-1) / math.log(2.0)  # base 2
        return out, lse


class Kernel:
    def build_and_load(self) -> None:
        pass


def generate_kernel(*arguments: object) -> Kernel:
    compiled.append(arguments)
    return Kernel()


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> FlashInferBackend:
    package = ModuleType("flashinfer")
    mla = ModuleType("flashinfer.mla")
    mla.BatchMLAPagedAttentionWrapper = Wrapper  # type: ignore[attr-defined]
    mla.MLAPlanMetadata = Metadata  # type: ignore[attr-defined]
    jit = ModuleType("flashinfer.jit")
    jit.gen_batch_mla_module = generate_kernel  # type: ignore[attr-defined]
    for module in (package, mla, jit):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    library = load_library(LATENT, ROPE, (9, 0))
    return FlashInferBackend(library, SCALE, HEADS, BLOCK_SIZE, CPU)


def make_queries(lens: list[int], is_replayed: bool = False) -> CacheQueries:
    """Rows whose blocks lie anywhere in a cache of 256 blocks; unused entries name no block."""
    generator = torch.Generator().manual_seed(sum(lens))
    width = -(-max(LENS) // BLOCK_SIZE)
    table = torch.randperm(256, generator=generator)[: len(lens) * width].view(len(lens), width)
    used = torch.arange(width) * BLOCK_SIZE < torch.tensor(lens)[:, None]
    return CacheQueries(
        block_table=table.masked_fill(~used, 1 << 30).to(torch.int32),
        local_lens=torch.tensor(lens, dtype=torch.int32),
        host_lens=np.array(lens),
        narrow=False,
        is_replayed=is_replayed,
    )


def make_cache(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    kv = torch.randn(256, BLOCK_SIZE, LATENT + ROPE)
    return torch.randn(rows, HEADS, LATENT), torch.randn(rows, HEADS, ROPE), kv


def attend_by_reference(
    q_latent: torch.Tensor, q_pe: torch.Tensor, kv: torch.Tensor, queries: CacheQueries
) -> tuple[torch.Tensor, torch.Tensor]:
    table = queries.block_table.masked_fill(queries.block_table == 1 << 30, 0)
    same = CacheQueries(table, queries.local_lens, queries.host_lens, narrow=False)
    reference = ReferenceBackend(SCALE)
    reference.prepare(same)
    return reference.decode(q_latent, q_pe, kv, same)


def test_the_kernel_is_the_one_that_the_wrapper_will_load(backend: FlashInferBackend) -> None:
    """FlashInfer makes it again when a wrapper is planned, and must find it compiled."""
    bf16 = torch.bfloat16
    assert compiled[-1] == ("fa3", bf16, bf16, bf16, torch.int32, LATENT, ROPE, False)
    load_library(LATENT, ROPE, (8, 0))
    assert compiled[-1][0] == "fa2"


def test_natural_logarithms_come_out(backend: FlashInferBackend) -> None:
    q_latent, q_pe, kv = make_cache(len(LENS))
    queries = make_queries(LENS)
    backend.plan(queries)
    out, lse = backend.decode(q_latent, q_pe, kv, queries)
    expected, expected_lse = attend_by_reference(q_latent, q_pe, kv, queries)
    sees_something = torch.tensor(LENS) > 0
    torch.testing.assert_close(out[sees_something], expected[sees_something])
    torch.testing.assert_close(lse, expected_lse)


def test_writes_where_it_is_told(backend: FlashInferBackend) -> None:
    q_latent, q_pe, kv = make_cache(len(LENS))
    queries = make_queries(LENS)
    backend.plan(queries)
    memory = torch.full_like(q_latent, torch.nan)
    out, _ = backend.decode(q_latent, q_pe, kv, queries, memory)
    assert out is memory


def test_graphs_read_fixed_buffers(backend: FlashInferBackend) -> None:
    """A graph keeps the addresses that it was captured with. So the plan is written there, also
    after another graph has been planned."""
    q_latent, q_pe, kv = make_cache(len(LENS))
    large = make_queries(LENS, is_replayed=True)
    backend.plan(large)
    small = make_queries([0, 0], is_replayed=True)
    backend.plan(small)
    wrapper: Any = large.planned
    addresses = {name: buffer.data_ptr() for name, buffer in wrapper.buffers.items()}

    for lens in ([0] * 6, [1, 0, 16, 17, 594, 593], LENS):
        new = make_queries(lens)
        large.block_table.copy_(new.block_table)
        large.local_lens.copy_(new.local_lens)
        large.host_lens[:] = lens
        backend.plan(large)
        assert large.planned is wrapper
        assert addresses == {name: x.data_ptr() for name, x in wrapper.buffers.items()}
        _, lse = backend.decode(q_latent, q_pe, kv, large)
        torch.testing.assert_close(lse, attend_by_reference(q_latent, q_pe, kv, new)[1])

    small.host_lens[:] = [20, 3]
    small.block_table[:, :2] = torch.tensor([[7, 9], [11, 1 << 30]])
    backend.plan(small)
    shared = small.planned.buffers["kv_indices"]  # type: ignore[attr-defined]
    assert shared.data_ptr() == addresses["kv_indices"] and shared[:3].tolist() == [7, 9, 11]


def test_plans_of_one_step_do_not_overwrite_each_other(backend: FlashInferBackend) -> None:
    """A step with prompts has several CacheQueries, all planned before the first layer runs."""
    q_latent, q_pe, kv = make_cache(2)
    steps = [make_queries([594, 17]), make_queries([3, 0])]
    for queries in steps:
        backend.plan(queries)
    for queries in steps:
        _, lse = backend.decode(q_latent, q_pe, kv, queries)
        torch.testing.assert_close(lse, attend_by_reference(q_latent, q_pe, kv, queries)[1])


def test_the_host_knows_the_lengths_that_a_graph_reads() -> None:
    """Also those of the padding."""
    inputs = GraphInputs(rows=8, width=3, device=CPU)
    batch = inputs.make_batch(4, narrow=False)
    assert batch.decode is not None and batch.decode.is_replayed
    for lens in ([5, 6, 7], [9]):
        row = np.zeros(len(lens), dtype=np.int64)
        inputs.fill(
            [row, row, row, np.array(lens), row], np.zeros((len(lens), 2), dtype=np.int64), 4
        )
        assert batch.decode.local_lens.tolist() == lens + [0] * (4 - len(lens))
        assert batch.decode.host_lens.tolist() == batch.decode.local_lens.tolist()


@pytest.mark.parametrize("strategy", ["gather_q", "gather_kv"])
def test_every_step_is_planned(v2: Oracle, strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode steps, and prompts in chunks that meet what is cached of them, on two ranks."""
    decode = ReferenceBackend.decode
    planned = []

    def note_lens(self: ReferenceBackend, queries: CacheQueries) -> None:
        queries.planned = queries.host_lens.tolist()

    def check_lens(self: ReferenceBackend, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        queries = arguments[3]
        assert queries.planned == queries.local_lens.tolist()
        planned.append(len(queries.planned))
        return decode(self, *arguments)

    monkeypatch.setattr(ReferenceBackend, "plan", note_lens)
    monkeypatch.setattr(ReferenceBackend, "decode", check_lens)
    options = dict(tp_size=2, dcp_size=2, ranks="threads", device="cpu", max_num_seqs=4)
    params = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
    with LLM(str(v2.path), prefill_strategy=strategy, max_num_batched_tokens=8, **options) as llm:
        llm.generate([make_prompt(21, 128), make_prompt(5, 128)], params)
    assert len(planned) > 0 and (max(planned) > 2) == (strategy == "gather_q")
