"""What the user asked for, checked before anything starts: every error that needs no machine and no checkpoint to be
found is raised here, as a ValueError that names its flag. What the checkpoint is: `model_config.py`; read that next."""

from dataclasses import Field, dataclass, field, fields
from typing import Any, get_args


def option(default: Any, help: str, *aliases: str, least: float | None = None, choices: tuple[Any, ...] = ()) -> Any:
    """A field of Options: its default, its --help, what users of other engines type for it, which values it takes."""
    return field(default=default, metadata=dict(help=help, aliases=aliases, least=least, choices=choices))


def choice(help: str, *values: str | int, default: int | None = None) -> Any:
    """A field of Options that takes one of `values`, by default the first."""
    return option(default or values[0], help, choices=values)


def flag(name: str) -> str:
    """The command-line spelling of a config field: `tp_size` -> `--tp-size`."""
    return "--" + name.replace("_", "-")


def require(ok: object, message: str) -> None:
    if not ok:
        raise ValueError(message)


@dataclass(frozen=True)
class Options:
    """Fields that are command-line flags, by their names with underscores; checked one by one."""

    def __post_init__(self) -> None:
        for f, kinds in self.options():
            value, choices, least = getattr(self, f.name), f.metadata["choices"], f.metadata["least"]
            ok = type(value) in kinds or (type(value) is int and float in kinds)
            given = f"{flag(f.name)} {value!r}"
            require(ok, f"{given}: must be a {kinds[0].__name__}")
            require(not choices or value in choices, f"{given}: must be one of {', '.join(map(str, choices))}")
            require(least is None or value is None or value >= least, f"{given}: must be at least {least}")

    @classmethod
    def options(cls) -> list[tuple[Field[Any], tuple[type, ...]]]:
        """Every field that is a flag, and the types of its values."""
        return [(f, get_args(f.type) or (f.type,)) for f in fields(cls) if f.metadata]


@dataclass(frozen=True)
class EngineConfig(Options):
    """What a user can choose of the engine. A ValueError names the flag, the value and what would work."""

    model: str
    tp_size: int = option(1, "ranks that share the model", "--tensor-parallel-size", "-tp", least=1)
    dcp_size: int = option(1, "ranks per KV cache; divide --tp-size", "--decode-context-parallel-size", "-dcp", least=1)
    dcp_comm_backend: str = choice("how partial attention is exchanged", "auto", "p2p", "a2a", "ag_rs")
    attention_backend: str = choice("auto is fa3, else triton; reference on CPUs", "auto", "fa3", "triton", "reference")
    comm: str = choice("collectives; symmetric: one node, gloo: CPUs", "auto", "symmetric", "nccl", "gloo")
    exchange_policy: str = choice("W_UK and W_UV behind the exchange or before, or by batch", "auto", "wide", "narrow")
    narrow_threshold: int = option(16, "rows from which auto exchanges narrow", least=1)
    q_proj: str = choice("replicated: every rank has all q of its DCP group", "sharded", "replicated")
    prefill_strategy: str = choice("how prefill sees cached context; auto: the faster", "auto", "gather_kv", "gather_q")
    device: str = choice("where to run", "auto", "cpu", "cuda")
    dtype: str = choice("auto is bfloat16 on GPUs, float32 on CPUs", "auto", "float32", "bfloat16")
    ranks: str = choice("auto is processes; a thread for 1 CPU rank", "auto", "threads", "processes", "torchrun")
    # FA3 lets NaN leak from the unused slots of larger blocks.
    block_size: int = choice("tokens per block and rank", 1, 2, 4, 8, 16, 32, default=16)
    num_blocks: int | None = option(None, "KV cache blocks; default: what fits", "--num-gpu-blocks-override", least=1)
    max_model_len: int | None = option(None, "tokens of a request; default: the model's", "--context-length", least=1)
    max_num_seqs: int = option(256, "requests that run at once", "--max-running-requests", least=1)
    max_num_batched_tokens: int | None = option(None, "tokens per step; longer prompts are computed in chunks", least=1)
    gpu_memory_utilization: float = option(0.9, "share of GPU memory to use", "--mem-fraction-static")
    mixed_steps: bool = option(True, "decode rows and prompt chunks in one step")
    prefix_cache: bool = option(True, "reuse the KV cache of equal prompt beginnings")
    cuda_graph: bool = option(True, "replay decode steps as CUDA graphs")
    load_format: str = choice("dummy: random weights, to measure with a config.json alone", "auto", "dummy")

    def __post_init__(self) -> None:
        super().__post_init__()
        share, batched, seqs = self.gpu_memory_utilization, self.max_num_batched_tokens, self.max_num_seqs
        require(0 < share <= 1, f"--gpu-memory-utilization {share}: must be in (0, 1]")
        wanted = f"--max-num-batched-tokens {batched} must be at least --max-num-seqs {seqs}"
        require(batched is None or seqs <= batched, f"{wanted}: every running request decodes one token per step")
        tp, dcp = self.tp_size, self.dcp_size
        require(tp % dcp == 0, f"--dcp-size {dcp} must divide --tp-size {tp}; possible: {divisors(tp)}")

    def exchanges_narrow(self, num_rows: int) -> bool:
        """Whether that many rows send raw q and have W_UV applied before the exchange. Narrow moves 3.4 times fewer
        bytes and multiplies for every head of the DCP group: from a batch of about 16 on the better trade."""
        if self.exchange_policy == "auto":
            return self.needs_group_heads and num_rows >= self.narrow_threshold
        return self.dcp_size > 1 and self.exchange_policy == "narrow"

    @property
    def replicates_q(self) -> bool:
        """Whether every rank computes the decode rows' q for all heads of its DCP group, and gathers none."""
        return self.dcp_size > 1 and self.q_proj == "replicated"

    @property
    def needs_group_heads(self) -> bool:
        """Whether W_UK and W_UV of all the DCP group's heads are ever used, and so must be held."""
        auto = self.exchange_policy == "auto" and self.max_num_seqs >= self.narrow_threshold
        return self.replicates_q or (self.dcp_size > 1 and (auto or self.exchange_policy == "narrow"))


@dataclass(frozen=True)
class ServeConfig(Options):
    """Everything a user can choose of the HTTP server; times are in seconds."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on; 0 lets the system choose")
    served_model_name: str | None = option(None, "the model's name in the API; default: MODEL")
    api_key: str | None = option(None, "what clients must send as bearer token; default: $MINIDCP_API_KEY")
    max_num_queued_requests: int = option(4096, "requests that may wait; beyond it clients get 503", least=0)
    request_timeout: float = option(0.0, "after which a request is aborted; 0: never", least=0)
    max_body_bytes: int = option(16 << 20, "of a request", least=1)
    shutdown_timeout: float = option(30.0, "for requests to end after SIGTERM; then they are aborted", least=0)
    engine_timeout: float = option(120.0, "without progress after which /health answers 503", least=1)
    sse_keep_alive_interval: float = option(0.0, "of comments in silent streams; 0: none", least=0)


def divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
