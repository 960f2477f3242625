"""What /metrics and /load report. Metrics are named as in vLLM where it has them, because existing
dashboards know those names."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from minidcp import __version__
from minidcp.batch import StepResult
from minidcp.engine.engine import LLMEngine
from minidcp.engine.scheduler import ScheduledStep
from minidcp.request import OutputDelta

from .latency import RecentLatencies, measure_span

SECONDS_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300,
)  # fmt: skip
TOKENS_BUCKETS = tuple(2**i for i in range(18))


@dataclass
class RequestTimes:
    """What is measured of one request while it waits and runs; times are time.monotonic()."""

    num_prompt_tokens: int
    num_output_tokens: int = 0
    is_waiting: bool = True
    arrived_at: float = field(default_factory=time.monotonic)
    last_token_at: float = field(default_factory=time.monotonic)  # at first, the arrival


class Metrics:
    """Prometheus metrics in a registry of their own. It is the engine's StepListener: the engine's
    thread calls `on_scheduled` and `on_finished`. The event loop calls the `count_` methods."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self.labels = {"model_name": model_name, "engine": "0"}
        self.requests: dict[str, RequestTimes] = {}  # those that are not finished, by id
        # Of all prompts whose first token is there. The engine computes some of them not at all,
        # and others twice: its own counters have what it computed.
        self.num_prompt_tokens = 0

        self.time_to_first_token = self.make_histogram(
            "vllm:time_to_first_token_seconds", "from arrival to the first token", SECONDS_BUCKETS
        )
        self.inter_token_latency = self.make_histogram(
            "vllm:inter_token_latency_seconds", "between a request's tokens", SECONDS_BUCKETS
        )
        self.request_latency = self.make_histogram(
            "vllm:e2e_request_latency_seconds", "from arrival to the last token", SECONDS_BUCKETS
        )
        self.queue_time = self.make_histogram(
            "vllm:request_queue_time_seconds", "from arrival to the first step", SECONDS_BUCKETS
        )
        self.prompt_tokens = self.make_histogram(
            "vllm:request_prompt_tokens", "per request", TOKENS_BUCKETS
        )
        self.generation_tokens = self.make_histogram(
            "vllm:request_generation_tokens", "per request", TOKENS_BUCKETS
        )

        # The same two, over the last minutes.
        self.started_at = time.monotonic()
        self.recent_first_token = RecentLatencies()
        self.recent_inter_token = RecentLatencies()

        self.finished_requests = Counter(
            "vllm:request_success",
            "finished requests",
            [*self.labels, "finished_reason"],
            registry=self.registry,
        )
        self.step_seconds = Histogram(
            "minidcp:step_seconds",
            "on rank 0",
            [*self.labels, "kind"],
            registry=self.registry,
            buckets=SECONDS_BUCKETS,
        )

    def make_histogram(self, name: str, description: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(
            name, description, list(self.labels), registry=self.registry, buckets=buckets
        )
        return histogram.labels(**self.labels)

    def watch(self, engine: LLMEngine) -> None:
        """Add the metrics that are read from the engine whenever they are scraped."""
        self.registry.register(EngineCollector(engine, self))

        capacity_gauge = Gauge(
            "minidcp:kv_tokens_capacity",
            "tokens that a rank's cache holds",
            [*self.labels, "rank"],
            registry=self.registry,
        )
        capacity_by_rank, _ = engine.kv_tokens()
        for rank, capacity in enumerate(capacity_by_rank):
            capacity_gauge.labels(**self.labels, rank=rank).set(capacity)

    def on_scheduled(self, step: ScheduledStep) -> None:
        now = time.monotonic()
        for request in step.admitted:
            times = self.requests.get(request.request_id)
            # A request that was preempted is admitted again; its client may have left.
            if times is not None and times.is_waiting:
                times.is_waiting = False
                self.queue_time.observe(now - times.arrived_at)

    def on_finished(self, step: ScheduledStep, result: StepResult) -> None:
        num_decode = step.plan.num_decode
        if num_decode == len(step.requests):
            kind = "decode"
        elif num_decode > 0:
            kind = "mixed"
        else:
            kind = "prefill"
        self.step_seconds.labels(**self.labels, kind=kind).observe(result.seconds)

    def count_request(self, request_id: str, num_prompt_tokens: int) -> None:
        """A request has arrived."""
        self.requests[request_id] = RequestTimes(num_prompt_tokens)

    def count_delta(self, delta: OutputDelta) -> None:
        """A request has got tokens, and may have finished."""
        times = self.requests[delta.request_id]
        now = time.monotonic()
        is_first = times.num_output_tokens == 0
        if is_first:
            self.num_prompt_tokens += times.num_prompt_tokens
        if delta.token_ids:  # a grammar's end has none
            latency = now - times.last_token_at
            if is_first:
                self.time_to_first_token.observe(latency)
                self.recent_first_token.add(latency)
            else:
                self.inter_token_latency.observe(latency)
                self.recent_inter_token.add(latency)
            times.last_token_at = now
            times.num_output_tokens += len(delta.token_ids)

        if delta.finish_reason is not None:
            self.request_latency.observe(now - times.arrived_at)
            self.prompt_tokens.observe(times.num_prompt_tokens)
            self.generation_tokens.observe(times.num_output_tokens)
            self.count_finished(delta.request_id, delta.finish_reason.value)

    def describe_latency(self) -> dict[str, Any]:
        """Percentiles over the last minutes, in seconds."""
        return {
            "span_seconds": measure_span(self.started_at),
            "time_to_first_token": self.recent_first_token.describe(),
            "inter_token": self.recent_inter_token.describe(),
        }

    def count_aborted(self, request_ids: list[str]) -> None:
        """These requests were abandoned; those that had finished already do not count."""
        for request_id in request_ids:
            if request_id in self.requests:
                self.count_finished(request_id, "abort")

    def count_finished(self, request_id: str, reason: str) -> None:
        self.finished_requests.labels(**self.labels, finished_reason=reason).inc()
        del self.requests[request_id]


class EngineCollector(Collector):
    """Metrics that need no bookkeeping here: the engine has their values."""

    def __init__(self, engine: LLMEngine, metrics: Metrics) -> None:
        self.engine = engine
        self.metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """Called by prometheus_client at every scrape."""
        scheduler = self.engine.scheduler
        blocks = self.engine.blocks
        stats = self.engine.stats
        gauges = {
            "vllm:num_requests_running": len(scheduler.running),
            "vllm:num_requests_waiting": len(scheduler.waiting),
            "vllm:kv_cache_usage_perc": 1 - blocks.num_available / blocks.num_blocks,
            "minidcp:kv_blocks_free": len(blocks.free),
        }
        counters = {
            "vllm:prompt_tokens": self.metrics.num_prompt_tokens,
            "vllm:generation_tokens": stats.generated_tokens,
            "vllm:num_preemptions": scheduler.num_preemptions,
            "vllm:prefix_cache_queries": scheduler.num_queried_tokens,
            "vllm:prefix_cache_hits": scheduler.num_cached_tokens,
            "minidcp:exchange_bytes": stats.received_bytes,
        }
        if self.engine.config.num_speculative_tokens > 0:  # vLLM has them only then
            counters["vllm:spec_decode_num_drafts"] = stats.rows_with_drafts
            counters["vllm:spec_decode_num_draft_tokens"] = stats.drafts
            counters["vllm:spec_decode_num_accepted_tokens"] = stats.accepted_drafts
            yield self.collect_accepted_by_place()

        label_names = list(self.metrics.labels)
        label_values = list(self.metrics.labels.values())
        for name, value in gauges.items():
            gauge = GaugeMetricFamily(name, describe(name), labels=label_names)
            gauge.add_metric(label_values, value)
            yield gauge
        for name, value in counters.items():
            counter = CounterMetricFamily(name, describe(name), labels=label_names)
            counter.add_metric(label_values, value)
            yield counter

    def collect_accepted_by_place(self) -> Metric:
        """How often a row's first, second, … draft was right, for every place that there can be."""
        name = "vllm:spec_decode_num_accepted_tokens_per_pos"
        counter = CounterMetricFamily(
            name, describe(name), labels=[*self.metrics.labels, "position"]
        )
        for place, count in enumerate(list_accepted(self.engine)):
            counter.add_metric([*self.metrics.labels.values(), str(place)], count)
        return counter


def describe(name: str) -> str:
    """Help for a metric from its name: "vllm:num_preemptions" -> "num preemptions"."""
    _, name_in_namespace = name.split(":")
    return name_in_namespace.replace("_", " ")


def list_accepted(engine: LLMEngine) -> list[int]:
    """How often the draft in each place was accepted, with 0 for places that none had so far."""
    counts = list(engine.stats.accepted_by_place)
    return counts + [0] * (engine.config.num_speculative_tokens - len(counts))


def describe_drafts(engine: LLMEngine) -> dict[str, Any] | None:
    """What became of the drafts since the start. None if speculative decoding is off."""
    if engine.config.num_speculative_tokens == 0:
        return None
    stats = engine.stats
    return {
        "rows": stats.rows_with_drafts,
        "proposed": stats.drafts,
        "accepted": stats.accepted_drafts,
        "accepted_by_place": list_accepted(engine),
    }


def describe_load(
    engine: LLMEngine, metrics: Metrics, model_name: str, uptime_seconds: float
) -> dict[str, Any]:
    """The body of GET /load; the page at / shows it."""
    scheduler = engine.scheduler
    num_blocks = engine.blocks.num_blocks
    num_cached = len(engine.blocks.cached)
    num_free = len(engine.blocks.free)
    capacity_by_rank, used_by_rank = engine.kv_tokens()
    tokenizer = engine.tokenizer
    return {
        "model": model_name,
        "version": __version__,
        "uptime_seconds": uptime_seconds,
        "running": len(scheduler.running),
        "waiting": len(scheduler.waiting),
        "prompt_tokens": metrics.num_prompt_tokens,
        "generated_tokens": engine.stats.generated_tokens,
        "cached_tokens": scheduler.num_cached_tokens,
        "drafts": describe_drafts(engine),
        "kv_blocks": {
            "total": num_blocks,
            "live": num_blocks - num_cached - num_free,
            "cached": num_cached,
            "free": num_free,
        },
        "kv_tokens": {"capacity": capacity_by_rank, "used": used_by_rank},
        "latency": metrics.describe_latency(),
        "config": asdict(engine.config),
        "asked": asdict(engine.asked),
        "setup": None if engine.setup is None else asdict(engine.setup),
        "sampling_defaults": engine.sampling_defaults,
        "has_chat_template": tokenizer is not None and tokenizer.chat_template is not None,
    }
