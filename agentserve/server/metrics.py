"""Prometheus metrics. Names and buckets follow vLLM with the prefix `agentserve:`, so that dashboards can be ported."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from agentserve.core.batch import Lane
from agentserve.core.controllers import Decision
from agentserve.core.events import RequestStats
from agentserve.core.stats import EngineStats, TierStats
from agentserve.server.token_history import TokenHistory

PREFIX = "agentserve:"
_Family: TypeAlias = type[CounterMetricFamily] | type[GaugeMetricFamily]
_TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_ITL_BUCKETS = (
    *(0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_LATENCY_BUCKETS = (
    *(0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0),
)
_TOKEN_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000)


class ServerMetrics:
    """All metrics of one server, in a registry of their own. Used on the event loop only."""

    def __init__(self, model_name: str, engine_stats: Callable[[], EngineStats]) -> None:
        self._model_name = model_name
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(model_name, engine_stats))
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "From the arrival of the HTTP request to its first token.", _TTFT_BUCKETS
        )
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of a choice as its stream sees them.", _ITL_BUCKETS
        )
        self._e2e = self._histogram(
            "e2e_request_latency_seconds", "From the arrival of the HTTP request to its end.", _LATENCY_BUCKETS
        )
        self._queue = self._histogram(
            "request_queue_time_seconds", "From the arrival at the engine to the first batch.", _LATENCY_BUCKETS
        )
        self._prefill = self._histogram(
            "request_prefill_time_seconds", "From the first batch to the first token.", _LATENCY_BUCKETS
        )
        self._decode = self._histogram(
            "request_decode_time_seconds", "From the first token to the last one.", _LATENCY_BUCKETS
        )
        self._prompt_lengths = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKEN_BUCKETS)
        self._output_lengths = self._histogram(
            "request_generation_tokens", "Output tokens of a request.", _TOKEN_BUCKETS
        )
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of the requests that ended.")
        self._aborted = self._counter("num_aborted_requests", "Requests that were cancelled.")
        self._failed = self._counter("num_failed_requests", "Accepted requests that the engine could not finish.")
        self._misses = Counter(
            PREFIX + "prefix_miss",
            "Prompts by the reason why not more of them was found in the prefix cache (none: all there could be was).",
            ["model_name", "reason"],
            registry=self._registry,
        )
        self._breakers = Counter(
            PREFIX + "cache_breakers",
            "Parts of system prompts and tools that change from request to request, by what they are.",
            ["model_name", "kind"],
            registry=self._registry,
        )
        self._success = Counter(
            PREFIX + "request_success",
            "Requests that ended well.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )

    def count_request(self, outcome: str, num_output_tokens: int, e2e_s: float, stats: RequestStats | None) -> None:
        """Counts one engine request. `outcome` is a `FinishReason`; `stats` is None when it was left early."""
        if outcome == "cancelled":
            self._aborted.inc()
            return
        if outcome == "error" or stats is None:
            self._failed.inc()
            return
        self._success.labels(self._model_name, outcome).inc()
        self._e2e.observe(e2e_s)
        self._prompt_tokens.inc(stats.num_prompt_tokens)
        self._prompt_lengths.observe(stats.num_prompt_tokens)
        self._output_lengths.observe(num_output_tokens)
        if stats.first_scheduled_ns is not None and stats.first_token_ns is not None:
            self._queue.observe((stats.first_scheduled_ns - stats.arrival_ns) / 1e9)
            self._prefill.observe((stats.first_token_ns - stats.first_scheduled_ns) / 1e9)
            if stats.last_token_ns is not None:
                self._decode.observe((stats.last_token_ns - stats.first_token_ns) / 1e9)

    def count_miss(self, reason: str) -> None:
        """Counts a prompt; `reason` is a `MissReason`."""
        self._misses.labels(self._model_name, reason).inc()

    def count_breaker(self, kind: str) -> None:
        """Counts a cache breaker when it is found."""
        self._breakers.labels(self._model_name, kind).inc()

    def watch_history(self, history: TokenHistory) -> None:
        """Shows what is kept of answers."""
        self._registry.register(_HistoryCollector(self._model_name, history))

    def render(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(PREFIX + name, text, ["model_name"], buckets=buckets, registry=self._registry)
        return histogram.labels(self._model_name)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(PREFIX + name, text, ["model_name"], registry=self._registry).labels(self._model_name)


class _HistoryCollector(Collector):
    """Reads the counters of the token history when somebody scrapes."""

    def __init__(self, model_name: str, history: TokenHistory) -> None:
        self._model_name = model_name
        self._history = history

    def collect(self) -> Iterator[Metric]:
        stats = self._history.stats()
        values: tuple[tuple[_Family, str, str, int], ...] = (
            (GaugeMetricFamily, "bytes", "Bytes of answers kept as token ids.", stats.num_bytes),
            (GaugeMetricFamily, "turns", "Answers kept as token ids.", stats.num_turns),
            (CounterMetricFamily, "stored_turns", "Answers stored.", stats.num_stored_turns),
            (CounterMetricFamily, "reused_turns", "Answers read again as they were written.", stats.num_reused_turns),
            (CounterMetricFamily, "evicted_turns", "Answers forgotten to make room.", stats.num_evicted_turns),
        )
        for family, name, text, value in values:
            metric = family(f"{PREFIX}token_history_{name}", text, labels=["model_name"])
            metric.add_metric([self._model_name], value)
            yield metric


class _EngineCollector(Collector):
    """Reads the engine's counters when somebody scrapes, so that they cost nothing in between."""

    def __init__(self, model_name: str, engine_stats: Callable[[], EngineStats]) -> None:
        self._model_name = model_name
        self._engine_stats = engine_stats

    def collect(self) -> Iterator[Metric]:
        stats = self._engine_stats()
        num_used = stats.num_blocks - stats.num_free_blocks - stats.num_cached_blocks
        yield self._gauge("num_requests_running", "Requests that hold KV blocks.", stats.num_running)
        yield self._gauge("num_requests_waiting", "Requests that wait for KV blocks.", stats.num_waiting)
        yield self._gauge(
            "kv_cache_usage_perc",
            "Share of the KV blocks that running requests use (1: all).",
            num_used / stats.num_blocks if stats.num_blocks else 0.0,
        )
        yield self._counter(
            "prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.num_prefix_query_tokens
        )
        yield self._counter(
            "prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.num_prefix_hit_tokens
        )
        cached = CounterMetricFamily(
            PREFIX + "cached_tokens", "Prompt tokens that were not computed.", labels=["model_name", "cache_source"]
        )
        num_loaded = sum(tier.num_hit_tokens for tier in stats.tiers)
        # What was loaded for a request that was cancelled meanwhile never counted as found.
        num_on_device = max(0, stats.num_prefix_hit_tokens - num_loaded)
        cached.add_metric([self._model_name, "device"], num_on_device)
        for tier in stats.tiers:
            cached.add_metric([self._model_name, tier.tier], tier.num_hit_tokens)
        yield cached
        if stats.tiers:
            yield from self._tiers(stats.tiers)
        yield self._counter("generation_tokens", "Tokens generated.", stats.num_generated_tokens)
        yield self._counter("num_preemptions", "Requests whose KV blocks were taken.", stats.num_preemptions)
        yield self._counter("num_evicted_blocks", "Cached KV blocks that were evicted.", stats.num_evicted_blocks)
        yield self._counter("num_batches_prefill", "Batches of the prefill lane.", stats.num_batches_prefill)
        yield self._counter("num_batches_decode", "Batches of the decode lane.", stats.num_batches_decode)
        if stats.decision is not None:
            yield from self._decision(stats.decision)

    def _tiers(self, tiers: Sequence[TierStats]) -> Iterator[Metric]:
        families: tuple[tuple[_Family, str, str, Callable[[TierStats], int]], ...] = (
            (GaugeMetricFamily, "blocks", "KV blocks that the tier has room for.", lambda t: t.num_blocks),
            (GaugeMetricFamily, "used_blocks", "KV blocks in the tier.", lambda t: t.num_used_blocks),
            (CounterMetricFamily, "stored_bytes", "KV copied into the tier.", lambda t: t.stored_bytes),
            (CounterMetricFamily, "loaded_bytes", "KV copied from the tier to the device.", lambda t: t.loaded_bytes),
            (CounterMetricFamily, "dropped_blocks", "KV blocks not taken in.", lambda t: t.num_dropped_blocks),
            (CounterMetricFamily, "failed_transfers", "Copies that failed.", lambda t: t.num_failed_transfers),
        )
        for family, name, text, value in families:
            metric = family(f"{PREFIX}kv_tier_{name}", text, labels=["model_name", "tier"])
            for tier in tiers:
                metric.add_metric([self._model_name, tier.tier], value(tier))
            yield metric

    def _decision(self, decision: Decision) -> Iterator[Metric]:
        partition = GaugeMetricFamily(
            PREFIX + "partition_units",
            "Compute units of a lane while both kinds of work are present.",
            labels=["model_name", "lane", "kind"],
        )
        for lane in Lane:
            units = decision.partition.units(lane)
            partition.add_metric([self._model_name, lane.value, decision.partition.kind.value], units)
        yield partition
        yield self._gauge("resume_budget", "Resume-prefill tokens that may join a decode step.", decision.resume_budget)
        yield self._gauge("prefill_chunk", "Prompt tokens in a batch that reads prompts.", decision.prefill_chunk)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, text, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(PREFIX + name, text, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family
