"""What /metrics and /load tell. Names as vLLM has them, where it has them: dashboards know those."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from minidcp import __version__
from minidcp.engine.engine import LLMEngine
from minidcp.engine.model_runner import StepResult
from minidcp.engine.scheduler import PlannedStep
from minidcp.request import OutputDelta

LATENCIES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKENS = tuple(2**i for i in range(18))
HISTOGRAMS = {
    "time_to_first_token_seconds": (LATENCIES, "from arrival to the first token"),
    "inter_token_latency_seconds": (LATENCIES, "between a request's tokens"),
    "e2e_request_latency_seconds": (LATENCIES, "from arrival to the last token"),
    "request_queue_time_seconds": (LATENCIES, "from arrival to the first step"),
    "request_prompt_tokens": (TOKENS, "per request"),
    "request_generation_tokens": (TOKENS, "per request"),
}


@dataclass
class Times:
    """When a request arrived and when its last token came; how many came."""

    prompt_tokens: int
    tokens: int = 0
    waits: bool = True
    arrived: float = field(default_factory=time.monotonic)
    last: float = field(default_factory=time.monotonic)


class Metrics(Collector):
    """A registry of its own. `observe` is called by the engine's thread, the others by the loop."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self.labels = {"model_name": model_name, "engine": "0"}
        shapes = HISTOGRAMS.items()
        self.histograms = {name: self.make(Histogram, f"vllm:{name}", what, buckets=b) for name, (b, what) in shapes}
        self.success = self.make(Counter, "vllm:request_success", "finished requests", "finished_reason")
        self.step_seconds = self.make(Histogram, "minidcp:step_seconds", "on rank 0", "kind", buckets=LATENCIES)
        self.times: dict[str, Times] = {}
        self.started = time.monotonic()

    def make(self, kind: type[Any], name: str, what: str, *labels: str, **options: Any) -> Any:
        metric = kind(name, what, [*self.labels, *labels], registry=self.registry, **options)
        return metric if labels else metric.labels(**self.labels)

    def watch(self, engine: LLMEngine) -> None:
        """Tell of this engine, too, whenever somebody asks."""
        self.engine = engine
        self.registry.register(self)
        capacity = self.make(Gauge, "minidcp:kv_tokens_capacity", "tokens that a rank's cache holds", "rank")
        for rank, tokens in enumerate(engine.kv_tokens()[0]):
            capacity.labels(**self.labels, rank=rank).set(tokens)

    def collect(self) -> Iterator[Metric]:
        """What can be read off the engine; part of prometheus_client's contract of a collector."""
        scheduler, blocks, stats = self.engine.scheduler, self.engine.blocks, self.engine.stats
        gauges = {
            "vllm:num_requests_running": len(scheduler.running),
            "vllm:num_requests_waiting": len(scheduler.waiting),
            "vllm:kv_cache_usage_perc": 1 - blocks.num_available / blocks.num_blocks,
            "minidcp:kv_blocks_free": len(blocks.free),
        }
        counters = {
            "vllm:prompt_tokens": stats.prompt_tokens + scheduler.num_cached_tokens,
            "vllm:generation_tokens": stats.generated_tokens,
            "vllm:num_preemptions": scheduler.num_preemptions,
            "vllm:prefix_cache_queries": scheduler.num_queried_tokens,
            "vllm:prefix_cache_hits": scheduler.num_cached_tokens,
            "minidcp:exchange_bytes": stats.received_bytes,
        }
        for family, values in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, value in values.items():
                metric = family(name, name.split(":")[1].replace("_", " "), labels=list(self.labels))
                metric.add_metric(list(self.labels.values()), value)
                yield metric

    def observe(self, step: PlannedStep, result: StepResult | None) -> None:
        """A step is planned, or there is its result."""
        now, admitted, decodes = time.monotonic(), len(step.plan.admitted), step.plan.num_decode
        if result is not None:
            kind = "decode" if decodes == len(step.requests) else "mixed" if decodes else "prefill"
            self.step_seconds.labels(**self.labels, kind=kind).observe(result.seconds)
            return
        for request in step.requests[len(step.requests) - admitted :]:  # a request's first row is the last so far
            times = self.times.get(request.request_id)
            if times is not None and times.waits:
                times.waits = False
                self.histograms["request_queue_time_seconds"].observe(now - times.arrived)

    def count_request(self, request_id: str, tokens: list[int]) -> None:
        self.times[request_id] = Times(len(tokens))

    def count_token(self, delta: OutputDelta) -> None:
        times, now = self.times[delta.request_id], time.monotonic()
        first = "time_to_first_token_seconds" if not times.tokens else "inter_token_latency_seconds"
        self.histograms[first].observe(now - times.last)
        times.last, times.tokens = now, times.tokens + len(delta.token_ids)
        if delta.finish_reason is not None:
            self.histograms["e2e_request_latency_seconds"].observe(now - times.arrived)
            self.histograms["request_prompt_tokens"].observe(times.prompt_tokens)
            self.histograms["request_generation_tokens"].observe(times.tokens)
            self.success.labels(**self.labels, finished_reason=delta.finish_reason.value).inc()
            del self.times[delta.request_id]

    def forget(self, request_ids: list[str]) -> None:
        """Those that were left before their end."""
        for request_id in request_ids:
            if self.times.pop(request_id, None) is not None:
                self.success.labels(**self.labels, finished_reason="abort").inc()

    def describe_load(self, engine: LLMEngine, model_name: str) -> dict[str, Any]:
        """What the page at / shows."""
        scheduler, blocks, (capacity, used) = engine.scheduler, engine.blocks, engine.kv_tokens()
        total, cached, free = blocks.num_blocks, len(blocks.cached), len(blocks.free)
        return {
            "model": model_name,
            "version": __version__,
            "uptime_seconds": time.monotonic() - self.started,
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "prompt_tokens": engine.stats.prompt_tokens + scheduler.num_cached_tokens,
            "generated_tokens": engine.stats.generated_tokens,
            "cached_tokens": scheduler.num_cached_tokens,
            "kv_blocks": {"total": total, "live": total - cached - free, "cached": cached, "free": free},
            "kv_tokens": {"capacity": capacity, "used": used},
            "config": {name: value for name, value in asdict(engine.config).items() if value is not None},
        }
