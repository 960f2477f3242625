"""Where every "auto" is decided, once: what the user asked for, what the model is and what the
machine can do become a `ResolvedConfig`. The engine and the planner (`plan.py`) both use it; all
code below the engine sees resolved configurations only. Next: `kv_cache/interleave.py`."""

import logging
from dataclasses import dataclass

from minidcp.choose_attention import Report, choose_attention
from minidcp.config import EngineConfig, divisors, flag, require
from minidcp.kernels.fp8 import BLOCK, MIN_BLOCK, find_block
from minidcp.machine import Machine
from minidcp.model_config import ModelConfig

logger = logging.getLogger("minidcp")

# So many requests can have all their drafts, even if --max-num-seqs is not larger than that.
REQUESTS_WITH_DRAFTS = 16
# Drafts may make a step larger than --max-num-seqs, but not larger than so many tokens: CUDA graphs
# are captured up to the largest step, and have logits of all its tokens.
MAX_TOKENS_WITH_DRAFTS = 512

# Rows of a step from which narrow is faster, by --dcp-size, as measured (`docs/benchmarks.md`).
# With more ranks wide sends more bytes, and the products that narrow adds stay the same.
NARROW_THRESHOLDS = {2: 128, 4: 32, 8: 16}

FP8_CAPABILITY = (8, 9)  # the first GPUs with tensor cores for FP8


@dataclass(frozen=True)
class ResolvedConfig:
    """A configuration in which no field is None or "auto". Fields are named as the flags are.

    The exchanges p2p, a2a and ag_rs, and what wide and narrow are, is in `parallel/exchange.py`.
    The prefill strategies are in `attention/context.py`.
    """

    model: str  # a local directory

    tp_size: int
    dcp_size: int
    ranks: str  # threads, processes or torchrun
    comm: str  # symmetric, nccl or gloo
    dcp_comm_backend: str  # p2p, a2a or ag_rs; "none" where dcp_size is 1
    exchange_policy: str  # wide, narrow, or "by_batch": narrow from narrow_threshold queries on
    narrow_threshold: int
    q_proj: str  # sharded or replicated

    device: str  # cpu or cuda
    dtype: str
    quantization: str  # none, or fp8: of matrices; the rest of the weights is in dtype
    attention_backend: str  # fa3, flashinfer, triton or reference
    prefill_strategy: str  # gather_kv, gather_q, or "cheaper": chosen for each step
    cuda_graph: bool

    block_size: int
    prefix_cache: bool
    gpu_memory_utilization: float
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    mixed_steps: bool
    speculative_method: str  # none, ngram or mtp
    num_speculative_tokens: int  # drafts of a request in one step; 0: none
    prompt_lookup_min: int
    prompt_lookup_max: int
    engine_timeout: float  # in seconds
    load_format: str  # safetensors, or dummy: random weights

    def exchanges_narrow(self, num_queries: int) -> bool:
        """Whether so many queries are exchanged narrow; see `parallel/exchange.py`.

        They are the decode rows of a step, padding included where a CUDA graph has any, or the new
        tokens of prompts that gather their q.
        """
        if self.exchange_policy == "by_batch":
            return num_queries >= self.narrow_threshold
        return self.exchange_policy == "narrow"

    @property
    def max_decode_tokens(self) -> int:
        """Tokens of the decode rows of a step: a row of each request, and drafts."""
        some_with_drafts = min(self.max_num_seqs, REQUESTS_WITH_DRAFTS)
        return max(self.max_num_seqs, some_with_drafts * (1 + self.num_speculative_tokens))

    @property
    def num_predicted(self) -> int:
        """How many drafts the ranks make behind each token that they sample."""
        return self.num_speculative_tokens if self.predicts else 0

    @property
    def predicts(self) -> bool:
        """Whether the model's MTP layer is loaded, to make drafts. It has a cache of its own."""
        return self.speculative_method == "mtp"

    def count_cache_layers(self, model: ModelConfig) -> int:
        """How many layers have a cache."""
        return model.num_hidden_layers + int(self.predicts)

    @property
    def replicates_q(self) -> bool:
        """Whether every rank computes q for all heads of its DCP group, and gathers none."""
        return self.q_proj == "replicated"

    @property
    def needs_group_heads(self) -> bool:
        """Whether a rank ever uses W_UK and W_UV of all heads of its DCP group, and holds them."""
        return self.replicates_q or self.exchange_policy != "wide"


def resolve(
    config: EngineConfig, model: ModelConfig, machine: Machine, report: Report = logger.log
) -> ResolvedConfig:
    """Decide every "auto". `report` hears what was chosen where that could surprise.

    Raises ValueError if something was asked for that this model or this machine cannot do.
    """
    device = choose_device(config, machine)
    check_heads(config, model)
    max_model_len = choose_max_model_len(config, model)
    dtype = choose_dtype(config, device)
    check_prediction_layer(config, model)
    warn_of_options_without_effect(config, report)
    ranks = choose_ranks(config, machine, device)
    comm = choose_comm(config, machine, device, report)
    attention_backend = choose_attention(config, model, machine, device, dtype, report)
    return ResolvedConfig(
        model=config.model,
        tp_size=config.tp_size,
        dcp_size=config.dcp_size,
        ranks=ranks,
        comm=comm,
        dcp_comm_backend=choose_dcp_comm_backend(config, comm),
        exchange_policy=choose_exchange_policy(config),
        narrow_threshold=find_narrow_threshold(config),
        q_proj=config.q_proj if config.dcp_size > 1 else "sharded",
        device=device,
        dtype=dtype,
        quantization=choose_quantization(config, model, machine, device, report),
        attention_backend=attention_backend,
        prefill_strategy=choose_prefill_strategy(config, attention_backend),
        cuda_graph=config.cuda_graph,
        block_size=config.block_size,
        prefix_cache=config.prefix_cache,
        gpu_memory_utilization=config.gpu_memory_utilization,
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=choose_max_num_batched_tokens(config, device),
        mixed_steps=config.mixed_steps,
        speculative_method=config.speculative_method,
        num_speculative_tokens=choose_num_speculative_tokens(config),
        prompt_lookup_min=config.prompt_lookup_min,
        prompt_lookup_max=config.prompt_lookup_max,
        engine_timeout=config.engine_timeout,
        load_format="safetensors" if config.load_format == "auto" else config.load_format,
    )


def choose_device(config: EngineConfig, machine: Machine) -> str:
    if config.device == "cpu":
        return "cpu"
    if config.device == "auto":
        return "cuda" if machine.num_gpus > 0 else "cpu"
    require(machine.num_gpus > 0, f"--device {config.device}: no CUDA device is available")
    return config.device


def check_heads(config: EngineConfig, model: ModelConfig) -> None:
    num_heads = model.num_attention_heads
    require(
        num_heads % config.tp_size == 0,
        f"--tp-size {config.tp_size} must divide the model's {num_heads} attention heads; "
        f"possible: {divisors(num_heads)}",
    )


def choose_max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    longest = model.max_position_embeddings
    max_model_len = config.max_model_len or longest
    require(
        max_model_len <= longest,
        f"--max-model-len {max_model_len}: the model's positions end at {longest}",
    )
    return max_model_len


def choose_max_num_batched_tokens(config: EngineConfig, device: str) -> int:
    if config.max_num_batched_tokens is not None:
        return config.max_num_batched_tokens
    default = 2048 if device == "cpu" else 8192
    return max(default, config.max_num_seqs)


def check_prediction_layer(config: EngineConfig, model: ModelConfig) -> None:
    count = model.num_nextn_predict_layers
    require(
        config.speculative_method != "mtp" or count > 0,
        f"--speculative-method mtp: needs a layer that predicts a second token, and config.json "
        f"has num_nextn_predict_layers {count}; use ngram",
    )


def choose_num_speculative_tokens(config: EngineConfig) -> int:
    if config.speculative_method == "none":
        return 0
    asked = config.num_speculative_tokens
    if asked is None:
        return 1 if config.speculative_method == "mtp" else 3
    given = f"--num-speculative-tokens {asked}"
    requests = min(config.max_num_seqs, REQUESTS_WITH_DRAFTS)
    tokens = max(config.max_num_seqs, MAX_TOKENS_WITH_DRAFTS)
    most = tokens // requests - 1
    require(
        asked <= most,
        f"{given}: must be at most {most} with --max-num-seqs {config.max_num_seqs}; with more, "
        f"{requests} requests and all their drafts would be over {tokens} tokens in a step",
    )
    batched_tokens = config.max_num_batched_tokens
    require(
        batched_tokens is None or asked < batched_tokens,
        f"{given}: must be less than --max-num-batched-tokens {batched_tokens}, because a step "
        "checks a request's drafts together with the token before them",
    )
    return asked


def choose_dtype(config: EngineConfig, device: str) -> str:
    if config.dtype != "auto":
        return config.dtype
    # On a CPU bf16 is slower than fp32, and less exact.
    return "float32" if device == "cpu" else "bfloat16"


def choose_quantization(
    config: EngineConfig, model: ModelConfig, machine: Machine, device: str, report: Report
) -> str:
    """FP8 for a checkpoint in FP8 where the GPU can multiply it."""
    asked = config.quantization
    major, minor = machine.capability
    obstacle = ""
    if device == "cuda":
        obstacle = find_narrow_blocks(config, model)
        if machine.capability < FP8_CAPABILITY:
            obstacle = f"this GPU (sm_{major}{minor}) cannot multiply FP8"
    require(asked != "fp8" or not obstacle, f"--quantization fp8: {obstacle}; use none")
    if asked == "fp8" and device == "cpu":
        report(logging.WARNING, "--quantization fp8 is slower than none on CPUs: it is for tests")
    if asked != "auto":
        return asked
    if model.fp8_block is None:
        return "none"
    if device == "cpu":
        obstacle = "CPUs are faster without"
    if not obstacle:
        return "fp8"
    report(logging.INFO, f"quantization: none, because {obstacle}; FP8 weights are dequantised")
    return "none"


def find_narrow_blocks(config: EngineConfig, model: ModelConfig) -> str:
    """Why tensor cores cannot multiply the model's matrices in FP8; empty if they can."""
    _, stored_block = model.fp8_block or (BLOCK, BLOCK)
    widths = {
        "hidden_size": model.hidden_size,
        "q_lora_rank": model.q_lora_rank or model.hidden_size,
        "num_attention_heads × v_head_dim / tp": (
            model.num_attention_heads * model.v_head_dim // config.tp_size
        ),
    }
    for name, width in widths.items():
        block = find_block(width, stored_block)
        if block < MIN_BLOCK:
            return (
                f"{name} {width} is in blocks of {block} that share a scale, and tensor cores "
                f"multiply {MIN_BLOCK} at once"
            )
    return ""


def warn_of_options_without_effect(config: EngineConfig, report: Report) -> None:
    without_effect = {}
    if config.dcp_size == 1:
        for name in ("dcp_comm_backend", "exchange_policy", "q_proj"):
            without_effect[name] = "with --dcp-size 1"
    if config.speculative_method == "none":
        without_effect["num_speculative_tokens"] = "without --speculative-method"
    if config.speculative_method != "ngram":
        for name in ("prompt_lookup_min", "prompt_lookup_max"):
            without_effect[name] = "without --speculative-method ngram"
    for name, reason in without_effect.items():
        value = getattr(config, name)
        if value != getattr(EngineConfig, name):
            report(logging.WARNING, f"{flag(name)} {value} has no effect {reason}")


def choose_ranks(config: EngineConfig, machine: Machine, device: str) -> str:
    """What ranks are: torchrun's processes if there are any, else our own, or threads."""
    ranks = config.ranks
    world_size = machine.torchrun_world_size
    if world_size > 0:
        require(
            world_size == config.tp_size,
            f"--tp-size {config.tp_size}: torchrun started {world_size} processes",
        )
        require(
            ranks in ("auto", "torchrun"),
            f"--ranks {ranks}: under torchrun its processes are the ranks",
        )
        return "torchrun"

    require(ranks != "torchrun", "--ranks torchrun: start the program with torchrun")
    is_one_cpu_rank = config.tp_size == 1 and device == "cpu"
    if ranks == "auto":
        return "threads" if is_one_cpu_rank else "processes"
    require(
        ranks != "threads" or device == "cpu" or config.tp_size == 1,
        "--ranks threads: several ranks on GPUs are processes; use --ranks processes",
    )
    return ranks


def choose_comm(config: EngineConfig, machine: Machine, device: str, report: Report) -> str:
    """Collectives: symmetric memory where every rank can read the memory of all other ranks."""
    comm = config.comm
    if device == "cpu":
        require(comm in ("auto", "gloo"), f"--comm {comm}: needs GPUs; CPUs use gloo")
        return "gloo"
    require(comm != "gloo", "--comm gloo: is for CPUs; use symmetric or nccl")
    if config.tp_size == 1:
        return "nccl" if comm == "auto" else comm

    is_under_torchrun = machine.torchrun_world_size > 0
    is_one_node = not is_under_torchrun or machine.torchrun_local_size == config.tp_size
    obstacle = ""
    if not machine.has_peer_access:
        obstacle = "the GPUs are not peers"
    elif not is_one_node:
        obstacle = "the ranks are on several nodes"
    require(comm != "symmetric" or not obstacle, f"--comm symmetric: {obstacle}; use nccl")
    if comm == "auto":
        comm = "nccl" if obstacle else "symmetric"
    reason = obstacle or "one node, and every GPU can read its peers' memory"
    report(logging.INFO, f"collectives: {comm} ({reason})")

    num_gpus = machine.num_gpus
    if config.tp_size > num_gpus and is_one_node:
        require(
            comm == "symmetric",
            f"--tp-size {config.tp_size}: {comm} needs a GPU per rank, there are {num_gpus}",
        )
        shared = f"{config.tp_size} ranks share {num_gpus} GPUs"
        report(logging.WARNING, f"{shared}: right for tests, not for speed")
    return comm


def choose_dcp_comm_backend(config: EngineConfig, comm: str) -> str:
    """p2p where ranks can read each other's memory, else a2a."""
    if config.dcp_size == 1:
        return "none"
    exchange = config.dcp_comm_backend
    if exchange == "auto":
        return "p2p" if comm == "symmetric" else "a2a"
    require(
        exchange != "p2p" or comm == "symmetric",
        f"--dcp-comm-backend p2p: needs symmetric memory (GPUs of one node), not --comm {comm}; "
        "use a2a",
    )
    return exchange


def choose_exchange_policy(config: EngineConfig) -> str:
    """Narrow from --narrow-threshold rows on, if batches get that large.

    Narrow moves 3.4 times fewer bytes and multiplies for every head of the DCP group. If
    --max-num-seqs is below the threshold, decode never goes narrow. Then W_UK and W_UV of the
    group's heads are not loaded, to save memory, so prompts that gather q go wide as well.
    """
    if config.dcp_size == 1:
        return "wide"
    if config.exchange_policy != "auto":
        return config.exchange_policy
    holds_group_heads = config.q_proj == "replicated"
    if config.max_num_seqs < find_narrow_threshold(config) and not holds_group_heads:
        return "wide"
    return "by_batch"


def find_narrow_threshold(config: EngineConfig) -> int:
    """Sizes that were not measured get the threshold of the largest one below them."""
    if config.narrow_threshold is not None:
        return config.narrow_threshold
    measured = [size for size in NARROW_THRESHOLDS if size <= config.dcp_size]
    return NARROW_THRESHOLDS[max(measured, default=min(NARROW_THRESHOLDS))]


def choose_prefill_strategy(config: EngineConfig, attention_backend: str) -> str:
    if config.prefill_strategy != "auto":
        return config.prefill_strategy
    # The reference back-end gathers the whole context for every absorbed query.
    return "gather_kv" if attention_backend == "reference" else "cheaper"
