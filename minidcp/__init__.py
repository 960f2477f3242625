"""minidcp: DeepSeek-V2, V3 and relatives with tensor and decode context parallelism.
Start reading with `config.py`; `docs/architecture.md` has the whole order."""

from minidcp.config import EngineConfig
from minidcp.llm import LLM
from minidcp.request import CompletionOutput, RequestOutput, SamplingParams
from minidcp.structured_outputs import StructuredOutputsParams

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "CompletionOutput",
    "EngineConfig",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "__version__",
]
