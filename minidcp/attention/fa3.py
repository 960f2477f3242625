"""FlashAttention-3: decode with q 64 + qv 512 over the paged latent cache, prefill in MHA form. The
operators, and what each positional argument is, are in `kernels/fa3.py`."""

import torch
from torch import Tensor

from minidcp.batch import CacheQueries, OutAndLse, Varlen
from minidcp.kernels.fa3 import LATENT_DIM, Operators

# Of the partial outputs of split sequences, in one decode.
MAX_SPLIT_BYTES = 256 << 20
MAX_SPLITS = 64  # as many as FA3 chooses at most, about


class FA3Backend:
    """FlashAttention-3 on one rank.

    `softmax_scale` multiplies the scores. `num_heads` are the heads of the DCP group.
    """

    graphs = True

    def __init__(
        self, operators: Operators, softmax_scale: float, num_heads: int, block_size: int
    ) -> None:
        self.name = f"fa3 from {operators.source}"
        self.operators = operators
        self.softmax_scale = softmax_scale
        self.num_heads = num_heads
        self.block_size = block_size

    def plan(self, queries: CacheQueries) -> None:
        pass

    def prepare(self, queries: CacheQueries) -> None:
        """Compute the scheduler's metadata once for all layers: it saves 2 to 5 % of decode."""
        queries.prepared = self.operators.schedule_decode(
            queries.local_lens,
            max_seqlen_k=queries.block_table.shape[1] * self.block_size,
            num_heads=self.num_heads,
            page_size=self.block_size,
            num_splits=self.limit_splits(len(queries.local_lens)),
        )

    def limit_splits(self, num_rows: int) -> int:
        """`num_splits` for a decode of so many rows.

        FA3 would choose as if the longest sequence was alone, and allocate as many partial outputs
        for every row: 7 GB for 512 rows of 128 heads. Many rows keep a GPU busy without splits, so
        they get as many as fit into MAX_SPLIT_BYTES.
        """
        bytes_per_split = num_rows * self.num_heads * LATENT_DIM * torch.float32.itemsize
        num_splits = MAX_SPLIT_BYTES // bytes_per_split
        return 0 if num_splits >= MAX_SPLITS else max(1, num_splits)

    def decode(
        self,
        q_latent: Tensor,
        q_pe: Tensor,
        kv: Tensor,
        queries: CacheQueries,
        out: Tensor | None = None,
    ) -> OutAndLse:
        assert isinstance(queries.prepared, Tensor)
        # FA3 calls the rotary part k and the latent v. Both are views of the same cache rows.
        k = kv[:, :, None, LATENT_DIM:]  # [num_blocks, block_size, 1, rope]
        v = kv[:, :, None, :LATENT_DIM]  # [num_blocks, block_size, 1, kv_lora_rank]
        result, lse = self.operators.forward(
            q_pe[:, None],  # [B, 1, H, rope]
            k,
            v,
            self.softmax_scale,
            causal=False,
            max_seqlen_q=1,
            max_seqlen_k=queries.block_table.shape[1] * self.block_size,
            qv=q_latent[:, None],  # [B, 1, H, kv_lora_rank]
            out=None if out is None else out[:, None],
            seqused_k=queries.local_lens,
            page_table=queries.block_table,
            scheduler_metadata=queries.prepared,
            num_splits=self.limit_splits(len(q_latent)),
        )
        return result[:, 0], lse[..., 0]

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, varlen: Varlen) -> OutAndLse:
        out, lse = self.operators.forward(
            q,
            k,
            v,
            self.softmax_scale,
            causal=varlen.causal,
            max_seqlen_q=max(varlen.lens_q),
            max_seqlen_k=max(varlen.lens_k),
            cu_seqlens_q=varlen.cu_seqlens_q,
            cu_seqlens_k=varlen.cu_seqlens_k,
        )
        if not varlen.causal:
            # Some builds write +inf for a sequence without keys.
            lse = lse.masked_fill(lse == torch.inf, -torch.inf)
        return out, lse.transpose(0, 1)
