"""What the choices in `resolve.py` depend on: the GPUs and how they are joined, FlashAttention-3,
FlashInfer, torchrun. The driver looks once, for all ranks: their machines must be alike."""

import importlib.util
import itertools
import os
from dataclasses import dataclass

import torch

from minidcp.config import EngineConfig
from minidcp.kernels.fa3 import COMPILED_DIMS, load_operators
from minidcp.kernels.flashinfer import LEAST_CAPABILITY, find_dims_obstacle, load_library
from minidcp.model_config import ModelConfig

MAX_REASON = 300  # characters of a library's error
INSTALL_FLASHINFER = "pip install 'minidcp[flashinfer]'"


@dataclass(frozen=True)
class Machine:
    """What the choices depend on. `detect_machine` looks; the planner makes one up."""

    num_gpus: int = 0
    capability: tuple[int, int] = (0, 0)  # (9, 0) is Hopper
    has_peer_access: bool = False  # every GPU can read the memory of every other
    fa3_error: str = ""  # why FlashAttention-3 cannot be loaded
    flashinfer_error: str = ""  # what FlashInfer lacks: "is not installed", for example
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
    fa3_error = find_fa3_error(config, model, capability)
    pairs = itertools.permutations(range(min(num_gpus, config.tp_size)), 2)
    return Machine(
        num_gpus=num_gpus,
        capability=capability,
        has_peer_access=all(torch.cuda.can_device_access_peer(gpu, peer) for gpu, peer in pairs),
        fa3_error=fa3_error,
        flashinfer_error=find_flashinfer_error(
            config,
            model,
            capability,
            fa3_error,
            shares_gpus=(local_size or config.tp_size) > num_gpus,
        ),
        torchrun_world_size=world_size,
        torchrun_local_size=local_size,
    )


def find_fa3_error(config: EngineConfig, model: ModelConfig, capability: tuple[int, int]) -> str:
    """Why FlashAttention-3 cannot be loaded; empty if it can, or if it is ruled out anyway."""
    is_wanted = config.attention_backend in ("auto", "fa3") and config.dtype != "float32"
    if not is_wanted or not fits_fa3(model, capability):
        return ""
    try:
        load_operators()
    except Exception as error:  # a library can fail in any way: another one may be loaded already
        return describe_failure(error)
    return ""


def find_flashinfer_error(
    config: EngineConfig,
    model: ModelConfig,
    capability: tuple[int, int],
    fa3_error: str,
    shares_gpus: bool = False,
) -> str:
    """What FlashInfer lacks; empty if it can be loaded, or if it is ruled out or not wanted anyway.

    Its kernel is compiled here if need be, before any rank starts.
    """
    latent_dim = model.kv_lora_rank
    rope_dim = model.qk_rope_head_dim
    asked = config.attention_backend
    is_wanted = asked == "flashinfer" or (
        asked == "auto" and (fa3_error or not fits_fa3(model, capability))
    )
    is_ruled_out = config.dtype == "float32" or config.speculative_method == "mtp" or shares_gpus
    if not is_wanted or is_ruled_out or capability < LEAST_CAPABILITY:
        return ""
    if find_dims_obstacle(latent_dim, rope_dim, capability):
        return ""
    if importlib.util.find_spec("flashinfer") is None:
        return f"is not installed; get it with: {INSTALL_FLASHINFER}"
    try:
        load_library(latent_dim, rope_dim, capability)
    except Exception as error:  # a compiler can fail in any way too
        return f"cannot be loaded ({describe_failure(error)})"
    return ""


def describe_failure(error: BaseException) -> str:
    """In one line, of the many that a compiler may write: the first that tells of an error."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = str(cause).strip().splitlines() or [repr(cause)]
    telling = [line for line in lines if "error" in line.lower() or "not found" in line.lower()]
    return [*telling, *lines][0].strip()[:MAX_REASON]


def fits_fa3(model: ModelConfig, capability: tuple[int, int]) -> bool:
    """Whether FlashAttention-3 can run the model on such a GPU, if it is installed."""
    return capability[0] == 9 and fa3_dims(model) in COMPILED_DIMS


def fa3_dims(model: ModelConfig) -> tuple[int, int, int, int]:
    """The dims that FlashAttention-3 must be compiled for, as in COMPILED_DIMS."""
    return (model.kv_lora_rank, model.qk_rope_head_dim, model.qk_head_dim, model.v_head_dim)
