"""An owner among nodes that come and go and stages that fail or answer late; several owners of one instance."""

from dataclasses import dataclass, field

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from swarmd.discovery.records import Address, InstanceRecord, InstanceState, ModelSummary, StageRecord
from swarmd.node.cluster.actions import FetchStages, StartStages, StopStages, WireStages
from swarmd.node.cluster.claims import successor, winner
from swarmd.node.cluster.ownership import LAST_RETRY_SECONDS, OwnedInstance
from swarmd.node.cluster.planning import Surroundings
from swarmd.partition.costs import ModelCosts
from swarmd.partition.plan import Capacity, Promise

MB = 1_000_000
LAYERS = 6
MODEL = ModelSummary("tiny", "0" * 64, LAYERS * 10 * MB, 8192, "llama")
COSTS = ModelCosts((10 * MB,) * LAYERS, 3 * MB, 5 * MB, 100, MB)
PROMISES = (Promise(4096, 8192), Promise(1024, 2048))
NODES = [f"{index:064x}" for index in range(5)]
DEVICES = ("cpu", "cuda:0")
# What a node has of each device, in MB; None where it has none.
SIZES = st.tuples(st.integers(15, 90), st.none() | st.integers(15, 90))


@dataclass
class Epoch:
    """What the world knows of one epoch: who was told to do what, and what was answered."""

    stages: tuple[StageRecord, ...]
    fetching: set[int] = field(default_factory=set)
    starting: set[int] = field(default_factory=set)
    wiring: set[int] = field(default_factory=set)
    started: set[int] = field(default_factory=set)
    wired: set[int] = field(default_factory=set)
    lost: bool = False


class OneOwner(RuleBasedStateMachine):
    """The world around one owner; orders are carried out whenever the rules say so."""

    @initialize(split=st.booleans(), seen=st.integers(0, 3), sizes=st.lists(SIZES, min_size=1, max_size=4))
    def start(self, split, seen, sizes):
        self.owned = OwnedInstance("tiny-1", MODEL, COSTS, PROMISES, epoch=seen, split=split)
        self.now = 0.0
        self.memory: dict[tuple[str, str], int] = {}
        self.leaving: set[str] = set()
        for node, of_node in zip(NODES, sizes, strict=False):
            self.add_node(node, of_node)
        self.epochs: dict[int, Epoch] = {}
        self.running: set[tuple[int, str, str]] = set()
        self.last_epoch = seen
        self.consider()

    def add_node(self, node, sizes):
        present = zip(DEVICES, sizes, strict=True)
        self.memory |= {(node, device): size * MB for device, size in present if size is not None}

    def capacities(self):
        return [
            Capacity(node, device, size, f"{node[-4:]} ({device})", accelerator=device != "cpu")
            for (node, device), size in self.memory.items()
        ]

    def act(self, actions):
        for action in actions:
            match action:
                case FetchStages(epoch=epoch, plan=plan):
                    self.note_plan(epoch, plan)
                    assert self.owned.move is not None
                    self.epochs[epoch] = Epoch(self.owned.move.stages, fetching=set(range(len(plan.stages))))
                case StartStages(epoch=epoch, plan=plan, beside=beside):
                    if epoch not in self.epochs:
                        self.note_plan(epoch, plan)
                    move = self.owned.move
                    stages = move.stages if beside and move is not None else self.owned.record.stages
                    self.epochs[epoch] = Epoch(stages, starting=set(range(len(stages))))
                    if not beside:
                        # An order that is not to stand beside the others replaces all that runs on that node.
                        ordered = {stage.node for stage in stages}
                        self.running = {place for place in self.running if place[1] not in ordered}
                    self.running |= {(epoch, stage.node, stage.device) for stage in stages}
                case WireStages(epoch=epoch, stages=stages):
                    known = self.epochs[epoch]
                    assert known.started == set(range(len(stages))), "nothing is wired before all are started"
                    assert all(stage.addresses for stage in stages)
                    known.wiring = set(range(len(stages)))
                case StopStages(epoch=epoch, nodes=nodes, since=since):
                    self.running = {p for p in self.running if p[1] not in nodes or not since <= p[0] <= epoch}

    def note_plan(self, epoch, plan):
        assert epoch == self.last_epoch + 1, "every plan has the next epoch"
        self.last_epoch = epoch
        assert [layer for s in plan.stages for layer in range(s.start, s.end)] == list(range(LAYERS))
        assert all(s.bytes <= self.memory[s.node, s.device] for s in plan.stages)
        assert not self.leaving & {s.node for s in plan.stages}, "who leaves is given nothing"

    def consider(self, idle=True):
        before, stages = self.owned.epoch, self.owned.record.stages
        lost = any((stage.node, stage.device) not in self.memory for stage in stages)
        around = Surroundings(self.capacities(), leaving=frozenset(self.leaving))
        self.act(self.owned.consider(around, self.now, idle=idle))
        if lost:
            self.epochs[before].lost = True
            replanned = self.owned.record.state is InstanceState.LOADING
            assert replanned or (self.owned.record.state, self.owned.record.stages) == (InstanceState.WAITING, ())

    @rule(node=st.sampled_from(NODES), sizes=SIZES)
    def node_comes(self, node, sizes):
        if not any(there == node for there, _ in self.memory):
            self.add_node(node, sizes)
            self.consider()

    @precondition(lambda self: self.memory)
    @rule(data=st.data())
    def node_goes(self, data):
        gone = data.draw(st.sampled_from(sorted({node for node, _ in self.memory})))
        self.memory = {place: size for place, size in self.memory.items() if place[0] != gone}
        self.running = {place for place in self.running if place[1] != gone}
        self.leaving.discard(gone)
        self.consider()

    @precondition(lambda self: self.memory)
    @rule(data=st.data())
    def node_says_that_it_leaves(self, data):
        self.leaving.add(data.draw(st.sampled_from(sorted({node for node, _ in self.memory}))))
        self.consider()

    @precondition(lambda self: self.memory)
    @rule(data=st.data())
    def device_goes(self, data):
        """Its node stays and no longer offers it."""
        gone = data.draw(st.sampled_from(sorted(self.memory)))
        del self.memory[gone]
        self.running = {place for place in self.running if place[1:] != gone}
        self.consider()

    @rule(seconds=st.sampled_from([0.1, 0.5, 5.0, LAST_RETRY_SECONDS]), idle=st.booleans())
    def tick(self, seconds, idle):
        self.now += seconds
        self.consider(idle)

    def orders(self):
        """Everything that some node was ever told to do, also what was answered before: answers may come twice."""
        return [
            (number, kind, index)
            for number, epoch in sorted(self.epochs.items())
            for kind, indexes in (("fetch", epoch.fetching), ("start", epoch.starting), ("wire", epoch.wiring))
            for index in sorted(indexes)
        ]

    @precondition(lambda self: self.epochs)
    @rule(choices=st.lists(st.integers(0, 30), min_size=1, max_size=8))
    def stages_answer(self, choices):
        for choice in choices:
            orders = self.orders()
            # The newest orders are the likeliest to be answered.
            self.answer(*orders[-1 - choice % len(orders)])

    def answer(self, number, kind, index):
        epoch = self.epochs[number]
        before, current = self.owned.record, self.is_current(number)
        if kind == "fetch":
            self.act(self.owned.on_fetched(number, index))
        elif kind == "start":
            epoch.started.add(index)
            self.act(self.owned.on_started(number, index, (Address(f"192.0.2.{index + 1}", 7000 + number),)))
        else:
            epoch.wired.add(index)
            self.act(self.owned.on_wired(number, index, self.now))
        if not current:
            assert self.owned.record is before, "an old epoch changes nothing"

    def is_current(self, number):
        """Whether an epoch serves, or is on its way to."""
        present = {self.owned.epoch} | ({self.owned.move.epoch} if self.owned.move is not None else set())
        return number in present and not self.epochs[number].lost

    @precondition(lambda self: self.epochs)
    @rule(data=st.data(), reason=st.text(min_size=1, max_size=600))
    def a_stage_is_lost(self, data, reason):
        number = data.draw(st.sampled_from(sorted(self.epochs)))
        epoch = self.epochs[number]
        before, serving, move = self.owned.record, number == self.owned.epoch, self.owned.move
        current = self.is_current(number)
        beside = move is not None and bool(self.epochs[move.epoch].starting)
        actions = self.owned.on_stage_lost(number, reason, self.now)
        if not current:
            assert (actions, self.owned.record) == ([], before)
        elif serving:
            if move is not None and beside:
                holders = tuple(dict.fromkeys(stage.node for stage in epoch.stages))
                assert actions == [StopStages(number, holders)], "one order ends all stages of a node"
                assert (self.owned.record.state, self.owned.epoch) == (InstanceState.LOADING, move.epoch)
            else:
                assert self.owned.record.state is InstanceState.PLANNING
        else:
            assert self.owned.record is before, "what serves goes on"
            assert self.owned.move is None
        epoch.lost = True
        self.act(actions)

    @rule(epoch=st.integers(0, 6), index=st.integers(-1, 6), done=st.integers(-1, 2**62), total=st.integers(0, 2**62))
    def progress(self, epoch, index, done, total):
        self.owned.on_progress(epoch, index, done, total)

    @invariant()
    def ready_means_started_and_wired(self):
        record = self.owned.record
        if record.state is InstanceState.READY:
            epoch = self.epochs[record.epoch]
            everyone = set(range(len(record.stages)))
            assert epoch.started == epoch.wired == everyone
            assert not epoch.lost

    @invariant()
    def every_state_has_what_belongs_to_it(self):
        record = self.owned.record
        assert record.epoch <= self.last_epoch
        if record.state in (InstanceState.READY, InstanceState.LOADING):
            assert [(s.node, s.start) for s in record.stages] == [
                (s.node, s.start) for s in self.epochs[record.epoch].stages
            ]
            places = [(stage.node, stage.device) for stage in record.stages]
            assert set(places) <= self.memory.keys(), "no device that is gone is counted on"
            assert len(set(places)) == len(places), "one stage per device"
        else:
            assert record.stages == ()
            assert record.reason or record.state is InstanceState.PLANNING

    @invariant()
    def what_is_published_can_be_read(self):
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(self.owned.record), type=InstanceRecord)

    @invariant()
    def only_stages_of_the_present_epoch_and_of_a_move_run(self):
        expected = {(self.owned.epoch, s.node, s.device) for s in self.owned.record.stages}
        move = self.owned.move
        if move is not None and self.epochs[move.epoch].starting:
            expected |= {(move.epoch, s.node, s.device) for s in move.stages}
        if self.owned.record.state is InstanceState.PLANNING:
            return  # what an epoch has left that is over may be kept by the next plan
        assert self.running == expected

    @invariant()
    def what_serves_and_what_comes_fit_side_by_side(self):
        used: dict[tuple[str, str], int] = {}
        move = self.owned.move
        beside = move.stages if move is not None and self.epochs[move.epoch].starting else ()
        for stage in (*self.owned.record.stages, *beside):
            place = stage.node, stage.device
            used[place] = used.get(place, 0) + stage.bytes
        assert all(size <= self.memory[place] for place, size in used.items())

    def teardown(self):
        """When nothing fails any more and there is room, it is ready after the longest pause."""
        if hasattr(self, "owned"):
            for index in range(5, 7):
                self.add_node(f"{index:064x}", (70, None))
            self.now += LAST_RETRY_SECONDS
            self.leaving.clear()
            self.consider(idle=False)
            epoch = self.epochs[self.owned.epoch]
            for index in range(len(epoch.stages)):
                if index not in epoch.started:
                    self.answer(self.owned.epoch, "start", index)
            for index in range(len(epoch.stages)):
                if index not in epoch.wired:
                    self.answer(self.owned.epoch, "wire", index)
            assert self.owned.record.state is InstanceState.READY
            self.ready_means_started_and_wired()


OneOwner.TestCase.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestOneOwner = OneOwner.TestCase


node_ids = st.sampled_from(NODES)
claims = st.dictionaries(node_ids, st.integers(0, 4), min_size=1).map(
    lambda epochs: [(o, InstanceRecord("tiny-1", MODEL, InstanceState.READY, e)) for o, e in epochs.items()]
)


@settings(max_examples=150, deadline=None)
@given(claims, st.randoms())
def test_everybody_picks_the_same_owner_whatever_order_the_claims_came_in(claims, random):
    shuffled = random.sample(claims, len(claims))
    assert winner(claims) == winner(shuffled)
    owner, record = winner(claims)
    assert record.epoch == max(claim.epoch for _, claim in claims)
    others = [claim for claim in claims if claim[0] != owner]
    assert winner([(owner, record), *random.sample(others, len(others) // 2)]) == (owner, record)


@settings(max_examples=100, deadline=None)
@given(claims, st.randoms())
def test_owners_that_hear_of_each_other_one_by_one_end_with_one(claims, random):
    """As when a split network heals: whoever hears of a better claim lets go, in whatever order the news travel."""
    expected = winner(claims)[0]
    owners = dict(claims)
    for here, there in random.sample(
        [(a, b) for a in owners for b in owners if a != b], len(owners) * (len(owners) - 1)
    ):
        if here in owners and there in owners and winner([(o, owners[o]) for o in (here, there)])[0] != here:
            del owners[here]
    assert set(owners) == {expected}


@settings(max_examples=150, deadline=None)
@given(st.lists(node_ids, max_size=4), st.sets(node_ids), st.sets(node_ids), st.randoms())
def test_everybody_picks_the_same_successor_and_only_one_that_is_alive(stage_nodes, alive, holders, random):
    stages = tuple(StageRecord(node, "cpu", i, i + 1, 1) for i, node in enumerate(stage_nodes))
    lost = InstanceRecord("tiny-1", MODEL, InstanceState.READY, 1, stages=stages)
    heir = successor(lost, sorted(alive), sorted(holders))
    assert (
        successor(lost, random.sample(sorted(alive), len(alive)), random.sample(sorted(holders), len(holders))) == heir
    )
    candidates = alive & (set(stage_nodes) | holders)
    assert (heir is None) == (not candidates)
    if heir is not None:
        assert heir in candidates
        assert heir in stage_nodes or not alive & set(stage_nodes), "who holds a stage comes first"
