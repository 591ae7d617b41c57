"""Membership under any order of events, and whole swarms in virtual time whose nodes come, stall, split and go."""

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from swarmd.discovery.records import NodeRecord
from swarmd.node.cluster.membership import (
    FORGET_SECONDS,
    GONE_SECONDS,
    MAX_GONE,
    SUSPECT_SECONDS,
    Membership,
    MemberState,
)

TICK, BEAT = 0.25, 1.0
NODES = st.integers(0, 4).map(lambda index: f"{index:064x}")


class AnyEvents(RuleBasedStateMachine):
    """One node's view, fed with anything. The changes that it tells must be the whole story."""

    def __init__(self):
        super().__init__()
        self.membership = Membership()
        self.now = 100.0
        self.links: dict[str, int] = {}
        self.told: dict[str, MemberState] = {}
        self.heard: dict[str, float] = {}
        self.counters: dict[str, int] = {}

    def note(self, changes):
        for change in changes:
            before = self.told.get(change.node_id)
            known = self.membership.get(change.node_id)
            assert known is not None
            assert change.state is known.state, "what is told is true"
            assert change.joined == (change.state is MemberState.ALIVE and before in (None, MemberState.GONE))
            if change.state is MemberState.SUSPECT:
                assert before is MemberState.ALIVE
            self.told[change.node_id] = change.state

    @rule(node=NODES)
    def link(self, node):
        self.links[node] = self.links.get(node, 0) + 1
        self.note(self.membership.on_linked(node, self.now))

    @rule(node=NODES)
    def unlink(self, node):
        if self.links.get(node):
            self.links[node] -= 1
            if not self.links[node]:
                self.counters.pop(node, None)
            self.note(self.membership.on_unlinked(node, self.now))

    @rule(node=NODES, counter=st.integers(0, 9), leaving=st.booleans())
    def publish(self, node, counter, leaving):
        if self.links.get(node):
            newer = counter > self.counters.get(node, -1)
            sent = NodeRecord(node, "name", "0", counter, leaving=leaving)
            self.heard[node] = self.now
            self.note(self.membership.on_record(sent, self.now))
            known = self.membership.members[node].record
            if newer:
                self.counters[node] = counter
                assert known == sent
            else:
                assert known.counter == self.counters[node]

    @rule(node=NODES)
    def beat(self, node):
        if self.links.get(node):
            self.heard[node] = self.now
            self.note(self.membership.on_heard(node, self.now))

    @rule(seconds=st.sampled_from([0.0, TICK, 1.0, GONE_SECONDS, SUSPECT_SECONDS, FORGET_SECONDS]))
    def wait(self, seconds):
        self.now += seconds
        self.note(self.membership.tick(self.now))
        self.told = {node: state for node, state in self.told.items() if node in self.membership.members}

    @invariant()
    def the_story_is_complete(self):
        assert self.told == {node: member.state for node, member in self.membership.members.items()}

    @invariant()
    def nobody_is_given_up_without_cause(self):
        for node, member in self.membership.members.items():
            silent = self.now - self.heard[node]
            if node in self.counters and silent < SUSPECT_SECONDS:
                assert member.state is MemberState.ALIVE, "it has spoken over the link that it has"
            if member.state is MemberState.SUSPECT:
                assert not self.links.get(node) or silent >= SUSPECT_SECONDS
            if member.state is MemberState.GONE:
                assert member.record.leaving or silent >= GONE_SECONDS

    @invariant()
    def whoever_speaks_over_a_link_is_known(self):
        assert self.counters.keys() <= self.membership.members.keys()

    @invariant()
    def the_alive_are_those_who_are_not_gone(self):
        alive = {record.id for record in self.membership.alive()}
        assert alive == {n for n, m in self.membership.members.items() if m.state is not MemberState.GONE}


AnyEvents.TestCase.settings = settings(
    max_examples=80, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestAnyEvents = AnyEvents.TestCase


@dataclass
class Node:
    """A simulated node: its own record and its view of the others."""

    id: str
    counter: int
    membership: Membership = field(default_factory=Membership)
    stalled: bool = False

    @property
    def record(self) -> NodeRecord:
        return NodeRecord(self.id, self.id[-4:], "0", self.counter)


class Swarm:
    """Nodes in a full mesh. A killed node's links close at once; a stalled or cut-off one is only silent."""

    def __init__(self) -> None:
        self.now = 0.0
        self.nodes: dict[str, Node] = {}
        self.cut: set[frozenset[str]] = set()
        self.links: set[frozenset[str]] = set()

    def add(self, node_id: str, counter: int = 1) -> None:
        self.nodes[node_id] = Node(node_id, counter)

    def kill(self, node_id: str) -> None:
        del self.nodes[node_id]
        for pair in [pair for pair in self.links if node_id in pair]:
            self._unlink(pair)

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds / TICK)):
            self.now += TICK
            self._dial()
            for node in self.nodes.values():
                if not node.stalled:
                    node.membership.tick(self.now)
                    if self.now % BEAT == 0:
                        self._say(node, lambda other, node=node: other.membership.on_heard(node.id, self.now))

    def change(self, node_id: str) -> None:
        node = self.nodes[node_id]
        node.counter += 1
        self._say(node, lambda other: other.membership.on_record(node.record, self.now))

    def drop_link(self, one: str, other: str) -> None:
        """TCP gives a cut-off link up."""
        self._unlink(frozenset((one, other)))

    def states(self, observer: str) -> dict[str, MemberState]:
        return {node_id: member.state for node_id, member in self.nodes[observer].membership.members.items()}

    def _dial(self) -> None:
        for one in self.nodes:
            for other in self.nodes:
                pair = frozenset((one, other))
                stalled = self.nodes[one].stalled or self.nodes[other].stalled
                if one < other and pair not in self.links | self.cut and not stalled:
                    self.links.add(pair)
                    for here, there in ((one, other), (other, one)):
                        self.nodes[here].membership.on_linked(there, self.now)
                        self.nodes[here].membership.on_record(self.nodes[there].record, self.now)

    def _unlink(self, pair: frozenset[str]) -> None:
        self.links.discard(pair)
        for here in pair & self.nodes.keys():
            [there] = pair - {here}
            self.nodes[here].membership.on_unlinked(there, self.now)

    def _say(self, node: Node, what) -> None:
        for other in self.nodes.values():
            pair = frozenset((node.id, other.id))
            if other is not node and pair in self.links and pair not in self.cut:
                what(other)


def everybody_sees_everybody(swarm: Swarm) -> bool:
    want = {node.record for node in swarm.nodes.values()}
    return all({node.record, *node.membership.alive()} == want for node in swarm.nodes.values())


@pytest.mark.parametrize("seed", range(15))
def test_a_swarm_agrees_again_after_anything(seed):
    rng = random.Random(seed)
    swarm = Swarm()
    ids = [f"{index:064x}" for index in range(6)]
    for node_id in ids[:4]:
        swarm.add(node_id)
    for _ in range(30):
        present = list(swarm.nodes)
        absent = [node_id for node_id in ids if node_id not in swarm.nodes]
        match rng.choice(("add", "kill", "stall", "wake", "cut", "drop", "heal", "change")):
            case "add" if absent:
                # A restarted node's counter may even be lower than before.
                swarm.add(rng.choice(absent), rng.randint(1, 5))
            case "kill" if len(present) > 2:
                swarm.kill(rng.choice(present))
            case "stall":
                swarm.nodes[rng.choice(present)].stalled = True
            case "wake":
                for node in swarm.nodes.values():
                    node.stalled = False
            case "cut" if len(present) > 1:
                swarm.cut.add(frozenset(rng.sample(present, 2)))
            case "drop":
                broken = sorted(map(sorted, swarm.cut & swarm.links))
                if broken:
                    swarm.drop_link(*rng.choice(broken))
            case "heal":
                swarm.cut.clear()
            case "change":
                swarm.change(rng.choice(present))
        swarm.run(rng.choice((TICK, 1, 5)))
        assert all(len(node.membership.members) < len(ids) for node in swarm.nodes.values())
    swarm.cut.clear()
    for node in swarm.nodes.values():
        node.stalled = False
    # What was changed behind a cut is heard with the next change, or over a new link.
    for node_id in swarm.nodes:
        swarm.change(node_id)
    swarm.run(SUSPECT_SECONDS + GONE_SECONDS + 2)
    assert everybody_sees_everybody(swarm)


def test_a_killed_node_is_given_up_by_all_within_two_seconds():
    swarm = Swarm()
    for index in range(5):
        swarm.add(f"{index:064x}")
    swarm.run(10)
    assert everybody_sees_everybody(swarm)
    lost = f"{0:064x}"
    swarm.kill(lost)
    assert all(swarm.states(observer)[lost] is MemberState.SUSPECT for observer in swarm.nodes)
    swarm.run(2)
    assert all(swarm.states(observer)[lost] is MemberState.GONE for observer in swarm.nodes)


def test_a_node_that_hangs_is_given_up_by_all_within_six_seconds_and_the_others_never_waver():
    swarm = Swarm()
    for index in range(5):
        swarm.add(f"{index:064x}")
    swarm.run(10)
    hung = f"{0:064x}"
    swarm.nodes[hung].stalled = True
    for _ in range(24):
        swarm.run(TICK)
        for observer in swarm.nodes.keys() - {hung}:
            others = {node: state for node, state in swarm.states(observer).items() if node != hung}
            assert set(others.values()) == {MemberState.ALIVE}
    assert all(swarm.states(node)[hung] is MemberState.GONE for node in swarm.nodes if node != hung)
    swarm.nodes[hung].stalled = False
    swarm.run(2)
    assert everybody_sees_everybody(swarm)


def test_a_thousand_nodes_that_come_and_go_leave_a_bounded_trace():
    swarm = Swarm()
    swarm.add("f" * 64)
    for index in range(1000):
        node_id = f"{index:064x}"
        swarm.add(node_id)
        swarm.run(TICK)
        swarm.kill(node_id)
    swarm.run(GONE_SECONDS + 1)
    assert len(swarm.nodes["f" * 64].membership.members) <= MAX_GONE
    swarm.run(FORGET_SECONDS + 1)
    assert swarm.nodes["f" * 64].membership.members == {}
