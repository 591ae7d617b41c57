"""Counters of this node's endpoint, under vLLM's names with our prefix, in Prometheus' format."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from swarmd.discovery.records import LoadRecord
from swarmd.node.serving.generation import Ending, GenerationError, Piece

_TTFT_BUCKETS = (0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ITL_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2.5, 5)


class Metrics:
    """What this node's endpoint has served, and how busy the drivers of the swarm say they are."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        r, labels = self._registry, ["model_name"]
        self._prompt = Counter("swarmd_prompt_tokens", "Prompt tokens of answered requests.", labels, registry=r)
        self._generated = Counter("swarmd_generation_tokens", "Tokens generated.", labels, registry=r)
        self._success = Counter(
            "swarmd_request_success",
            "Requests answered to their end.",
            [*labels, "finished_reason"],
            registry=r,
        )
        self._failed = Counter("swarmd_request_failure", "Requests that failed.", [*labels, "code"], registry=r)
        self._ttft = Histogram("swarmd_time_to_first_token_seconds", "TTFT.", labels, buckets=_TTFT_BUCKETS, registry=r)
        self._itl = Histogram("swarmd_inter_token_latency_seconds", "ITL.", labels, buckets=_ITL_BUCKETS, registry=r)
        self._running = Gauge("swarmd_num_requests_running", "Sequences that hold KV.", labels, registry=r)
        self._waiting = Gauge("swarmd_num_requests_waiting", "Sequences that wait.", labels, registry=r)
        self._kv = Gauge("swarmd_kv_cache_usage_perc", "Share of the KV room in use, 0 to 1.", labels, registry=r)
        self._drafted = Counter("swarmd_spec_decode_num_draft_tokens", "Tokens guessed ahead.", labels, registry=r)
        self._accepted = Counter(
            "swarmd_spec_decode_num_accepted_tokens", "Tokens guessed ahead that were right.", labels, registry=r
        )
        self._nodes = Gauge("swarmd_nodes_alive", "Nodes of the swarm that are alive.", registry=r)

    async def observe(self, model: str, items: AsyncIterator[Piece | Ending]) -> AsyncGenerator[Piece | Ending]:
        """Pass the stream of a model through, counting it. TTFT is from here on, so without tokenizing."""
        last = time.perf_counter()
        first, whole = True, False
        ttft, itl, generated = self._ttft.labels(model), self._itl.labels(model), self._generated.labels(model)
        try:
            async for item in items:
                now = time.perf_counter()
                whole = isinstance(item, Ending)
                if isinstance(item, Ending):
                    self._prompt.labels(model).inc(item.prompt_tokens)
                    self._success.labels(model, item.reason).inc()
                elif item.tokens:
                    (ttft if first else itl).observe(now - last)
                    generated.inc(len(item.tokens))
                    first, last = False, now
                yield item
        except GenerationError as error:
            self._failed.labels(model, error.code).inc()
            raise
        except (GeneratorExit, asyncio.CancelledError):
            if not whole:
                self._failed.labels(model, "cancelled").inc()
            raise

    def render(self, loads: Iterable[tuple[str, LoadRecord]], nodes_alive: int) -> bytes:
        """The exposition; `loads` are (model name, load of its driver), and models that are not among them are gone."""
        self._nodes.set(nodes_alive)
        for metric in (self._running, self._waiting, self._kv, self._drafted, self._accepted):
            metric.clear()
        for model, load in loads:
            self._running.labels(model).set(load.running)
            self._waiting.labels(model).set(load.waiting)
            self._kv.labels(model).set(load.kv_tokens_used / load.kv_tokens if load.kv_tokens else 0)
            self._drafted.labels(model).inc(load.draft_tokens)
            self._accepted.labels(model).inc(load.accepted_draft_tokens)
        return generate_latest(self._registry)
