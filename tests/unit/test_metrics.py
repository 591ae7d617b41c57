"""What `/metrics` counts, in Prometheus' text format."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.fake_node import FakeNode, piece, serving

from swarmd.discovery.records import LoadRecord
from swarmd.node.metrics import Metrics
from swarmd.node.serving.generation import Ending, GenerationError, Piece


def values(metrics: Metrics, *loads: tuple[str, LoadRecord], nodes: int = 1) -> dict[str, float]:
    """Sample name and labels -> value, read by Prometheus' own parser."""
    families = text_string_to_metric_families(metrics.render(loads, nodes).decode())
    return {
        " ".join([sample.name, *(label for _, label in sorted(sample.labels.items()))]): sample.value
        for family in families
        for sample in family.samples
    }


async def answer(*script: Piece | Ending | Exception) -> AsyncIterator[Piece | Ending]:
    for item in script:
        if isinstance(item, Exception):
            raise item
        yield item


async def consume(metrics: Metrics, *script: Piece | Ending | Exception) -> list[Piece | Ending]:
    return [item async for item in metrics.observe("m", answer(*script))]


async def test_an_answer_is_counted_and_passed_on():
    metrics, script = Metrics(), (piece("a"), Piece("", ()), piece("b"), piece("c"), Ending("length", 11, 3))
    assert await consume(metrics, *script) == list(script)
    seen = values(metrics)
    assert seen["swarmd_prompt_tokens_total m"] == 11
    assert seen["swarmd_generation_tokens_total m"] == 3
    assert seen["swarmd_request_success_total length m"] == 1
    assert seen["swarmd_time_to_first_token_seconds_count m"] == 1
    assert seen["swarmd_inter_token_latency_seconds_count m"] == 2


async def test_a_failure_is_counted_by_its_code():
    metrics = Metrics()
    with pytest.raises(GenerationError):
        await consume(metrics, piece("a"), GenerationError("node_lost", "gone"))
    seen = values(metrics)
    assert seen["swarmd_request_failure_total node_lost m"] == 1
    assert seen["swarmd_generation_tokens_total m"] == 1
    assert not any(name.startswith("swarmd_request_success_total") for name in seen)


async def test_who_leaves_early_is_counted_as_cancelled_and_who_has_it_all_is_not():
    metrics = Metrics()
    async with aclosing(metrics.observe("m", answer(piece("a"), piece("b")))) as items:
        await anext(items)
    assert values(metrics)["swarmd_request_failure_total cancelled m"] == 1
    async with aclosing(metrics.observe("m", answer(piece("a"), Ending("stop", 1, 1)))) as items:
        await anext(items)
        await anext(items)
    seen = values(metrics)
    assert seen["swarmd_request_failure_total cancelled m"] == 1
    assert seen["swarmd_request_success_total stop m"] == 1


async def test_a_cancelled_task_is_counted_too():
    metrics, reached = Metrics(), asyncio.Event()

    async def endless() -> AsyncIterator[Piece | Ending]:
        yield piece("a")
        reached.set()
        await asyncio.Event().wait()

    async def read() -> None:
        async for _ in metrics.observe("m", endless()):
            pass

    task = asyncio.create_task(read())
    await reached.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert values(metrics)["swarmd_request_failure_total cancelled m"] == 1


def test_loads_are_those_of_now():
    metrics = Metrics()
    seen = values(metrics, ("m", LoadRecord("i", 2, 3, 256, 1024)), ("n", LoadRecord("j")), nodes=4)
    assert seen["swarmd_num_requests_running m"] == 2
    assert seen["swarmd_num_requests_waiting m"] == 3
    assert seen["swarmd_kv_cache_usage_perc m"] == 0.25
    assert seen["swarmd_kv_cache_usage_perc n"] == 0
    assert seen["swarmd_nodes_alive"] == 4
    later = values(metrics, ("n", LoadRecord("j")), nodes=1)
    assert "swarmd_num_requests_running m" not in later
    assert later["swarmd_nodes_alive"] == 1


def test_what_was_guessed_is_as_the_driver_counted_it_however_often_one_looks():
    metrics, load = Metrics(), LoadRecord("i", draft_tokens=40, accepted_draft_tokens=30)
    for _ in range(2):
        seen = values(metrics, ("m", load))
        assert seen["swarmd_spec_decode_num_draft_tokens_total m"] == 40
        assert seen["swarmd_spec_decode_num_accepted_tokens_total m"] == 30


async def test_the_endpoint_speaks_prometheus():
    async with (
        serving(FakeNode()) as url,
        aiohttp.ClientSession() as session,
        session.get(f"{url}/metrics") as response,
    ):
        assert response.content_type == "text/plain"
        [family] = text_string_to_metric_families(await response.text())
        assert family.name == "swarmd_nodes_alive"
