"""What the choices in `resolve.py` depend on: the GPUs and how they are joined, FlashAttention-3,
torchrun. The driver looks once, for all ranks: their machines must be alike."""

import itertools
import os
from dataclasses import dataclass

import torch

from minidcp.config import EngineConfig
from minidcp.kernels.fa3 import COMPILED_DIMS, load_operators
from minidcp.model_config import ModelConfig


@dataclass(frozen=True)
class Machine:
    """What the choices depend on. `detect_machine` looks; the planner makes one up."""

    num_gpus: int = 0
    capability: tuple[int, int] = (0, 0)  # (9, 0) is Hopper
    has_peer_access: bool = False  # every GPU can read the memory of every other
    fa3_error: str = ""  # why FlashAttention-3 cannot be loaded
    torchrun_world_size: int = 0  # 0 where torchrun did not start this process
    torchrun_local_size: int = 0  # how many of its processes are on this node


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def detect_machine(config: EngineConfig, model: ModelConfig) -> Machine:
    """This machine, as far as the configuration and the model make it matter."""
    world_size = 0
    local_size = 0
    if under_torchrun():
        world_size = int(os.environ["WORLD_SIZE"])
        local_size = int(os.environ["LOCAL_WORLD_SIZE"])
    if config.device == "cpu" or not torch.cuda.is_available():
        return Machine(torchrun_world_size=world_size, torchrun_local_size=local_size)

    num_gpus = torch.cuda.device_count()
    capability = torch.cuda.get_device_capability()
    pairs = itertools.permutations(range(min(num_gpus, config.tp_size)), 2)
    return Machine(
        num_gpus=num_gpus,
        capability=capability,
        has_peer_access=all(torch.cuda.can_device_access_peer(gpu, peer) for gpu, peer in pairs),
        fa3_error=find_fa3_error(config, model, capability),
        torchrun_world_size=world_size,
        torchrun_local_size=local_size,
    )


def find_fa3_error(config: EngineConfig, model: ModelConfig, capability: tuple[int, int]) -> str:
    """Why FlashAttention-3 cannot be loaded; empty if it can, or if nothing else allows it."""
    is_wanted = config.attention_backend in ("auto", "fa3") and config.dtype != "float32"
    if not is_wanted or capability[0] != 9 or fa3_dims(model) not in COMPILED_DIMS:
        return ""
    try:
        load_operators()
    except Exception as error:  # a library can fail in any way: another one may be loaded already
        return str(error) or repr(error)
    return ""


def fa3_dims(model: ModelConfig) -> tuple[int, int, int, int]:
    """The dims that FlashAttention-3 must be compiled for, as in COMPILED_DIMS."""
    return (model.kv_lora_rank, model.qk_rope_head_dim, model.qk_head_dim, model.v_head_dim)
