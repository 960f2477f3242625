r"""Prefill speed of the whole engine: several prompts, a long one, and what decoding requests wait.

    python benchmarks/prefill.py benchmarks/configs/deepseek-v2-lite --load-format dummy \
        --max-model-len 66000

FLOPs are the model's: two for each weight that a token meets, and for each head two for each pair
of a token and a token that it sees, and each dim of q and v. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from timing import time_calls

from minidcp.cli import add_engine_flags, engine_config
from minidcp.engine.engine import LLMEngine
from minidcp.model_config import ModelConfig
from minidcp.request import SamplingParams


def count_flops(config: ModelConfig, length: int) -> float:
    """FLOPs of a prompt without cached context. The head runs for the last token only."""
    num_layers = config.num_hidden_layers
    num_heads = config.num_attention_heads
    hidden = config.hidden_size

    if config.q_lora_rank is None:
        q = hidden * num_heads * config.qk_head_dim
    else:
        q = config.q_lora_rank * (hidden + num_heads * config.qk_head_dim)
    kv = hidden * config.latent_dim
    kv += config.kv_lora_rank * num_heads * (config.qk_nope_head_dim + config.v_head_dim)
    o = num_heads * config.v_head_dim * hidden

    num_moe_layers = sum(config.is_moe_layer(layer) for layer in range(num_layers))
    experts_per_token = config.num_experts_per_tok + config.n_shared_experts
    experts = 3 * hidden * config.moe_intermediate_size * experts_per_token
    router = hidden * config.n_routed_experts
    dense = 3 * hidden * config.intermediate_size

    weights = num_layers * (q + kv + o)
    weights += num_moe_layers * (experts + router)
    weights += (num_layers - num_moe_layers) * dense

    num_pairs = length * (length + 1) / 2
    scores = num_layers * num_heads * (config.qk_head_dim + config.v_head_dim) * num_pairs
    return 2 * (length * weights + scores + hidden * config.vocab_size)


def measure_matmul_rate(size: int = 8192) -> float:
    """bf16 FLOP/s of a product of random matrices on this GPU, the best of ten."""
    a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    times = time_calls(lambda: torch.mm(a, b), repeats=10)
    return float(2 * size**3 / min(times))


class Driver:
    """Adds requests and runs the engine until they are done."""

    def __init__(self, engine: LLMEngine) -> None:
        self.engine = engine
        self.num_requests = 0

    def add(self, length: int, max_tokens: int) -> None:
        """Add a request. No two prompts have a common prefix."""
        self.num_requests += 1
        vocab_size = self.engine.model_config.vocab_size
        prompt = [(self.num_requests * 7919 + j * 104729) % vocab_size for j in range(length)]
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        self.engine.add_request(str(self.num_requests), prompt, params)

    def run(self) -> float:
        """Run until all requests are done. Returns the seconds that this took."""
        start = time.perf_counter()
        while self.engine.has_work:
            self.engine.step()
        return time.perf_counter() - start


def measure_prompts(driver: Driver, count: int, length: int) -> dict[str, float]:
    """The speed of `count` prompts, compared with the rate of large matrix products."""
    engine = driver.engine
    matmul_rate = 0.0
    if engine.config.device == "cuda":
        matmul_rate = measure_matmul_rate() * engine.config.tp_size

    driver.add(length, 1)
    driver.run()  # compiles the kernels

    for _ in range(count):
        driver.add(length, 1)
    seconds = driver.run()
    rate = count * count_flops(engine.model_config, length) / seconds

    share = ""
    if matmul_rate:
        share = f", {rate / matmul_rate:.1%} of {matmul_rate / 1e12:.0f}"
    print(f"{count} × {length} tokens: {seconds:.2f} s, {rate / 1e12:.2f} TFLOP/s{share}")
    return {"prefill_s": seconds, "tflops": rate / 1e12, "matmul_tflops": matmul_rate / 1e12}


def measure_long_prompt(driver: Driver, length: int) -> tuple[float, float, float]:
    """A long prompt in chunks, compared with a prompt of one chunk.

    Returns:
        The seconds of the long prompt, the seconds of one chunk, and how many times longer the long
        prompt took than its FLOPs at the speed of one chunk.
    """
    config = driver.engine.model_config
    chunk = min(driver.engine.config.max_num_batched_tokens, length)
    driver.add(length, 1)
    seconds = driver.run()
    driver.add(chunk, 1)
    chunk_seconds = driver.run()

    expected = chunk_seconds * count_flops(config, length) / count_flops(config, chunk)
    ratio = seconds / expected
    print(
        f"{length} tokens in chunks of {chunk}: {seconds:.2f} s, {ratio:.2f} × the time that its "
        f"FLOPs would take at the speed of one chunk ({chunk_seconds * 1e3:.0f} ms)"
    )
    return seconds, chunk_seconds, ratio


def measure_gaps(driver: Driver, num_decoding: int, length: int) -> list[float]:
    """Seconds between the tokens of decoding requests while a long prompt is prefilled, sorted."""
    engine = driver.engine
    for _ in range(num_decoding):
        driver.add(64, 4096)
    for _ in range(20):  # until all of them decode
        engine.step()

    driver.add(length, 1)
    gaps: list[float] = []
    is_prefilling = True
    last = time.perf_counter()
    while is_prefilling:
        prompt_tokens_before = engine.stats.prompt_tokens
        engine.step()
        now = time.perf_counter()
        gaps.append(now - last)
        last = now
        # The steps in flight when the prompt was added are without it.
        is_prefilling = engine.stats.prompt_tokens > prompt_tokens_before or len(gaps) < 4
    return sorted(gaps)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_engine_flags(parser)
    parser.add_argument("--prompts", default="4x8192", help="number of prompts and their length")
    parser.add_argument("--long", type=int, default=65536, help="tokens of the long prompt")
    parser.add_argument(
        "--decoding", type=int, default=64, help="requests that decode during the long prompt"
    )
    args = parser.parse_args()
    count, length = map(int, args.prompts.split("x"))

    engine = LLMEngine(engine_config(args))
    driver = Driver(engine)
    chunk = engine.config.max_num_batched_tokens
    result: dict[str, float] = {"chunk": chunk}
    try:
        result.update(measure_prompts(driver, count, length))
        long_seconds, chunk_seconds, ratio = measure_long_prompt(driver, args.long)
        result["long_s"] = long_seconds
        result["long_ratio"] = ratio

        gaps = measure_gaps(driver, args.decoding, args.long)
        median = gaps[len(gaps) // 2]
        p99 = gaps[int(len(gaps) * 0.99)]
        # The mean is longer than the first chunk, because later chunks see more context.
        mean_chunk_seconds = long_seconds * chunk / args.long
        result["itl_p99_s"] = p99
        result["itl_in_mean_chunks"] = p99 / mean_chunk_seconds
        result["itl_in_first_chunks"] = p99 / chunk_seconds
        print(
            f"{args.decoding} requests decode meanwhile: {median * 1e3:.0f} ms between tokens "
            f"(median), {p99 * 1e3:.0f} ms (99th percentile), which is "
            f"{p99 / mean_chunk_seconds:.2f} mean chunks or {p99 / chunk_seconds:.2f} first chunks"
        )
    finally:
        engine.close()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
