"""Compiles our kernels for a GPU that need not be here: `python compile_kernels.py 8.0`, with
`--all` for every tile of the experts. The functions that launch them are called with tensors on the
CPU; each launch compiles down to machine code, and stops there. Prints a line for each kernel, with
the shared memory that it takes; what fails raises."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from minidcp.kernels import DeviceProperties
from minidcp.kernels.absorb import absorb_query
from minidcp.kernels.dense import multiply, norm_and_multiply
from minidcp.kernels.experts import run_experts
from minidcp.kernels.fp8 import BLOCK, E4M3, Fp8Stack, Fp8Tensor, quantize
from minidcp.kernels.kv_store import NewLatents, store_latents
from minidcp.kernels.linear import multiply_by_head
from minidcp.kernels.mailbox import Mailbox, gather_mail, merge_mail, norm_mail
from minidcp.kernels.meeting import Meeting
from minidcp.kernels.merge import merge_partials
from minidcp.kernels.mla_decode import mla_decode
from minidcp.kernels.norm import rms_norm
from minidcp.kernels.peer import merge_peers, read_peers, sum_peers
from minidcp.kernels.peer_norm import norm_peers, norm_shared_rows
from minidcp.kernels.route import route
from minidcp.kernels.tiles import list_tiles
from minidcp.kernels.tokens import read_tokens
from minidcp.resolve import FP8_CAPABILITY

# Bytes of shared memory that one program can have, by capability, from CUDA's programming guide.
SHARED_MEMORY = {
    (8, 0): 163 << 10,
    (8, 6): 99 << 10,
    (8, 9): 99 << 10,
    (9, 0): 227 << 10,
    (10, 0): 227 << 10,
    (12, 0): 99 << 10,
}


def compile_for(capability: tuple[int, int]) -> None:
    """From here on launches compile for this capability."""
    shared_memory = SHARED_MEMORY[capability]
    properties = DeviceProperties(capability, 128, shared_memory)
    for module in list(sys.modules.values()):
        if module.__name__.startswith("minidcp.kernels"):
            for name, replacement in (
                ("get_device_properties", lambda: properties),
                ("use_triton", lambda x: True),
                ("cublas_has_blocks", lambda: False),  # it has no CPU for that
            ):
                if hasattr(module, name):
                    setattr(module, name, replacement)

    major, minor = capability
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 10 * major + minor, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    triton.runtime.driver.set_active(driver)
    run = JITFunction.run
    seen = set()

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        shared = compiled.metadata.shared
        name = self.fn.__name__
        assert shared <= shared_memory, f"{name} takes {shared} bytes of shared memory: {options}"
        if compiled.hash not in seen:
            seen.add(compiled.hash)
            print(f"{name} {shared}", flush=True)
        return compiled

    JITFunction.run = compile_only


def bf16(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16)


def fp32(*shape: int) -> torch.Tensor:
    return torch.empty(*shape)


def int32(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.int32)


def launch_layers(fp8: bool) -> None:
    """What every layer launches beside its experts, in the shape of DeepSeek-V2 at tp=dcp=8."""
    x = bf16(32, 5120)
    rms_norm(x, bf16(5120), 1e-6)
    rms_norm(bf16(32, 8, 5120), bf16(5120), 1e-6, x, fp32(32, 8))
    if fp8:
        rms_norm(x, bf16(5120), 1e-6, x, quantizes=True)
        quantize(x)

    q_pe = bf16(32, 16, 192)[..., 128:]
    new = NewLatents(bf16(32, 576), bf16(512), 1e-6, fp32(32, 64), bf16(9, 16, 576), int32(32))
    store_latents(new, q_pe)
    w_uk = bf16(16, 256, 512)[:, 128:]
    for tokens in (1, 16, 32):
        few = new._replace(
            kv=new.kv[:tokens], cos_sin=new.cos_sin[:tokens], slot_mapping=new.slot_mapping[:tokens]
        )
        absorb_query(bf16(tokens, 16, 192), w_uk, few, bf16(tokens, 16, 576))
    multiply_by_head(bf16(1, 1, 5120), bf16(1, 1536, 5120))
    norm_and_multiply(bf16(1, 1536), bf16(1536), 1e-6, bf16(3072, 1536))
    for tokens in (1, 16, 64):
        multiply_by_head(bf16(tokens, 16, 128), bf16(16, 512, 128))
    for dim in (128, 512):
        merge_partials(bf16(8, 32, 16, dim), fp32(8, 32, 16))
    merge_partials(fp32(8, 32, 16, 512), fp32(8, 32, 16), dtype=torch.bfloat16)
    merge_partials(bf16(8, 32, 128, 512), fp32(8, 32, 128), only=3)

    v2 = SimpleNamespace(
        num_experts_per_tok=6, norm_topk_prob=False, sigmoid_router=False,
        routed_scaling_factor=16.0, n_group=8, topk_group=3,
    )  # fmt: skip
    v3 = SimpleNamespace(**vars(v2) | dict(num_experts_per_tok=8, norm_topk_prob=True))
    route(fp32(32, 160), v2, 2)  # type: ignore[arg-type]
    route(fp32(32, 256), v3, 1, fp32(256))  # type: ignore[arg-type]
    read_tokens(int32(32), torch.zeros(9, 4, dtype=torch.int64), int32(32))


def launch_decode() -> None:
    for heads in (16, 128):
        for tokens in (1, 128):  # in parts, and whole
            mla_decode(
                bf16(tokens, heads, 512), bf16(tokens, heads, 64), bf16(99, 16, 576),
                int32(tokens, 64), int32(tokens), 0.1,
            )  # fmt: skip


def launch_experts(fp8: bool, every_tile: bool) -> None:
    """In V2-Lite's shape, whose tiles were measured; and with every tile in one by rule, too.

    Prompts have other kernels for narrow experts.
    """
    shapes = [(66, 8, 2048, 1408), (66, 8, 2048, 192), (12, 4, 1024, 512)]
    for num_experts, top_k, hidden, inter in shapes if every_tile else shapes[:2]:
        sizes = {4096} if inter == 192 else {1, 16, 4096}
        if every_tile:
            tiles_up_to = list_tiles(num_experts, top_k, hidden, inter, 1 if fp8 else 2)
            sizes |= {min(size, 4096) for size in tiles_up_to}
        for tokens in sorted(sizes):
            gate_up: Any = bf16(num_experts, 2 * inter, hidden)
            down: Any = bf16(num_experts, hidden, inter)
            if fp8:
                gate_up = fp8_stack(*gate_up.shape)
                down = fp8_stack(*down.shape)
            ids = int32(tokens, top_k)
            run_experts(bf16(tokens, hidden), gate_up, down, fp32(tokens, top_k), ids).sum()


def fp8_stack(num_experts: int, rows: int, width: int) -> Fp8Stack:
    num_blocks = width // BLOCK
    values = torch.empty(num_experts, num_blocks, rows, BLOCK, dtype=E4M3)
    return Fp8Stack(values, fp32(num_experts, num_blocks, rows))


def launch_dense_fp8() -> None:
    weight = Fp8Tensor(torch.empty(2048, 1536, dtype=E4M3), fp32(12, 2048))
    for tokens in (1, 16, 64, 256):
        multiply(bf16(tokens, 1536), weight)


def launch_collectives(fp8: bool) -> None:
    pointers = torch.zeros(8, dtype=torch.int64)
    meeting = Meeting(3, pointers, int32(512), 256)
    read_peers(meeting, pointers, 1536, 0, bf16(32, 8, 192))
    sum_peers(meeting, pointers, 5120, 0, bf16(32, 5120))
    for dim in (128, 512):
        merge_peers(
            meeting,
            pointers,
            1 << 20,
            fp32(32, 128),
            fp32(32, 128),
            bf16(32, 16, dim),
            fp32(32, 16),
        )
    x = bf16(32, 5120)
    norm_peers(meeting, pointers, x, None, None, x, bf16(5120), 1e-6, False)
    norm_peers(meeting, pointers, bf16(32, 8, 5120), fp32(32, 8), x, x, bf16(5120), 1e-6, False)
    for quantizes in (False, True) if fp8 else (False,):
        norm_shared_rows(meeting, pointers, pointers, x, x, 250, bf16(5120), 1e-6, quantizes)

    mailbox = Mailbox(3, (pointers, pointers), 256)
    gather_mail(mailbox, pointers, bf16(2, 16 * 192), bf16(2, 8, 16 * 192))
    x = bf16(2, 5120)
    norm_mail(mailbox, pointers, x, None, x, bf16(5120), 1e-6, False)
    norm_mail(mailbox, pointers, bf16(2, 8, 5120), fp32(2, 8), x, bf16(5120), 1e-6, False)
    for dim in (128, 512):
        out = bf16(2, 16, dim)
        merge_mail(mailbox, pointers, bf16(2, 128, dim), fp32(2, 128), out, fp32(2, 16))


def main() -> None:
    major, minor = map(int, sys.argv[1].split("."))
    every_tile = "--all" in sys.argv
    compile_for((major, minor))
    fp8 = (major, minor) >= FP8_CAPABILITY
    launch_layers(fp8)
    launch_decode()
    launch_collectives(fp8)
    launch_experts(False, every_tile)
    if fp8:
        launch_dense_fp8()
        launch_experts(True, every_tile)


if __name__ == "__main__":
    main()
