"""Numbers for the pictures, computed by the engine's planner."""

from functools import cache
from pathlib import Path

from minidcp.config import EngineConfig
from minidcp.model_config import ModelConfig
from minidcp.plan import Deployment, find_gpu

V2 = Path(__file__).parents[2] / "benchmarks" / "configs" / "deepseek-v2"


@cache
def read_v2_config() -> ModelConfig:
    return ModelConfig.from_hf(V2)


@cache
def deploy(tp_size: int, dcp_size: int, policy: str = "auto", memory: float = 0.0) -> Deployment:
    """DeepSeek-V2 on H200s, or on GPUs with more memory."""
    gpu = find_gpu(f"h200,memory={memory}" if memory else "h200")
    config = EngineConfig(str(V2), tp_size=tp_size, dcp_size=dcp_size, exchange_policy=policy)
    return Deployment(config, gpu, context=4000)


def count_received_bytes(size: int, policy: str) -> int:
    """What a rank receives from its DCP group per token and layer, with tp = dcp = size."""
    return deploy(size, size, policy, memory=1e12).count_dcp_bytes(1)
