"""What the user asks for, checked before anything starts. Every error that can be found without a
machine and without a checkpoint is raised here, as a ValueError that names its flag. What "auto"
means is decided in `resolve.py`. Next: `model_config.py`."""

import math
import re
import reprlib
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from itertools import islice
from types import UnionType
from typing import Any, get_args, get_origin


def option(
    default: Any,
    help: str,
    *aliases: str,
    least: float | None = None,
    choices: tuple[Any, ...] = (),
) -> Any:
    """A field of Options that is a command-line flag, and an argument by keyword.

    Args:
        help: what --help says about it.
        aliases: what users of other engines type for it.
        least: the smallest value that it takes.
        choices: the only values that it takes; any if empty.
    """
    metadata = {"help": help, "aliases": aliases, "least": least, "choices": choices}
    return field(default=default, metadata=metadata, kw_only=True)


def choice(help: str, *values: str) -> Any:
    """An option that takes one of `values`. The first is the default."""
    return option(values[0], help, choices=values)


def flag(name: str) -> str:
    """The command-line spelling of a config field: `tp_size` -> `--tp-size`."""
    return "--" + name.replace("_", "-")


def require(ok: object, message: str) -> None:
    """Raise a ValueError with this message unless `ok`."""
    if not ok:
        raise ValueError(message)


MAX_QUOTE = 300  # characters of a value in an error message


class ShortRepr(reprlib.Repr):
    """`repr`, cut short: an error message quotes a value, and clients send megabytes."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlong = 80
        self.maxstring = 200
        self.maxlevel = 3

    def repr(self, x: object) -> str:
        """At most `MAX_QUOTE` characters: what is nested has a limit for each of its parts only."""
        text = super().repr(x)
        return text if len(text) <= MAX_QUOTE else f"{text[:MAX_QUOTE]}..."

    def repr_dict(self, x: Mapping[Any, Any], level: int) -> str:
        """In the order of the dict. reprlib sorts all the keys, to show four of them."""
        if len(x) <= self.maxdict:
            return super().repr_dict(dict(x), level)
        shown = super().repr_dict(dict(islice(x.items(), self.maxdict)), level)
        return f"{shown[:-1]}, ...}}"


shorten = ShortRepr().repr


@dataclass(frozen=True)
class Options:
    """Fields that are command-line flags. Each is checked by itself when one is made."""

    def __post_init__(self) -> None:
        for option, types in self.options():
            value = getattr(self, option.name)
            given = f"{flag(option.name)} {value!r}"
            is_of_type = type(value) in types or (type(value) is int and float in types)
            require(is_of_type, f"{given}: must be a {types[0].__name__}")

            choices = option.metadata["choices"]
            if choices:
                possible = ", ".join(map(str, choices))
                require(value in choices, f"{given}: must be one of {possible}")

            least = option.metadata["least"]
            if least is not None and value is not None:
                require(value >= least, f"{given}: must be at least {least}")

    @classmethod
    def options(cls) -> list[tuple[Field[Any], tuple[type, ...]]]:
        """Every field that is a flag, and the types that its value may have."""
        return [(f, find_types(f.type)) for f in fields(cls) if f.metadata]


def find_types(annotation: Any) -> tuple[type, ...]:
    """The classes that an annotation allows."""
    if isinstance(annotation, UnionType):
        return tuple(get_origin(part) or part for part in get_args(annotation))
    return (get_origin(annotation) or annotation,)


@dataclass(frozen=True)
class EngineConfig(Options):
    """What a user can choose about the engine.

    Raises ValueError, naming the flag, the value and what would work.
    """

    model: str

    # Ranks and how they speak to each other.
    tp_size: int = option(
        1, "number of ranks that share the model", "--tensor-parallel-size", "-tp", least=1
    )
    dcp_size: int = option(
        1,
        "number of ranks that share one KV cache, of which there are tp/dcp copies",
        "--decode-context-parallel-size",
        "-dcp",
        least=1,
    )
    ranks: str = choice(
        "what ranks are; auto: torchrun's processes under torchrun, a thread for one rank on a "
        "CPU, else processes",
        "auto",
        "threads",
        "processes",
        "torchrun",
    )
    comm: str = choice(
        "collectives; auto: gloo on CPUs, symmetric (memory) on GPUs of one node that can read "
        "each other's memory, else nccl",
        "auto",
        "symmetric",
        "nccl",
        "gloo",
    )
    dcp_comm_backend: str = choice(
        "how ranks merge their partial attention; auto: p2p with symmetric memory, else a2a",
        "auto",
        "p2p",
        "a2a",
        "ag_rs",
    )
    exchange_policy: str = choice(
        "what crosses between ranks in decode; wide: q after W_UK, outputs before W_UV; "
        "narrow: q before W_UK, outputs after W_UV; auto: narrow for large batches",
        "auto",
        "wide",
        "narrow",
    )
    narrow_threshold: int | None = option(
        None, "rows from which auto is narrow; default: 128, 32, 16 with 2, 4, 8 ranks", least=1
    )
    q_proj: str = choice(
        "replicated: every rank computes q for all heads of its DCP group and gathers none",
        "sharded",
        "replicated",
    )

    # Where and how to compute.
    device: str = choice("where to run; auto: cuda if there is a GPU", "auto", "cpu", "cuda")
    dtype: str = choice(
        "auto is bfloat16 on GPUs and float32 on CPUs", "auto", "float32", "bfloat16"
    )
    quantization: str = choice(
        "fp8: matrices in FP8, quantised while they are loaded if the checkpoint has them in "
        "bfloat16, and what they multiply as well; none: in --dtype; auto: fp8 for checkpoints "
        "in FP8, where the GPU can multiply it",
        "auto",
        "fp8",
        "none",
    )
    attention_backend: str = choice(
        "auto is fa3 where it runs, else flashinfer, else triton, and reference on CPUs",
        "auto",
        "fa3",
        "flashinfer",
        "triton",
        "reference",
    )
    prefill_strategy: str = choice(
        "how prompts see cached context; auto: whichever is estimated to be faster",
        "auto",
        "gather_kv",
        "gather_q",
    )
    cuda_graph: bool = option(True, "replay steps, or all but their attentions, as CUDA graphs")

    # The KV cache. FA3 lets NaN leak from the unused slots of blocks larger than 32.
    block_size: int = option(16, "tokens per block and rank", choices=(1, 2, 4, 8, 16, 32))
    num_blocks: int | None = option(
        None,
        "KV cache blocks; default: as many as fit (on a CPU: into 2 GiB)",
        "--num-gpu-blocks-override",
        least=1,
    )
    prefix_cache: bool = option(True, "reuse the KV cache of prompts that begin alike")
    gpu_memory_utilization: float = option(
        0.9, "share of each GPU's memory to use", "--mem-fraction-static"
    )

    # The scheduler.
    max_model_len: int | None = option(
        None,
        "tokens of a request, prompt and output; default: the model's",
        "--context-length",
        least=1,
    )
    max_num_seqs: int = option(
        256, "requests that run at the same time", "--max-running-requests", least=1
    )
    max_num_batched_tokens: int | None = option(
        None,
        "tokens per step; longer prompts are computed in chunks; default: 8192, on CPUs 2048",
        least=1,
    )
    mixed_steps: bool = option(True, "let one step hold decode rows and prompt chunks")
    speculative_method: str = choice(
        "guess the next tokens and check several in one step; ngram: what followed where a "
        "request's last tokens occurred before, in its prompt or output; mtp: what the layer says "
        "that DeepSeek-V3 and its relatives have for this (multi-token prediction)",
        "none",
        "ngram",
        "mtp",
    )
    num_speculative_tokens: int | None = option(
        None,
        "guesses of a request in one step at most; fewer where they do not pay; default: 3, mtp 1",
        least=1,
    )
    prompt_lookup_min: int = option(2, "tokens that must occur again, at least", least=1)
    prompt_lookup_max: int = option(4, "tokens that are looked for, at most", least=1)
    engine_timeout: float = option(
        120.0,
        "seconds that a step may take; then a rank counts as stuck: the server's /health answers "
        "503, and LLM.generate raises EngineDeadError",
        least=1,
    )

    generation_config: str = option(
        "auto",
        "where sampling defaults (temperature, top_p, top_k, min_p, repetition_penalty) come from; "
        "auto: the checkpoint's generation_config.json; vllm or none: there are none; else "
        "such a file, or a directory with one",
    )

    load_format: str = choice(
        "auto: safetensors; dummy: random weights, to measure with a config.json alone",
        "auto",
        "dummy",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        share = self.gpu_memory_utilization
        require(0 < share <= 1, f"--gpu-memory-utilization {share}: must be in (0, 1]")

        timeout = self.engine_timeout
        require(timeout < math.inf, f"--engine-timeout {timeout}: must be finite, such as 86400")

        batched_tokens = self.max_num_batched_tokens
        require(
            batched_tokens is None or batched_tokens >= self.max_num_seqs,
            f"--max-num-batched-tokens {batched_tokens} must be at least --max-num-seqs "
            f"{self.max_num_seqs}: every running request decodes one token per step",
        )

        require(
            self.prompt_lookup_min <= self.prompt_lookup_max,
            f"--prompt-lookup-min {self.prompt_lookup_min}: must be at most --prompt-lookup-max "
            f"{self.prompt_lookup_max}",
        )
        require(
            self.tp_size % self.dcp_size == 0,
            f"--dcp-size {self.dcp_size} must divide --tp-size {self.tp_size}; "
            f"possible: {divisors(self.tp_size)}",
        )


@dataclass(frozen=True)
class ServeConfig(Options):
    """What a user can choose about the HTTP server. Times are in seconds."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on; 0 lets the system choose")
    uds: str | None = option(None, "Unix socket to listen on, in place of host and port")
    root_path: str = option("", "prefix under which a proxy serves all this, such as /llm")
    cors_allow_origins: str = option(
        "",
        "origins whose pages may call the server from a browser, separated by commas, such as "
        "https://chat.example.com; *: all; default: none",
    )
    served_model_name: tuple[str, ...] | None = option(
        None, "the model's names in the API; answers have the first; default: MODEL"
    )
    chat_template: str | None = option(
        None, "file with a chat template (Jinja), in place of the checkpoint's"
    )
    api_key: str | None = option(
        None, "key that clients must send as bearer token; default: $MINIDCP_API_KEY"
    )
    tool_call_parser: str = choice(
        "how the model writes calls of functions; auto: as its chat template does; none: calls are "
        "left in the text, unless tool_choice demands them",
        "auto",
        "deepseek_v3",
        "deepseek_v31",
        "none",
    )
    max_num_queued_requests: int = option(
        4096, "requests that may wait; beyond that clients get 503", least=0
    )
    max_choices_per_request: int = option(
        1024, "choices of one request: its prompts times n; with more it gets 400", least=1
    )
    request_timeout: float = option(
        0.0, "seconds after which a request is aborted; 0: never", least=0
    )
    receive_timeout: float = option(
        60.0,
        "seconds in which a request must arrive; else its connection is closed; 0: no limit",
        least=0,
    )
    keep_alive_timeout: float = option(
        75.0,
        "seconds that a connection may be idle after an answer; must be longer than a proxy in "
        "front keeps its idle connections",
        least=1,
    )
    send_timeout: float = option(
        30.0,
        "seconds that a client may leave an answer unread; then its connection is closed; "
        "0: no limit",
        least=0,
    )
    max_body_bytes: int = option(16 << 20, "largest body of a request, in bytes", least=1)
    shutdown_timeout: float = option(
        30.0,
        "seconds that requests have to end after SIGTERM or Ctrl-C; then they are aborted",
        least=0,
    )
    sse_keep_alive_interval: float = option(
        0.0, "seconds between comments in a silent stream; 0: no comments", least=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_api_key(self.api_key, "--api-key")
        require(
            self.served_model_name is None or all(self.served_model_name),
            f"--served-model-name {self.served_model_name!r}: a name is empty",
        )
        path = self.root_path
        require(
            not path or (path.startswith("/") and not path.endswith("/")),
            f"--root-path {path!r}: must begin with a slash and not end with one, such as /llm",
        )
        for origin in self.cors_origins:
            require(
                origin == "*" or re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin),
                f"--cors-allow-origins {origin!r}: must be * or an origin as browsers send it: "
                "scheme, host and port without a path, such as https://chat.example.com",
            )

    @property
    def cors_origins(self) -> list[str]:
        """The origins of --cors-allow-origins, one by one."""
        origins = self.cors_allow_origins.split(",")
        return [origin.strip() for origin in origins if origin.strip()]


def check_api_key(key: str | None, source: str) -> None:
    """Raise a ValueError, which names the source but not the key, if no client could send it.

    An empty key comes from a variable that is not set. It must not open the server to everybody.
    """
    require(
        key is None or key.strip(),
        f"{source}: is empty; give a key, or leave it out to ask for none",
    )
    require(
        key is None or key == key.strip(),
        f"{source}: has white space around it, which no client can send; strip it",
    )


def divisors(n: int) -> str:
    """The divisors of n, as an error message lists them."""
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
