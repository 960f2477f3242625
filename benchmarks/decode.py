"""Decode speed of the whole engine: tokens/s, with the prompts' time and without, and the share outside the model.

    python benchmarks/decode.py examples/demo-model --device cpu --ranks threads --tp-size 8 --dcp-size 8

Every batch ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time

from minidcp.cli import add_engine_flags, engine_config
from minidcp.engine.engine import LLMEngine
from minidcp.request import SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_flags(parser)
    parser.add_argument("--batch", default="8", help="requests that decode together; several by commas")
    parser.add_argument("--input-len", type=int, default=64, help="prompt tokens of each")
    parser.add_argument("--output-len", type=int, default=64, help="decode steps to measure")
    args = parser.parse_args()
    engine = LLMEngine(engine_config(args))
    try:
        for batch in args.batch.split(","):
            measure(engine, int(batch), args.input_len, args.output_len)
    finally:
        engine.close()


def measure(engine: LLMEngine, batch: int, input_len: int, output_len: int) -> None:
    length = output_len + 2
    params = SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True)
    vocab, begin = engine.model_config.vocab_size, time.perf_counter()
    for i in range(batch):
        prompt = [(i * 7919 + j * 104729) % vocab for j in range(input_len)]
        engine.add_request(str(i), prompt, params)
    started: set[str] = set()
    while len(started) < batch:  # prefill, and the first decode steps
        started |= {delta.request_id for delta in engine.step()}

    tokens, steps, inside = engine.stats.generated_tokens, engine.stats.steps, engine.stats.step_seconds
    start = time.perf_counter()
    while engine.has_work:
        engine.step()
    end = time.perf_counter()
    seconds = end - start
    tokens = engine.stats.generated_tokens - tokens
    steps = engine.stats.steps - steps
    outside = 1 - (engine.stats.step_seconds - inside) / seconds

    c = engine.config
    result = {
        "tp_size": c.tp_size,
        "dcp_size": c.dcp_size,
        "dcp_comm_backend": c.dcp_comm_backend,
        "batch": batch,
        "tokens_per_second": round(tokens / seconds, 1),
        "tokens_per_second_with_prompts": round(batch * length / (end - begin), 1),
        "step_ms": round(seconds / steps * 1e3, 2),
        "share_outside_model": round(outside, 4),
    }
    print(f"tp {c.tp_size}, dcp {c.dcp_size} ({c.dcp_comm_backend}), batch {batch}, ranks as {c.ranks}:")
    print(
        f"  {tokens / seconds:8.1f} tokens/s in all; {result['tokens_per_second_with_prompts']} with the prompts' time"
    )
    print(f"  {seconds / steps * 1e3:8.2f} ms per step")
    print(f"  {outside:8.2%} of the time outside the model")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
