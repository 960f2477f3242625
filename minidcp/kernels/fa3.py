"""FlashAttention-3's two operators, from whichever package is installed, with named arguments.

This is not our own kernel (that is `mla_decode_hopper.py`) and does not decide what to pass: the
back-end in `attention/fa3.py` does."""

import importlib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VLLM_LIBRARY = "_vllm_fa3_C.abi3.so"

LATENT_DIM = 512  # of qv and v in decode
ROPE_DIM = 64  # of q and k in decode
# What the packages are compiled for: kv_lora_rank and the rope dim in decode, then the head dims of
# q and k, and of v, in prefill. DeepSeek's models have the first, GLM-4.7-Flash has the second.
COMPILED_DIMS = ((LATENT_DIM, ROPE_DIM, 192, 128), (LATENT_DIM, ROPE_DIM, 256, 256))


@dataclass(frozen=True)
class Operators:
    """FA3's operators `fwd` and `get_scheduler_metadata`, which take positional arguments.

    The two packages agree on the arguments, except for the ones that are attributes here.

    Attributes:
        source: name of the package.
        ops: the namespace in torch.ops.
        chunk: `attention_chunk`, which vLLM's copy does not have; 0 is off.
        tail: arguments of `fwd` that only vLLM's copy has: `s_aux` (attention sinks), and
            `cp_world_size`, `cp_rank` and `cp_tot_seqused_k` (vLLM's context parallelism). All off.
    """

    source: str
    ops: Any
    chunk: tuple[int, ...] = ()
    tail: tuple[object, ...] = ()

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softmax_scale: float,
        causal: bool,
        max_seqlen_q: int,
        max_seqlen_k: int,
        *,
        qv: Tensor | None = None,
        out: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        seqused_k: Tensor | None = None,
        page_table: Tensor | None = None,
        scheduler_metadata: Tensor | None = None,
        num_splits: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """softmax((q · k + qv · v) · softmax_scale) · v and its LSE, in one of two forms.

        Paged (decode): q [B, S, H, R] and qv [B, S, H, C] attend to a cache k [blocks, block_size,
        KV heads, R] and v [..., C] through page_table [B, W]; seqused_k [B] are the lengths. Gives
        out [B, S, H, C], written into `out` if given, and lse [B, H, S].

        Packed (prefill): q [T, H, D], k and v [S, H, ...] hold all sequences one after the other;
        sequence i is rows cu_seqlens[i] to cu_seqlens[i + 1]. Gives out [T, H, DV] and lse [H, T].

        A sequence is split into at most num_splits parts, so that several programs share it. FA3
        allocates a float32 copy of `out` for each part. 0: FA3 chooses how many.

        The LSE is float32, a natural logarithm; a sequence without keys may get -inf or +inf.
        """
        result, lse, *_ = self.ops.fwd(
            q,
            k,
            v,
            None,  # k_new, to be appended to the cache: it is there already
            None,  # v_new
            qv,
            out,
            cu_seqlens_q,
            cu_seqlens_k,
            None,  # cu_seqlens_k_new
            None,  # seqused_q
            seqused_k,
            max_seqlen_q,
            max_seqlen_k,
            page_table,
            None,  # kv_batch_idx
            None,  # leftpad_k
            None,  # rotary_cos
            None,  # rotary_sin
            None,  # seqlens_rotary
            None,  # q_descale
            None,  # k_descale
            None,  # v_descale
            softmax_scale,
            causal,
            -1,  # window_size_left: no window
            -1,  # window_size_right
            *self.chunk,
            0.0,  # softcap: off
            True,  # rotary_interleaved: not used, since there is no rotary_cos
            scheduler_metadata,
            num_splits,
            None,  # pack_gqa: FA3 chooses
            0,  # sm_margin: use all multiprocessors
            *self.tail,
        )
        return result, lse

    def schedule_decode(
        self,
        seqused_k: Tensor,
        max_seqlen_k: int,
        num_heads: int,
        page_size: int,
        num_splits: int,
    ) -> Tensor:
        """`scheduler_metadata` for `forward` in decode: one query row for each of seqused_k [B].

        num_splits is as in `forward`.
        """
        metadata: Tensor = self.ops.get_scheduler_metadata(
            len(seqused_k),  # batch_size
            1,  # max_seqlen_q
            max_seqlen_k,
            num_heads,
            1,  # num_heads_kv: all heads share the latent
            ROPE_DIM,  # headdim
            LATENT_DIM,  # headdim_v
            torch.bfloat16,
            seqused_k,
            None,  # cu_seqlens_q
            None,  # cu_seqlens_k
            None,  # cu_seqlens_k_new
            None,  # seqused_q
            None,  # leftpad_k
            page_size,
            0,  # max_seqlen_k_new
            False,  # causal
            -1,  # window_size_left: no window
            -1,  # window_size_right
            *self.chunk,
            False,  # has_softcap
            num_splits,
            None,  # pack_gqa: FA3 chooses
            0,  # sm_margin: use all multiprocessors
        )
        return metadata


def load_operators() -> Operators:
    """The operators of the official `flash_attn_interface` or else of the copy inside vLLM.

    vLLM's one shared object is loaded without importing vLLM: the one that `minidcp fetch-fa3` has
    taken out of its wheel, or that of an installed vLLM. Never load both packages: their symbols
    collide. Raises ImportError, saying what is missing, if neither is installed.
    """
    if importlib.util.find_spec("flash_attn_interface") is not None:
        importlib.import_module("flash_attn_interface")  # registers the operators
        return Operators("flash_attn_interface", torch.ops.flash_attn_3, chunk=(0,))

    library = find_vllm_library()
    if library is None:
        raise ImportError("neither flash_attn_interface nor a vLLM with FlashAttention-3 is there")
    return load_vllm_library(library)


def load_vllm_library(library: Path) -> Operators:
    torch.ops.load_library(str(library))
    return Operators("vllm.vllm_flash_attn", torch.ops._vllm_fa3_C, tail=(None, 1, 0, None))


def find_vllm_library() -> Path | None:
    """The shared object with vLLM's copy of FA3, if it has been fetched or vLLM is installed."""
    fetched = locate_fetched_library()
    if fetched.exists():
        return fetched
    spec = importlib.util.find_spec("vllm")
    if spec is None:
        return None
    for folder in spec.submodule_search_locations or []:
        for file in Path(folder).glob("vllm_flash_attn/_vllm_fa3_C*.so"):
            return file
    return None


def locate_fetched_library() -> Path:
    """Where `minidcp fetch-fa3` puts the shared object that fits the installed torch."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "minidcp" / f"fa3-torch-{name_torch_release()}" / VLLM_LIBRARY


def name_torch_release() -> str:
    """The part of torch's version for which C++ is compiled: 2.11, for example."""
    return ".".join(torch.__version__.split(".")[:2])
