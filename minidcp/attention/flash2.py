"""FlashAttention-2 as torch has it, for prompts. It runs on any GPU with bf16."""

import torch
import torch.nn.functional as F
from torch import Tensor

from minidcp.batch import OutAndLse, Varlen


def attend_packed(
    q: Tensor, k: Tensor, v: Tensor, varlen: Varlen, softmax_scale: float
) -> OutAndLse:
    """`AttentionBackend.prefill` for head dims of v that are not above those of q and k."""
    v_dim = v.shape[2]
    padding = q.shape[2] - v_dim  # this operator wants one head dim for q, k and v
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q,
        k,
        F.pad(v, (0, padding)),
        varlen.cu_seqlens_q,
        varlen.cu_seqlens_k,
        max(varlen.lens_q),
        max(varlen.lens_k),
        0.0,  # dropout
        varlen.causal,
        False,  # no debug mask
        scale=softmax_scale,
    )
    # A sequence without keys gets +inf.
    lse = lse.masked_fill(lse == torch.inf, -torch.inf)
    return out[..., :v_dim], lse.transpose(0, 1)
