"""FlashInfer: MLA decode that is planned on the host, once a step for all layers. Prompts run in
torch's FlashAttention-2. What is used of FlashInfer is in `kernels/flashinfer.py`."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minidcp.attention.flash2 import attend_packed
from minidcp.batch import CacheQueries, OutAndLse, Varlen, offsets, ranges, upload
from minidcp.kernels.flashinfer import Library

LN2 = math.log(2.0)
# Results of split contexts: two tiles of 64 queries for each multiprocessor, 17 MiB on 132 of them.
WORKSPACE_BYTES = 64 << 20


class FlashInferBackend:
    """FlashInfer on one rank.

    `softmax_scale` multiplies the scores. `num_heads` are the heads of the DCP group.
    """

    graphs = True

    def __init__(
        self,
        library: Library,
        softmax_scale: float,
        num_heads: int,
        block_size: int,
        device: torch.device,
    ) -> None:
        self.name = f"flashinfer ({library.variant})"
        self.library = library
        self.softmax_scale = softmax_scale
        self.num_heads = num_heads
        self.block_size = block_size
        self.workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        # The block ids that all CUDA graphs read. Only one of them is planned and replayed at once.
        self.graph_blocks = torch.empty(0, dtype=torch.int32, device=device)

    def plan(self, queries: CacheQueries) -> None:
        """Share out the contexts among the multiprocessors. The wrapper holds the result."""
        if queries.planned is None:
            queries.planned = self.make_wrapper(queries)
        wrapper: Any = queries.planned
        wrapper.plan(
            metadata=self.describe(queries),
            num_heads=self.num_heads,
            head_dim_ckv=self.library.latent_dim,
            head_dim_kpe=self.library.rope_dim,
            page_size=self.block_size,
            causal=False,
            sm_scale=self.softmax_scale,
            q_data_type=torch.bfloat16,
            kv_data_type=torch.bfloat16,
            query_layout="split",
            kv_cache_layout="split",
            lse_mode="base2",
        )

    def make_wrapper(self, queries: CacheQueries) -> Any:
        """For a CUDA graph the plan has to be written where the graph reads it, each time."""
        if not queries.is_replayed:
            return self.library.wrapper(self.workspace, backend=self.library.variant)

        if len(self.graph_blocks) < queries.block_table.numel():
            # Graphs that were captured before would go on to read the old ones.
            assert len(self.graph_blocks) == 0, "the largest graph must be captured first"
            self.graph_blocks = torch.zeros_like(queries.block_table).flatten()
        num_offsets = len(queries.local_lens) + 1
        return self.library.wrapper(
            self.workspace,
            use_cuda_graph=True,
            qo_indptr=self.graph_blocks.new_zeros(num_offsets),
            kv_indptr=self.graph_blocks.new_zeros(num_offsets),
            kv_indices=self.graph_blocks,
            kv_len_arr=torch.zeros_like(queries.local_lens),
            backend=self.library.variant,
        )

    def describe(self, queries: CacheQueries) -> Any:
        """The block tables without their unused ends, one after the other, and the lengths.

        Only the block ids are on the device: what the host reads to plan is on the host.
        """
        lens = queries.host_lens
        num_rows, width = queries.block_table.shape
        num_blocks = -(-lens // self.block_size)  # of each row
        places = np.repeat(np.arange(num_rows) * width, num_blocks) + ranges(num_blocks)
        index = upload({"places": places}, queries.block_table.device)["places"]
        return self.library.make_metadata(
            qo_indptr=torch.arange(num_rows + 1, dtype=torch.int32),
            kv_indptr=torch.from_numpy(offsets(num_blocks).astype(np.int32)),
            kv_indices=queries.block_table.flatten()[index],
            kv_len_arr=torch.from_numpy(lens.astype(np.int32)),
        )

    def prepare(self, queries: CacheQueries) -> None:
        pass

    def decode(
        self,
        q_latent: Tensor,
        q_pe: Tensor,
        kv: Tensor,
        queries: CacheQueries,
        out: Tensor | None = None,
    ) -> OutAndLse:
        wrapper: Any = queries.planned
        latent_dim = self.library.latent_dim
        result, lse = wrapper.run(
            query=(q_latent, q_pe),
            kv_cache=(kv[..., :latent_dim], kv[..., latent_dim:]),
            out=out,
            return_lse=True,
        )
        # Base 2 there, natural logarithm here. FlashInfer can convert it too, but where it merges
        # the parts of a context, all threads of a row multiply the same number in place.
        return result, lse.mul_(LN2)

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, varlen: Varlen) -> OutAndLse:
        return attend_packed(q, k, v, varlen, self.softmax_scale)
