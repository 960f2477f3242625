"""The command line: `minidcp serve MODEL …`, `minidcp generate MODEL --prompt …`, `minidcp plan MODEL --gpu h100 …`."""

import argparse
import json
import logging
import sys
import time
from dataclasses import fields
from typing import Any

from minidcp.config import EngineConfig, Options, ServeConfig, flag
from minidcp.engine.executor import EngineDeadError
from minidcp.llm import LLM
from minidcp.planner import GPUS, Plan, describe, draw, find_gpu
from minidcp.request import SamplingParams


def add_flags(parser: argparse.ArgumentParser, options: type[Options]) -> None:
    """A flag per option."""
    for field, kinds in options.options():
        names = [flag(field.name), *field.metadata["aliases"]]
        arguments: dict[str, Any] = {"default": field.default, "help": field.metadata["help"]}
        if kinds[0] is bool:
            arguments["action"] = argparse.BooleanOptionalAction
        else:
            choices = field.metadata["choices"] if kinds[0] is str else None
            arguments |= {"type": kinds[0], "choices": choices or None}
        parser.add_argument(*names, dest=field.name, **arguments)


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """The model, a flag per field of EngineConfig, and what users of SGLang type."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="checkpoint directory or Hugging Face name")
    parser.add_argument("--model-path", "--model", dest="model_flag", metavar="MODEL", help="the same as a flag")
    add_flags(parser, EngineConfig)
    # SGLang's spellings that are not simply another name.
    for names, dest, const, meaning in (
        (["--enable-symm-mem"], "comm", "symmetric", "--comm symmetric"),
        (["--disable-radix-cache"], "prefix_cache", False, "--no-prefix-cache"),
        (["--disable-cuda-graph", "--enforce-eager"], "cuda_graph", False, "--no-cuda-graph"),
    ):
        store: dict[str, Any] = dict(action="store_const", const=const, default=argparse.SUPPRESS)
        parser.add_argument(*names, dest=dest, help=meaning, **store)
    parser.add_argument("--trust-remote-code", action="store_true", help="ignored: no remote code is ever run")


def engine_config(args: argparse.Namespace) -> EngineConfig:
    model = args.model_flag or args.model
    if model is None:
        raise ValueError("MODEL is missing: a checkpoint directory or a Hugging Face name")
    if args.model and args.model_flag and args.model != args.model_flag:
        raise ValueError(f"--model-path {args.model_flag!r}: MODEL is given twice, also as {args.model!r}")
    return EngineConfig(model=model, **{f.name: getattr(args, f.name) for f, _ in EngineConfig.options()})


def serve(args: argparse.Namespace) -> int:
    try:
        from minidcp_server.app import serve as run  # the engine runs where no web framework is installed
    except ImportError as error:
        raise ValueError(f"serve needs the extra 'server': pip install 'minidcp[server]' ({error})") from None
    options = {f.name: getattr(args, f.name) for f, _ in ServeConfig.options()}
    code: int = run(engine_config(args), ServeConfig(**options))
    return code


def generate(args: argparse.Namespace) -> int:
    config = engine_config(args)
    params = SamplingParams(args.max_tokens, temperature=args.temperature, seed=args.seed, ignore_eos=args.ignore_eos)
    with LLM(**{f.name: getattr(config, f.name) for f in fields(config)}) as llm:
        start = time.perf_counter()
        outputs = llm.generate(args.prompt, params, use_tqdm=True)
        seconds = time.perf_counter() - start
    for output in outputs:
        print(f"{output.prompt}{output.outputs[0].text}")
    tokens = sum(len(o.outputs[0].token_ids) for o in outputs)
    print(f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s", file=sys.stderr)
    return 0


def parse_counts(name: str, text: str) -> list[int]:
    """Integers by commas, or 1..512 for the powers of two in it and its ends."""
    first, dots, last = text.partition("..")
    try:
        counts = [int(n) for n in ((first, last) if dots else text.split(","))]
    except ValueError:
        counts = [0]
    if min(counts) < 1 or counts != sorted(counts):
        raise ValueError(f"{flag(name)} {text!r}: must be rising integers, such as 1,8,64 or 1..512")
    return sorted({*counts, *(1 << i for i in range(31) if dots and counts[0] < 1 << i < counts[1])})


def plan(args: argparse.Namespace) -> int:
    concurrency, sizes = (parse_counts(name, getattr(args, name)) for name in ("concurrency", "dcp_size"))
    args.max_num_seqs = max(args.max_num_seqs, *concurrency)
    configs = [engine_config(argparse.Namespace(**vars(args) | {"dcp_size": size})) for size in sizes]
    plans = [Plan(config, find_gpu(args.gpu), args.context) for config in configs]
    title = f"{configs[0].model}, tp {args.tp_size}, {args.gpu}, {args.context:,} tokens per request"
    memory, steps = [p.memory for p in plans], [p.time_step(n) for p in plans for n in concurrency]
    result = {"title": title, "memory": memory, "steps": steps}
    print(json.dumps(result) if args.json else describe(title, memory, steps))
    if args.plot:
        draw(title, steps, args.plot)
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="minidcp", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("serve", help="serve an OpenAI-compatible HTTP API", allow_abbrev=False)
    add_engine_flags(p)
    add_flags(p, ServeConfig)
    p.set_defaults(run=serve)

    p = commands.add_parser("generate", help="complete prompts and print them", allow_abbrev=False)
    add_engine_flags(p)
    p.add_argument("--prompt", action="append", required=True, help="may be given several times")
    p.add_argument("--max-tokens", type=int, default=128, help="tokens to generate per prompt")
    p.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    p.add_argument("--seed", type=int, help="makes sampling repeatable")
    p.add_argument("--ignore-eos", action="store_true", help="go on after the end-of-sequence token")
    p.set_defaults(run=generate)

    p = commands.add_parser("plan", help="estimate capacity and speed", allow_abbrev=False, conflict_handler="resolve")
    add_engine_flags(p)  # --dcp-size is declared anew
    p.add_argument("--dcp-size", "--decode-context-parallel-size", "-dcp", default="1", help="one or several: 1,2,4,8")
    p.add_argument("--gpu", required=True, help=f"{', '.join(GPUS)}, or memory=…,bandwidth=…,flops=…,link=… (in bytes)")
    p.add_argument("--context", type=int, default=4096, help="tokens of a request, in the mean while it decodes")
    p.add_argument("--concurrency", default="1..512", help="requests at once: a range, or several by commas")
    p.add_argument("--json", action="store_true", help="print JSON")
    p.add_argument("--plot", metavar="FILE", help="chart of tokens/s, .png or .svg")
    p.set_defaults(run=plan)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0, 1 if the engine ended by itself, 2 for a user's error."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    try:
        code: int = args.run(args)
        return code
    except ValueError as error:
        print(f"minidcp: error: {error}", file=sys.stderr)
        return 2
    except EngineDeadError as error:
        print(f"minidcp: the engine ended: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
