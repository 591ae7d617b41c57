"""Nodes that join are used, nodes that leave hand over first, and neither drops a stream; flapping changes little."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.fault_cases import talk
from support.fault_lab import FaultLab, Machine
from support.stream_load import Load, compare

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

MEMORY = {"a": "230MB", "b": "220MB", "c": "210MB"}


@pytest.fixture(scope="module")
def lab(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultLab]:
    machines = [Machine(name, memory, smollm2_path) for name, memory in MEMORY.items()]
    with FaultLab(tmp_path_factory.mktemp("come-and-go"), machines) as lab:
        lab.serve("a", smollm2_path)
        lab.until_whole(3)
        yield lab


@pytest.fixture
def whole(lab: FaultLab) -> FaultLab:
    lab.revive()
    lab.until_whole(3)
    return lab


def in_three_stages(state: dict[str, Any]) -> bool:
    return any(i["state"] == "ready" and len(i["stages"]) == 3 for i in state["instances"])


@pytest.mark.parametrize("way", ["SIGTERM", "swarmd stop"])
def test_a_node_that_leaves_is_not_noticed_by_clients_of_others(
    way: str, whole: FaultLab, expected: Callable[..., Any], note_gaps: Any
) -> None:
    leaving = whole.carriers()[1]
    questions = talk(60)
    for question in questions:
        expected(question)
    with Load(whole.others(leaving), questions) as load:
        load.until_talking(4)
        if way == "SIGTERM":
            leaving.process.terminate()
        else:
            leaving.command("stop")
        outcomes = load.finish()
    note_gaps(f"a node leaves by {way}", outcomes)
    assert compare(outcomes, expected) == []
    assert leaving.process.wait(60) == 0


def test_a_node_that_joins_is_used_without_dropping_a_stream(
    whole: FaultLab, expected: Callable[..., Any], note_gaps: Any
) -> None:
    whole.nodes["c"].stop()
    whole.until_whole(2)
    questions = talk(60)
    for question in questions:
        expected(question)
    with Load(whole.running(), questions) as load:
        load.until_talking(2)
        whole.revive("c")
        outcomes = load.finish()
    note_gaps("a node joins", outcomes)
    assert compare(outcomes, expected) == []
    whole.nodes["a"].until(in_three_stages)


def test_a_node_that_flaps_does_not_cause_a_plan_each_time(whole: FaultLab) -> None:
    before = whole.instance()["epoch"]
    whole.flap("c", times=5)
    whole.nodes["a"].until_members(3)
    whole.nodes["a"].until_ready()
    # The first crash costs one plan, and one more may be for its return.
    assert whole.instance()["epoch"] - before < 5
    assert len(whole.nodes["a"].get("/api/swarm")["nodes"]) == 3
