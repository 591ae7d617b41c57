"""Three nodes on one machine: they find each other by mDNS, share the model by their memory and answer as one node."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.swarm import Node
from support.three_nodes import MEMORY, STORY, three_nodes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

QUESTIONS = [
    "What is the capital of France?",
    "Write a poem about rain.",
    "Why is the sky blue?",
    "Name three animals that live in the sea.",
    "Explain how bread is made.",
    "What is a prime number?",
    "Describe the city of Rome.",
    "Give me a tip for learning to play the piano, and say why it helps.",
]


@pytest.fixture(scope="module")
def nodes(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Node]]:
    with three_nodes(tmp_path_factory.mktemp("three"), smollm2_path) as nodes:
        yield nodes


def test_layers_are_split_in_the_ratio_of_the_memory(nodes: list[Node]) -> None:
    [instance] = nodes[0].get("/api/swarm")["instances"]
    stages = {stage["node"]: stage["end"] - stage["start"] for stage in instance["stages"]}
    layers = [stages[node.id] for node in nodes]
    assert sum(layers) == 30
    assert layers == [pytest.approx(30 * share / 7, abs=1) for share in (4, 2, 1)]


def test_every_node_gives_the_same_greedy_tokens_as_one_node_alone(nodes: list[Node], solo: Any) -> None:
    alone = solo(STORY, max_tokens=100)
    assert alone.completion_tokens == len(alone.tokens) == 100
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(lambda node: node.answer(STORY, max_tokens=100), nodes))
    assert answers == [alone] * 3


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 0.8}], ids=["greedy", "seeded"])
def test_eight_concurrent_streams_equal_their_solo_runs(
    nodes: list[Node], solo: Any, sampling: dict[str, float]
) -> None:
    asked = [(text, {"max_tokens": 16, "seed": seed} | sampling) for seed, text in enumerate(QUESTIONS)]
    alone = [solo(text, **wishes) for text, wishes in asked]

    def stream(index: int) -> Any:
        text, wishes = asked[index]
        with nodes[index % 3].stream(text, **wishes) as stream:
            return stream.finish()

    with ThreadPoolExecutor(len(asked)) as pool:
        assert list(pool.map(stream, range(len(asked)))) == alone


def test_a_seed_gives_other_words_than_another_seed(nodes: list[Node]) -> None:
    """Or the equality of seeded runs would say nothing about sampling."""
    first, second = (nodes[0].answer(STORY, max_tokens=12, temperature=0.8, seed=seed) for seed in (1, 2))
    assert first.tokens != second.tokens


def test_status_and_the_api_describe_nodes_and_stages(nodes: list[Node]) -> None:
    first = nodes[0]
    printed, served = json.loads(first.command("status", "--json")), first.get("/api/swarm")
    for state in (printed, served):
        assert {node["name"] for node in state["nodes"]} == set(MEMORY)
        for node in state["nodes"]:
            assert node.keys() >= {"id", "name", "state", "devices"}
            assert node["state"] == "alive"
            [device] = node["devices"]
            assert device["kind"] == "cpu"
            assert 0 < device["memory_free"] <= device["memory_total"]
        [instance] = state["instances"]
        assert (instance["model"], instance["state"]) == ("smollm2:135m", "ready")
        assert instance["epoch"] >= 1
        edges = [(stage["start"], stage["end"]) for stage in instance["stages"]]
        assert [start for start, _ in edges] == [0, *(end for _, end in edges[:-1])]
        caps = {node["id"]: node["devices"][0]["memory_limit"] for node in state["nodes"]}
        for stage in instance["stages"]:
            assert stage["device"] == "cpu"
            assert 0 < stage["bytes"] <= caps[stage["node"]]


def test_speeds_are_measured(nodes: list[Node]) -> None:
    state = nodes[0].until(lambda s: all(n["devices"][0]["compute"] for n in s["nodes"]))
    for node in state["nodes"]:
        assert node["devices"][0]["memory_bandwidth"] > 1e8
        assert node["devices"][0]["compute"] > 1e8


@pytest.mark.parametrize("entry", [0, 2], ids=["at the driver's node", "at another node"])
def test_a_client_that_leaves_frees_its_memory(nodes: list[Node], entry: int) -> None:
    with nodes[entry].stream(STORY, max_tokens=2000) as stream:
        stream.read(3)
        nodes[entry].until_load(lambda load: load["running"] == 1 and load["kv_tokens_used"] > 0)
    # The feed tells of a driver's load twice a second, and 97 more tokens would take longer than this.
    nodes[entry].until_load(lambda load: load["running"] == 0 and load["kv_tokens_used"] == 0, seconds=3)
    nodes[1].answer("Hello", max_tokens=2)


def test_a_client_that_gives_up_waiting_frees_its_memory(nodes: list[Node]) -> None:
    with pytest.raises(TimeoutError):
        nodes[1].answer(STORY, timeout=1, max_tokens=2000)
    nodes[1].until_load(lambda load: load["running"] == 0 and load["kv_tokens_used"] == 0, seconds=3)
