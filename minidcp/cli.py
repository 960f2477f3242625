"""The command line: `minidcp serve MODEL …`, `minidcp generate MODEL --prompt …` and `minidcp plan MODEL --gpu …`."""

import argparse
import json
import logging
import sys
import time
from dataclasses import asdict
from functools import partial
from typing import Any

from minidcp.config import EngineConfig, Options, ServeConfig, flag, require
from minidcp.engine.executor import EngineDeadError
from minidcp.llm import LLM
from minidcp.plan import GPUS, Plan, describe, draw, find_gpu, parse_counts
from minidcp.request import SamplingParams


def add_flags(parser: argparse.ArgumentParser, options: type[Options]) -> None:
    """A flag per option."""
    for field, kinds in options.options():
        names = [flag(field.name), *field.metadata["aliases"]]
        value: dict[str, Any] = {"type": kinds[0], "choices": (kinds[0] is str and field.metadata["choices"]) or None}
        if kinds[0] is bool:
            value = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(*names, dest=field.name, default=field.default, help=field.metadata["help"], **value)


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """The model, a flag per field of EngineConfig, and what users of SGLang type."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="checkpoint directory or Hugging Face name")
    parser.add_argument("--model-path", "--model", dest="model_flag", metavar="MODEL", help="the same as a flag")
    add_flags(parser, EngineConfig)
    # SGLang's spellings that are not simply another name.
    add_meaning = partial(parser.add_argument, action="store_const", default=argparse.SUPPRESS)
    add_meaning("--enable-symm-mem", dest="comm", const="symmetric", help="--comm symmetric")
    add_meaning("--disable-radix-cache", dest="prefix_cache", const=False, help="--no-prefix-cache")
    add_meaning("--disable-cuda-graph", "--enforce-eager", dest="cuda_graph", const=False, help="--no-cuda-graph")
    parser.add_argument("--trust-remote-code", action="store_true", help="ignored: no remote code is ever run")


def engine_config(args: argparse.Namespace, **changes: Any) -> EngineConfig:
    given = {model for model in (args.model, args.model_flag) if model}
    require(given, "MODEL is missing: a checkpoint directory or a Hugging Face name")
    require(len(given) == 1, f"--model-path {args.model_flag!r}: MODEL is given twice, also as {args.model!r}")
    return EngineConfig(given.pop(), **{f.name: getattr(args, f.name) for f, _ in EngineConfig.options()} | changes)


def serve(args: argparse.Namespace) -> int:
    try:
        from minidcp_server.app import serve as run  # the engine runs where no web framework is installed
    except ImportError as error:
        raise ValueError(f"serve needs the extra 'server': pip install 'minidcp[server]' ({error})") from None
    options = {f.name: getattr(args, f.name) for f, _ in ServeConfig.options()}
    return int(run(engine_config(args), ServeConfig(**options)))


def generate(args: argparse.Namespace) -> int:
    params = SamplingParams(args.max_tokens, temperature=args.temperature, seed=args.seed, ignore_eos=args.ignore_eos)
    with LLM(**asdict(engine_config(args))) as llm:
        start = time.perf_counter()
        outputs = llm.generate(args.prompt, params, use_tqdm=True)
        seconds = time.perf_counter() - start
    for output in outputs:
        print(f"{output.prompt}{output.outputs[0].text}")
    tokens = sum(len(o.outputs[0].token_ids) for o in outputs)
    print(f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s", file=sys.stderr)
    return 0


def plan(args: argparse.Namespace) -> int:
    concurrency, sizes = (parse_counts(name, getattr(args, name)) for name in ("concurrency", "dcp_size"))
    require(not args.plot or args.plot.endswith((".png", ".svg")), f"--plot {args.plot!r}: must end in .png or .svg")
    plans = [Plan(engine_config(args, dcp_size=n), find_gpu(args.gpu), args.context) for n in sizes]
    title = f"{plans[0].config.model}, tp {args.tp_size}, {args.gpu}, {args.context:,} tokens per request"
    memory, steps = [p.memory for p in plans], [p.time_step(n) for p in plans for n in concurrency]
    if args.plot:
        draw(title, steps, args.plot)
    result = {"title": title, "memory": memory, "steps": steps}
    print(json.dumps(result) if args.json else describe(title, memory, steps))
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

    p = commands.add_parser("plan", help="what fits, and how fast", allow_abbrev=False, conflict_handler="resolve")
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
        return int(args.run(args))
    except ValueError as error:
        print(f"minidcp: error: {error}", file=sys.stderr)
        return 2
    except EngineDeadError as error:
        print(f"minidcp: the engine ended: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
