"""The contract of an attention back-end. `reference.py` is the shortest complete one."""

from typing import Protocol

from torch import Tensor

from minidcp.batch import CacheRows, Partial, Varlen


class AttentionBackend(Protocol):
    """Attention over one rank's shard of the latent cache, and among new tokens. Every `lse` is [tokens, heads]
    float32, natural logarithm, -inf where a token sees nothing; its output may then be anything. A back-end that
    computes otherwise converts at its own edge."""

    name: str  # for the log
    graphs: bool  # whether CUDA graphs can capture it: it never waits for the device

    def plan(self, rows: CacheRows) -> None:
        """Set rows.prepared to what every layer's `decode` of these rows shares; called once per step."""

    def decode(self, q_latent: Tensor, q_pe: Tensor, kv: Tensor, rows: CacheRows, out: Tensor | None = None) -> Partial:
        """Absorbed attention of B rows over this rank's shard: q_latent [B, H, kv_lora_rank] with W_UK absorbed, q_pe
        [B, H, rope] rotated, one layer's cache kv [num_blocks, block_size, kv_lora_rank + rope] -> [B, H, kv_lora_rank]
        before W_UV, and lse. The output would best be `out`; who cannot write there returns another tensor."""

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, varlen: Varlen) -> Partial:
        """MHA over packed sequences: q [Tq, H, Dqk], k [Tk, H, Dqk], v [Tk, H, Dv] -> [Tq, H, Dv], lse."""
