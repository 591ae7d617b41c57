"""A node dies while it answers: the client gets the rest of the answer or a typed error, and the others go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.answers import Answer, StreamError
from support.swarm import Node, give_model, join
from support.three_nodes import STORY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

# Any two can hold the model, none can alone. The one with the most memory gets the first stage and with it the driver.
MEMORY = {"driver": "170MB", "owner": "155MB", "last": "135MB"}
LONGEST_SILENCE = 10.0
# A node that says nothing, but whose connections stay, is first given up by the failure detector.
LONGEST_SILENCE_AFTER_SILENCE = 20.0
MAX_TOKENS = 40
LOST = {"node_lost", "not_enough_memory"}


class Swarm:
    """Three nodes that can be killed and brought back."""

    def __init__(self, root: Path, stack: ExitStack) -> None:
        self._root = root
        self._stack = stack
        self.nodes: dict[str, Node] = {}
        first = self._start("owner")
        self._token = first.token()
        self.revive()
        first.serve()

    def revive(self, *names: str) -> None:
        """Start those of the nodes (all, if none is named) that do not run, with the identity that they had."""
        for name in names or MEMORY:
            if name not in self.nodes or self.nodes[name].process.poll() is not None:
                self._start(name)

    def until_whole(self) -> None:
        """Wait until all nodes know that all three carry a stage."""
        for node in self.nodes.values():
            node.until_members(3)
        for node in self.nodes.values():
            node.until_ready(stages=3)

    def node_of_stage(self, index: int) -> Node:
        """Who carries a stage now."""
        return self._by_id(self._instance()["stages"][index]["node"])

    def owner(self) -> Node:
        """Who owns the instance now."""
        return self._by_id(self._instance()["owner"])

    def others(self, *lost: Node) -> list[Node]:
        """Those who remain."""
        return [node for node in self.nodes.values() if node not in lost]

    def _instance(self) -> dict[str, Any]:
        running = next(node for node in self.nodes.values() if node.process.poll() is None)
        [instance] = running.get("/api/swarm")["instances"]
        return instance

    def _by_id(self, node_id: str) -> Node:
        return next(node for node in self.nodes.values() if node.id == node_id)

    def _start(self, name: str) -> Node:
        limits = ("--memory", MEMORY[name], "--context", "1024", "--threads", "1", "--split")
        options = (*limits, "--wire-dtype", "f32", "--model", "none")
        data_dir = self._root / name
        made = join(self._token, data_dir, *options) if self.nodes else Node(data_dir, *options)
        self.nodes[name] = self._stack.enter_context(made)
        return made


@pytest.fixture(scope="module")
def living(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    root = tmp_path_factory.mktemp("lost")
    # Whoever dies, somebody is left who has the whole model.
    for name in ("owner", "driver"):
        give_model(root / name, smollm2_path)
    with ExitStack() as stack:
        yield Swarm(root, stack)


@pytest.fixture
def swarm(living: Swarm) -> Swarm:
    """All three nodes alive, each with a stage."""
    living.revive()
    living.until_whole()
    return living


def interrupted(entry: Node, strike: Callable[[], object], silence: float = LONGEST_SILENCE) -> Answer | StreamError:
    """What the client gets when something happens in the middle of its stream; TimeoutError if it hears nothing for
    longer than `silence` seconds."""
    with entry.stream(STORY, timeout=silence, max_tokens=MAX_TOKENS) as stream:
        stream.read(8)
        strike()
        try:
            return stream.finish()
        except StreamError as error:
            return error


def assert_survived(outcome: Answer | StreamError, alone: Answer) -> None:
    """The rest of the answer, no token lost and none twice, or a typed error."""
    if isinstance(outcome, StreamError):
        assert outcome.code in LOST
    else:
        assert outcome == alone


def assert_others_go_on(swarm: Swarm, *lost: Node, alone: Answer) -> None:
    for node in swarm.others(*lost):
        assert node.answer(STORY, max_tokens=4).tokens == alone.tokens[:4]
    # A node whose stages crashed again and again is left out for some seconds, then taken in again.
    carriers = {other.id for other in swarm.others(*lost)}
    for node in swarm.others(*lost):
        node.until(lambda state: [{s["node"] for s in i["stages"]} for i in state["instances"]] == [carriers])


@pytest.fixture(scope="module")
def alone(solo: Any) -> Answer:
    answer = solo(STORY, max_tokens=MAX_TOKENS)
    assert answer.completion_tokens == MAX_TOKENS
    return answer


def test_a_later_stages_node_is_killed(swarm: Swarm, alone: Answer) -> None:
    lost = swarm.node_of_stage(2)
    [entry, _] = swarm.others(lost)
    assert_survived(interrupted(entry, lost.kill), alone)
    assert_others_go_on(swarm, lost, alone=alone)


def test_the_owners_node_is_killed(swarm: Swarm, alone: Answer) -> None:
    lost = swarm.owner()
    [entry, _] = swarm.others(lost)
    assert_survived(interrupted(entry, lost.kill), alone)
    assert_others_go_on(swarm, lost, alone=alone)
    assert swarm.owner() is not lost


def test_the_drivers_node_is_killed(swarm: Swarm, alone: Answer) -> None:
    lost = swarm.node_of_stage(0)
    [entry, _] = swarm.others(lost)
    assert_survived(interrupted(entry, lost.kill), alone)
    assert_others_go_on(swarm, lost, alone=alone)


def test_the_drivers_node_falls_silent(swarm: Swarm, alone: Answer) -> None:
    lost = swarm.node_of_stage(0)
    [entry, _] = swarm.others(lost)
    with ExitStack() as ice:
        outcome = interrupted(entry, lambda: ice.enter_context(lost.frozen()), LONGEST_SILENCE_AFTER_SILENCE)
        assert_survived(outcome, alone)
        assert_others_go_on(swarm, lost, alone=alone)


def test_only_a_stage_process_is_killed(swarm: Swarm, alone: Answer) -> None:
    struck = swarm.node_of_stage(1)
    [entry, _] = swarm.others(struck)
    assert_survived(interrupted(entry, struck.stage_process().kill), alone)
    assert_others_go_on(swarm, alone=alone)


def test_what_remains_is_too_small_until_a_node_comes_back(swarm: Swarm, alone: Answer) -> None:
    entry = swarm.nodes["owner"]
    lost = swarm.others(entry)
    outcome = interrupted(entry, lambda: [node.kill() for node in lost])
    assert isinstance(outcome, StreamError)
    assert outcome.code in LOST
    question = {"model": "smollm2:135m", "messages": [{"role": "user", "content": STORY}]}
    status, answer = entry.post("/v1/chat/completions", question, timeout=LONGEST_SILENCE)
    assert (status, answer["error"]["code"]) == (503, "not_enough_memory")
    swarm.revive("driver")
    entry.until_ready(stages=2)
    assert entry.answer(STORY, max_tokens=4).tokens == alone.tokens[:4]
