"""minidcp: DeepSeek-V2 decoding with tensor and decode context parallelism. Start with `models/deepseek_v2.py`."""

from minidcp.config import EngineConfig
from minidcp.llm import LLM
from minidcp.request import CompletionOutput, RequestOutput, SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "CompletionOutput", "EngineConfig", "RequestOutput", "SamplingParams", "__version__"]
