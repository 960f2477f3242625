"""Prefill of the whole engine: its share of the matmul rate, a long prompt in chunks, and what decoding
requests wait meanwhile.

    python benchmarks/prefill.py benchmarks/configs/deepseek-v2-lite --load-format dummy --max-model-len 66000

FLOPs are the model's: two per weight that a token meets, and two per head, pair of a token and one that it
sees, and dim of q and v. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time

import torch

from minidcp.cli import add_engine_flags, engine_config
from minidcp.engine.engine import LLMEngine
from minidcp.model_config import ModelConfig
from minidcp.request import SamplingParams


def count_flops(c: ModelConfig, length: int) -> float:
    """Of a prompt of that length, computed from its beginning; the head only for its last token."""
    heads, hidden = c.num_attention_heads, c.hidden_size
    q = hidden * heads * c.qk_head_dim if c.q_lora_rank is None else c.q_lora_rank * (hidden + heads * c.qk_head_dim)
    kv = hidden * c.latent_dim + c.kv_lora_rank * heads * (c.qk_nope_head_dim + c.v_head_dim)
    attention = q + kv + heads * c.v_head_dim * hidden
    moe_layers = sum(c.is_moe_layer(i) for i in range(c.num_hidden_layers))
    experts = 3 * hidden * c.moe_intermediate_size * (c.num_experts_per_tok + c.n_shared_experts)
    router = hidden * c.n_routed_experts
    dense = 3 * hidden * c.intermediate_size * (c.num_hidden_layers - moe_layers)
    weights = c.num_hidden_layers * attention + moe_layers * (experts + router) + dense
    seen = length * (length + 1) / 2
    scores = c.num_hidden_layers * heads * (c.qk_head_dim + c.v_head_dim) * seen
    return 2 * (length * weights + scores + hidden * c.vocab_size)


def measure_matmul_rate(size: int = 8192) -> float:
    """bf16 FLOP/s of a product of random matrices on this GPU, the best of ten."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        torch.mm(a, b)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return float(2 * size**3 / min(times[2:]))


class Driver:
    """Adds requests and steps the engine, with a clock."""

    def __init__(self, engine: LLMEngine) -> None:
        self.engine, self.count = engine, 0

    def add(self, length: int, max_tokens: int) -> str:
        self.count += 1
        vocab = self.engine.model_config.vocab_size
        prompt = [(self.count * 7919 + j * 104729) % vocab for j in range(length)]
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        self.engine.add_request(str(self.count), prompt, params)
        return str(self.count)

    def run(self) -> float:
        """Seconds until there is nothing left to do."""
        start = time.perf_counter()
        while self.engine.has_work:
            self.engine.step()
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_flags(parser)
    parser.add_argument("--prompts", default="4x8192", help="how many prompts of how many tokens")
    parser.add_argument("--long", type=int, default=65536, help="tokens of the long prompt")
    parser.add_argument("--decoding", type=int, default=64, help="requests that decode meanwhile")
    args = parser.parse_args()
    count, length = map(int, args.prompts.split("x"))
    engine = LLMEngine(engine_config(args))
    driver, config = Driver(engine), engine.model_config
    chunk = engine.config.max_num_batched_tokens or 0
    result: dict[str, float] = {"chunk": chunk}
    try:
        on_gpu = engine.config.device == "cuda"
        rate = measure_matmul_rate() * engine.config.tp_size if on_gpu else 0.0
        driver.add(length, 1)
        driver.run()  # kernels are compiled

        for _ in range(count):
            driver.add(length, 1)
        seconds = driver.run()
        flops = count * count_flops(config, length)
        result |= {"prefill_s": seconds, "tflops": flops / seconds / 1e12, "matmul_tflops": rate / 1e12}
        share = f", {flops / seconds / rate:.1%} of {rate / 1e12:.0f}" if rate else ""
        print(f"{count} × {length} tokens: {seconds:.2f} s, {flops / seconds / 1e12:.2f} TFLOP/s{share}")

        driver.add(args.long, 1)
        seconds = driver.run()
        driver.add(chunk, 1)
        one = driver.run()
        fair = one * count_flops(config, args.long) / count_flops(config, chunk)
        result |= {"long_s": seconds, "long_ratio": seconds / fair}
        print(f"{args.long} tokens in chunks of {chunk}: {seconds:.2f} s, {seconds / fair:.2f} × what the"
              f" FLOPs of one chunk ({one * 1e3:.0f} ms) make of it")  # fmt: skip

        for _ in range(args.decoding):
            driver.add(64, 4096)
        for _ in range(20):  # all decode
            engine.step()
        driver.add(args.long, 1)
        last, gaps, prefilling = time.perf_counter(), [], True
        while prefilling:
            before = engine.stats.prompt_tokens
            engine.step()
            now = time.perf_counter()
            gaps.append(now - last)
            last = now
            prefilling = engine.stats.prompt_tokens > before or len(gaps) < 4
        gaps.sort()
        p99 = gaps[int(len(gaps) * 0.99)]
        result |= {"itl_p99_s": p99, "itl_ratio": p99 / one}
        median = gaps[len(gaps) // 2]
        print(f"{args.decoding} decoding requests meanwhile: {median * 1e3:.0f} ms between tokens (median),"
              f" {p99 * 1e3:.0f} (99 %), {p99 / one:.2f} chunks")  # fmt: skip
    finally:
        engine.close()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
