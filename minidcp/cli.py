"""The command line: `minidcp serve MODEL …`, `minidcp generate MODEL --prompt …`,
`minidcp plan MODEL --gpu …` and `minidcp fetch-fa3`."""

import argparse
import json
import logging
import re
import signal
import sys
import time
from dataclasses import asdict
from typing import Any

from minidcp import __version__
from minidcp.config import EngineConfig, Options, ServeConfig, flag, require
from minidcp.console import exit_at_once, protect_stderr, protect_stdout
from minidcp.engine.executor import EngineDeadError, is_driver
from minidcp.fetch_fa3 import VLLM_VERSIONS, fetch_fa3
from minidcp.hardware import GPUS
from minidcp.llm import LLM
from minidcp.plan import Deployment, find_gpu
from minidcp.plan_report import describe, draw
from minidcp.request import SamplingParams
from minidcp.speculative_config import EXAMPLE, read_speculative_config

logger = logging.getLogger("minidcp")


class StoreAndNote(argparse.Action):
    """Stores a value as usual, and notes that it was typed: it may be equal to the default."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, values)
        namespace.given = getattr(namespace, "given", {}) | {self.dest: values}


def add_flags(parser: argparse.ArgumentParser, options: type[Options]) -> None:
    """Add a flag for each option, with its aliases."""
    for field, types in options.options():
        names = [flag(field.name), *field.metadata["aliases"]]
        value_type = types[0]
        kwargs: dict[str, Any] = {}
        if value_type is bool:
            kwargs["action"] = argparse.BooleanOptionalAction
        elif value_type is tuple:
            kwargs["nargs"] = "+"
        else:
            kwargs["type"] = value_type
            kwargs["action"] = StoreAndNote
        # The choices of numbers are left to EngineConfig to check.
        if value_type is str and field.metadata["choices"]:
            kwargs["choices"] = field.metadata["choices"]

        help_text = field.metadata["help"]
        if field.default is not None:
            help_text += " (default: %(default)s)"
        parser.add_argument(
            *names, dest=field.name, default=field.default, help=help_text, **kwargs
        )


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Add the model, a flag for each field of EngineConfig, and what users of SGLang type."""
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="checkpoint directory or Hugging Face name"
    )
    parser.add_argument(
        "--model-path",
        "--model",
        dest="model_flag",
        metavar="MODEL",
        help="the model, given as a flag",
    )
    add_flags(parser, EngineConfig)

    # These flags of SGLang and vLLM are not another name of ours: each sets one of ours to a value.
    add_constant_flag(parser, "--enable-symm-mem", dest="comm", value="symmetric")
    add_constant_flag(parser, "--disable-radix-cache", dest="prefix_cache", value=False)
    add_constant_flag(
        parser, "--disable-cuda-graph", "--enforce-eager", dest="cuda_graph", value=False
    )
    parser.add_argument(
        "--speculative-config",
        "-sc",
        metavar="JSON",
        help="--speculative-method (as method), --num-speculative-tokens, --prompt-lookup-min and "
        f"--prompt-lookup-max as one JSON object, such as '{EXAMPLE}'",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="accepted and ignored: remote code is never run",
    )


def add_constant_flag(
    parser: argparse.ArgumentParser, *names: str, dest: str, value: str | bool
) -> None:
    """Add a flag without a value that sets the option `dest` to `value`."""
    equivalent = f"{flag(dest)} {value}"
    if value is False:
        equivalent = f"--no-{flag(dest).removeprefix('--')}"
    parser.add_argument(
        *names,
        dest=dest,
        action="store_const",
        const=value,
        default=argparse.SUPPRESS,
        help=f"the same as {equivalent}",
    )


def engine_config(args: argparse.Namespace, **changes: Any) -> EngineConfig:
    """The EngineConfig that was typed, with `changes` made to it. Raises ValueError."""
    give_model_back(args)
    models = {model for model in (args.model, args.model_flag) if model}
    require(models, "MODEL is missing: a checkpoint directory or a Hugging Face name")
    require(
        len(models) == 1,
        f"--model-path {args.model_flag!r}: MODEL is given twice, also as {args.model!r}",
    )
    values = read_options(args, EngineConfig)
    if args.speculative_config is not None:
        given = getattr(args, "given", {})
        values.update(read_speculative_config(args.speculative_config, given))
    values.update(changes)
    return EngineConfig(models.pop(), **values)


def give_model_back(args: argparse.Namespace) -> None:
    """`--served-model-name NAME MODEL` has taken MODEL for one more name, if there is no other."""
    names = getattr(args, "served_model_name", None) or []
    if not args.model and not args.model_flag and len(names) > 1:
        args.model = names.pop()


def read_options(args: argparse.Namespace, options: type[Options]) -> dict[str, Any]:
    values = {field.name: getattr(args, field.name) for field, _ in options.options()}
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return values | lists


def serve(args: argparse.Namespace) -> int:
    try:
        # Imported here, because the other commands run where no web framework is installed.
        from minidcp_server.serve import serve as run_server
    except ImportError as error:
        raise ValueError(
            f"serve needs the extra 'server': pip install 'minidcp[server]' ({error})"
        ) from None
    config = engine_config(args)
    return int(run_server(config, ServeConfig(**read_options(args, ServeConfig))))


def generate(args: argparse.Namespace) -> int:
    params = SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        seed=args.seed,
        ignore_eos=args.ignore_eos,
    )
    with LLM(**asdict(engine_config(args))) as llm:
        start = time.perf_counter()
        outputs = llm.generate(args.prompt, params, use_tqdm=True)
        seconds = time.perf_counter() - start
        drafts = describe_drafts(llm)

    num_tokens = 0
    for output in outputs:
        completion = output.outputs[0]
        num_tokens += len(completion.token_ids)
        print(f"{output.prompt}{completion.text}")
    rate = f"{num_tokens} tokens in {seconds:.2f} s: {num_tokens / seconds:.1f} tokens/s"
    print(rate + drafts, file=sys.stderr)
    return 0


def describe_drafts(llm: LLM) -> str:
    """How good the guesses were, to go on after the rate. Empty without speculative decoding."""
    stats = llm.engine.stats
    if llm.engine.config.num_speculative_tokens == 0:
        return ""
    if stats.drafts == 0:
        return "; drafts: none"
    per_row = stats.accepted_drafts / stats.rows_with_drafts
    counts = f"{stats.accepted_drafts} of {stats.drafts} accepted"
    return f"; drafts: {counts}, {per_row:.2f} per request and step that had some"


def plan(args: argparse.Namespace) -> int:
    concurrency = parse_counts("concurrency", args.concurrency)
    dcp_sizes = parse_counts("dcp_size", args.dcp_size)
    can_plot = not args.plot or args.plot.endswith((".png", ".svg"))
    require(can_plot, f"--plot {args.plot!r}: must end in .png or .svg")

    gpu = find_gpu(args.gpu)
    configs = [engine_config(args, dcp_size=dcp_size) for dcp_size in dcp_sizes]
    deployments = [Deployment(config, gpu, args.context, args.acceptance) for config in configs]
    steps = []
    for deployment in deployments:
        for level in concurrency:
            steps.append(deployment.time_step(level))

    chosen = deployments[0].config
    weights = chosen.dtype if chosen.quantization == "none" else chosen.quantization
    model = f"{configs[0].model} in {weights}"
    title = f"{model}, tp {args.tp_size}, {args.gpu}, {args.context:,} tokens per request"
    if args.acceptance is not None:
        title += f", up to {chosen.num_speculative_tokens} drafts, acceptance {args.acceptance}"
    elif chosen.num_speculative_tokens > 0:
        logger.warning(
            "--speculative-method %s: estimated without drafts, because how many are right is "
            "not known; --acceptance 0.6 would count them, each right with probability 0.6",
            configs[0].speculative_method,
        )
    if args.plot:
        draw(title, steps, args.plot)
    if args.json:
        memory = [deployment.memory for deployment in deployments]
        print(json.dumps({"title": title, "memory": memory, "steps": steps}))
    else:
        print(describe(title, deployments, steps))
    return 0


def fetch(args: argparse.Namespace) -> int:
    print(f"FlashAttention-3 is in {fetch_fa3(args.vllm_version)}, where minidcp finds it")
    return 0


def parse_counts(name: str, text: str) -> list[int]:
    """Read rising integers: `1,8,64`, or `1..512` for both ends and the powers of two between them.
    `name` is the option's field, for errors."""
    is_range = re.fullmatch(r"\d+\.\.\d+", text) is not None
    is_list = re.fullmatch(r"\d+(,\d+)*", text) is not None
    counts = [int(number) for number in re.findall(r"\d+", text)]
    is_rising = (is_range or is_list) and counts[0] >= 1 and counts == sorted(counts)
    require(is_rising, f"{flag(name)} {text!r}: must be rising integers, such as 1,8,64 or 1..512")
    if is_range:
        low, high = counts
        counts += [1 << i for i in range(31) if low < 1 << i < high]
    return sorted(set(counts))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="minidcp", description=__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"minidcp {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    serve_parser = commands.add_parser(
        "serve", help="serve the model over an OpenAI-compatible HTTP API", allow_abbrev=False
    )
    add_engine_flags(serve_parser)
    add_flags(serve_parser, ServeConfig)
    serve_parser.set_defaults(run=serve, parser=serve_parser)

    generate_parser = commands.add_parser(
        "generate", help="complete prompts and print the results", allow_abbrev=False
    )
    add_engine_flags(generate_parser)
    add_generate_flags(generate_parser)
    generate_parser.set_defaults(run=generate, parser=generate_parser)

    plan_parser = commands.add_parser(
        "plan",
        help="estimate from config.json alone what fits on a GPU and how fast it decodes",
        allow_abbrev=False,
        conflict_handler="resolve",  # add_plan_flags replaces the engine's --dcp-size
    )
    add_engine_flags(plan_parser)
    add_plan_flags(plan_parser)
    plan_parser.set_defaults(run=plan, parser=plan_parser)

    fetch_parser = commands.add_parser(
        "fetch-fa3",
        help="download the FlashAttention-3 that fits the installed torch, for Hopper GPUs",
        allow_abbrev=False,
    )
    known = ", ".join(f"{vllm} for torch {torch}" for torch, vllm in VLLM_VERSIONS.items())
    fetch_parser.add_argument(
        "--vllm-version", help=f"the vLLM whose wheel to take it from; default: {known}"
    )
    fetch_parser.set_defaults(run=fetch, parser=fetch_parser)
    return parser


def add_generate_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt",
        action="append",
        required=True,
        help="text to complete; repeat it for several prompts",
    )
    parser.add_argument(
        "--max-tokens", type=int, default=128, help="most tokens to generate for each prompt"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="sampling temperature; 0 is greedy"
    )
    parser.add_argument("--seed", type=int, help="seed that makes sampling repeatable")
    parser.add_argument(
        "--ignore-eos",
        action="store_true",
        help="keep generating after the end-of-sequence token",
    )


def add_plan_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dcp-size",
        "--decode-context-parallel-size",
        "-dcp",
        default="1",
        help="one or several DCP sizes to compare, such as 1,2,4,8",
    )
    parser.add_argument(
        "--gpu",
        required=True,
        help=f"{', '.join(GPUS)}, or its own rates: memory=…,bandwidth=…,flops=…,link=… "
        "(bytes, bytes/s, FLOP/s in bfloat16, bytes/s); capability=… if it is not 9.0",
    )
    parser.add_argument(
        "--context",
        type=int,
        default=4096,
        help="average length in tokens of a request while it decodes",
    )
    parser.add_argument(
        "--concurrency",
        default="1..512",
        help="requests at once: a list such as 1,8,64, or a range of powers of two such as 1..512",
    )
    parser.add_argument(
        "--acceptance",
        type=float,
        metavar="P",
        help="with --speculative-method: how likely a guess is right if those before it are, from "
        "0 to 1; default: guesses are not counted",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--plot", metavar="FILE", help="also draw tokens/s over concurrency, as .png or .svg"
    )


def protect_process(command: str) -> None:
    """Let nothing that happens to this process's output hurt what it does, nor SIGTERM be lost."""
    protect_stderr()
    if command == "serve":  # the other commands print results, whose loss is an error
        protect_stdout()
        if is_driver():
            # Until the server is there to finish its requests. As a container's process 1, this one
            # would not end by a signal that it does not handle. Other ranks keep the default: while
            # they wait for the driver in torch's store, no handler of Python's would run.
            signal.signal(signal.SIGTERM, lambda *_: exit_at_once(0))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Ends the process with the command's own usage if the command does not know a flag."""
    args, unknown = build_parser().parse_known_args(argv)
    if unknown:
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run a command. Exit codes: 0, 1 if the engine died, 2 for an error of the user, 130 for
    Ctrl-C."""
    args = parse_arguments(argv)
    if argv is None:  # this is the process's own command line
        protect_process(args.command)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    try:
        return int(args.run(args))
    except ValueError as error:
        print(f"minidcp: error: {error}", file=sys.stderr)
        return 2
    except EngineDeadError as error:
        print(f"minidcp: the engine ended: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
