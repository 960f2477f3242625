"""Multi-head attention over packed sequences, with LSE: our own Triton kernel.

For GPUs without FlashAttention-3. Its torch twin is `attention/reference.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minidcp.kernels.mla_decode import LOG2E


def mha_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    softmax_scale: float,
    causal: bool,
    rope: int,
) -> tuple[Tensor, Tensor]:
    """softmax(q · k · softmax_scale) · v, sequence by sequence.

    Args:
        q: [Tq, H, N + R]; k: [Tk, H, N + R]; v: [Tk, H, V]; contiguous last dims that are powers of two.
        cu_seqlens_q, cu_seqlens_k: [B + 1] int32.
        max_q: the longest query sequence.
        causal: query i sees keys [0, i] (the two sequences are then equally long).
        rope: R.

    Returns:
        out [Tq, H, V] in q's dtype (0 where there are no keys) and lse [Tq, H] float32.
    """
    tokens, heads, dim = q.shape
    out = torch.empty(tokens, heads, v.shape[2], dtype=q.dtype, device=q.device)
    lse = torch.empty(tokens, heads, dtype=torch.float32, device=q.device)
    block_m = 128
    grid = (triton.cdiv(max_q, block_m), heads, len(cu_seqlens_q) - 1)
    mha_prefill_kernel[grid](
        q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, softmax_scale * LOG2E,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *out.stride()[:2], lse.stride(0),
        CAUSAL=causal, NOPE=dim - rope, ROPE=rope, V_DIM=v.shape[2], BLOCK_M=block_m, BLOCK_N=64,
        num_warps=8, num_stages=2,
    )  # fmt: skip
    return out, lse


@triton.jit
def mha_prefill_kernel(
    q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, scale,
    q_t, q_h, k_t, k_h, v_t, v_h, out_t, out_h, lse_t,
    CAUSAL: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program attends with BLOCK_M queries of one head of one sequence."""
    h, sequence = tl.program_id(1), tl.program_id(2)
    first_q = tl.load(cu_seqlens_q + sequence).to(tl.int64)
    len_q = tl.load(cu_seqlens_q + sequence + 1) - first_q
    first_k = tl.load(cu_seqlens_k + sequence).to(tl.int64)
    len_k = tl.load(cu_seqlens_k + sequence + 1) - first_k
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    if tl.program_id(0) * BLOCK_M < len_q:
        c = tl.arange(0, NOPE)
        r = tl.arange(0, ROPE)
        d = tl.arange(0, V_DIM)
        in_q = m < len_q
        q_row = (q + (first_q + m) * q_t + h * q_h)[:, None]
        qn = tl.load(q_row + c[None, :], mask=in_q[:, None], other=0.0)
        qr = tl.load(q_row + NOPE + r[None, :], mask=in_q[:, None], other=0.0)
        top = tl.full([BLOCK_M], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, V_DIM], tl.float32)
        end = tl.minimum(len_k, (tl.program_id(0) + 1) * BLOCK_M) if CAUSAL else len_k
        for start in range(0, end, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            in_k = n < len_k
            k_row = (k + (first_k + n) * k_t + h * k_h)[:, None]
            kn = tl.load(k_row + c[None, :], mask=in_k[:, None], other=0.0)
            kr = tl.load(k_row + NOPE + r[None, :], mask=in_k[:, None], other=0.0)
            scores = tl.dot(qn, tl.trans(kn))
            scores = tl.dot(qr, tl.trans(kr), scores) * scale
            seen = in_k[None, :]
            if CAUSAL:
                seen = seen & (n[None, :] <= m[:, None])
            scores = tl.where(seen, scores, -float("inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            base = tl.where(new_top == -float("inf"), 0.0, new_top)
            decay = tl.exp2(top - base)
            p = tl.exp2(scores - base[:, None])
            total = total * decay + tl.sum(p, 1)
            v_row = (v + (first_k + n) * v_t + h * v_h)[:, None]
            values = tl.load(v_row + d[None, :], mask=in_k[:, None], other=0.0)
            acc = tl.dot(p.to(values.dtype), values, acc * decay[:, None])
            top = new_top
        empty = total == 0
        safe = tl.where(empty, 1.0, total)
        natural = tl.where(empty, -float("inf"), (top + tl.log2(safe)) * 0.6931471805599453)
        tl.store(lse + (first_q + m) * lse_t + h, natural, mask=in_q)
        out_row = (out + (first_q + m) * out_t + h * out_h)[:, None]
        result = (acc / safe[:, None]).to(out.dtype.element_ty)
        tl.store(out_row + d[None, :], result, mask=in_q[:, None])
