"""Prometheus metrics. Names and buckets follow vLLM with the prefix `agentserve:`, so that dashboards can be ported."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeAlias

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from agentserve.core.batch import Lane
from agentserve.core.controllers import Decision
from agentserve.core.events import RequestStats
from agentserve.core.stats import EngineStats, TierStats
from agentserve.server.token_history import TokenHistory
from agentserve.server.tool_memo import ToolMemo

PREFIX = "agentserve:"
_Family: TypeAlias = type[CounterMetricFamily] | type[GaugeMetricFamily]
_Row: TypeAlias = tuple[_Family, str, str, float]
"""A number without labels of its own: kind, name, help and value."""
_AdapterRequests: TypeAlias = Callable[[], tuple[Mapping[str, int], Mapping[str, int]]]
"""Requests by adapter: those that were admitted, and those that wait."""
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
        self._engine_stats = engine_stats
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
        self._refused_calls = Counter(
            PREFIX + "refused_tool_calls",
            "Tool calls that were stopped: forced by a request, or written in an answer.",
            ["model_name", "where"],
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

    def count_refused_call(self, where: str) -> None:
        """Counts a tool call that was stopped; `where` is `request` or `answer`."""
        self._refused_calls.labels(self._model_name, where).inc()

    def watch_history(self, history: TokenHistory) -> None:
        """Shows what is kept of answers."""
        self._registry.register(_HistoryCollector(self._model_name, history))

    def watch_memo(self, memo: ToolMemo) -> None:
        """Shows what is kept of the results of tools."""
        self._registry.register(_MemoCollector(self._model_name, memo))

    def watch_adapters(self, requests: _AdapterRequests) -> None:
        """Shows the LoRA adapters, if there are any, and who uses them."""
        self._registry.register(_AdapterCollector(self._model_name, self._engine_stats, requests))

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
        rows: tuple[_Row, ...] = (
            (GaugeMetricFamily, "bytes", "Bytes of answers kept as token ids.", stats.num_bytes),
            (GaugeMetricFamily, "turns", "Answers kept as token ids.", stats.num_turns),
            (CounterMetricFamily, "stored_turns", "Answers stored.", stats.num_stored_turns),
            (CounterMetricFamily, "reused_turns", "Answers read again as they were written.", stats.num_reused_turns),
            (CounterMetricFamily, "evicted_turns", "Answers forgotten to make room.", stats.num_evicted_turns),
        )
        yield from _families(self._model_name, "token_history_", rows)


class _MemoCollector(Collector):
    """The same for the memo of tool results."""

    def __init__(self, model_name: str, memo: ToolMemo) -> None:
        self._model_name = model_name
        self._memo = memo

    def collect(self) -> Iterator[Metric]:
        memo = self._memo
        rows: tuple[_Row, ...] = (
            (GaugeMetricFamily, "entries", "Results of tools that are kept.", len(memo)),
            (GaugeMetricFamily, "bytes", "Bytes of results of tools and of what they are found by.", memo.num_bytes),
            (CounterMetricFamily, "stores", "Results of tools that were stored.", memo.num_stores),
            (CounterMetricFamily, "hits", "Questions for a result that was there.", memo.num_hits),
            (CounterMetricFamily, "misses", "Questions for a result that was not there.", memo.num_misses),
            (CounterMetricFamily, "expirations", "Results found to be too old.", memo.num_expirations),
            (CounterMetricFamily, "evictions", "Results forgotten to make room.", memo.num_evictions),
        )
        yield from _families(self._model_name, "tool_memo_", rows)


class _AdapterCollector(Collector):
    """The same for LoRA adapters; nothing on a server without any."""

    def __init__(self, model_name: str, engine_stats: Callable[[], EngineStats], requests: _AdapterRequests) -> None:
        self._model_name = model_name
        self._engine_stats = engine_stats
        self._requests = requests

    def collect(self) -> Iterator[Metric]:
        stats = self._engine_stats().adapters
        if stats is None:
            return
        rows: tuple[_Row, ...] = (
            (GaugeMetricFamily, "adapters", "Adapters that requests may name.", stats.num_adapters),
            (GaugeMetricFamily, "slots", "Adapters that fit the device.", stats.num_slots),
            (GaugeMetricFamily, "resident_adapters", "Adapters on the device.", stats.num_resident),
            (CounterMetricFamily, "loads", "Adapters that came to the device.", stats.num_loads),
            (CounterMetricFamily, "loaded_bytes", "Bytes copied for that.", stats.loaded_bytes),
            (CounterMetricFamily, "load_seconds", "Time that these copies took.", stats.load_ns / 1e9),
            (CounterMetricFamily, "evictions", "Adapters that left the device.", stats.num_evictions),
            (
                CounterMetricFamily,
                "preempted_loads",
                "Loads that more urgent ones interrupted.",
                stats.num_preempted_loads,
            ),
            (CounterMetricFamily, "failed_loads", "Loads that failed.", stats.num_failed_loads),
        )
        yield from _families(self._model_name, "lora_", rows)
        running, waiting = self._requests()
        for name, text, counts in (
            ("requests_running", "Requests with an adapter that were admitted.", running),
            ("requests_waiting", "Requests with an adapter that wait for it, for memory or for their turn.", waiting),
        ):
            metric = GaugeMetricFamily(f"{PREFIX}lora_{name}", text, labels=["model_name", "adapter"])
            for adapter, count in sorted(counts.items()):
                metric.add_metric([self._model_name, adapter], count)
            yield metric
        # As vLLM has it: the labels are what is told, the value is when.
        info = GaugeMetricFamily(
            PREFIX + "lora_requests_info",
            "Which adapters have requests, at the time that is its value.",
            labels=["model_name", "max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        names = (",".join(sorted(running)), ",".join(sorted(waiting)))
        info.add_metric([self._model_name, str(stats.num_slots), *names], time.time())
        yield info


def _families(model_name: str, prefix: str, rows: Iterable[_Row]) -> Iterator[Metric]:
    for family, name, text, value in rows:
        metric = family(f"{PREFIX}{prefix}{name}", text, labels=["model_name"])
        metric.add_metric([model_name], value)
        yield metric


_SPECULATION = (
    ("speculated_tokens", "Prompt tokens computed while a tool ran, before anybody asked for them."),
    ("speculated_used_tokens", "Those of them that the next call of their session has found."),
    ("speculated_wasted_tokens", "Those of them that nobody has found."),
)


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
        yield from self._tiers(stats)
        yield self._counter("generation_tokens", "Tokens generated.", stats.num_generated_tokens)
        yield self._counter("num_preemptions", "Requests whose KV blocks were taken.", stats.num_preemptions)
        yield self._counter("num_evicted_blocks", "Cached KV blocks that were evicted.", stats.num_evicted_blocks)
        yield self._counter("num_batches_prefill", "Batches of the prefill lane.", stats.num_batches_prefill)
        yield self._counter("num_batches_decode", "Batches of the decode lane.", stats.num_batches_decode)
        if stats.policies is not None and stats.policies.speculation != "none":
            for name, text in _SPECULATION:
                yield self._counter(name, text, stats.policies.counts[f"tokens_{name.removesuffix('_tokens')}"])
        if stats.decision is not None:
            yield from self._decision(stats.decision)
        if stats.policies is not None:
            actions = CounterMetricFamily(
                PREFIX + "policy_actions", "What the policies have done.", labels=["model_name", "action"]
            )
            for action, count in sorted(stats.policies.counts.items()):
                actions.add_metric([self._model_name, action], count)
            yield actions

    def _tiers(self, stats: EngineStats) -> Iterator[Metric]:
        num_used = stats.num_blocks - stats.num_free_blocks
        sizes: tuple[tuple[str, str, int, Callable[[TierStats], int]], ...] = (
            ("blocks", "KV blocks that the tier has room for.", stats.num_blocks, lambda t: t.num_blocks),
            ("used_blocks", "KV blocks in the tier.", num_used, lambda t: t.num_used_blocks),
        )
        for name, text, of_device, value in sizes:
            gauge = GaugeMetricFamily(f"{PREFIX}kv_tier_{name}", text, labels=["model_name", "tier"])
            gauge.add_metric([self._model_name, "device"], of_device)
            for tier in stats.tiers:
                gauge.add_metric([self._model_name, tier.tier], value(tier))
            yield gauge
        counts: tuple[tuple[str, str, Callable[[TierStats], int]], ...] = (
            ("stores", "Copies into the tier, of one or more KV blocks each.", lambda t: t.num_stores),
            ("stored_bytes", "KV copied into the tier.", lambda t: t.stored_bytes),
            ("loads", "Copies from the tier to the device, of one or more KV blocks each.", lambda t: t.num_loads),
            ("loaded_bytes", "KV copied from the tier to the device.", lambda t: t.loaded_bytes),
            ("dropped_blocks", "KV blocks not taken in.", lambda t: t.num_dropped_blocks),
            ("failed_transfers", "Copies that failed.", lambda t: t.num_failed_transfers),
        )
        for name, text, value in counts if stats.tiers else ():
            counter = CounterMetricFamily(f"{PREFIX}kv_tier_{name}", text, labels=["model_name", "tier"])
            for tier in stats.tiers:
                counter.add_metric([self._model_name, tier.tier], value(tier))
            yield counter

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
