"""The life of an instance in the hands of its owner, case by case."""

# Which action it is, is what each test says.
# pyright: reportAttributeAccessIssue=false

import msgspec
import pytest
from msgspec.structs import replace

from swarmd.discovery.records import Address, InstanceRecord, InstanceState, ModelSummary, StageRecord
from swarmd.node.cluster.actions import FetchStages, StartStages, StopStages, TakeStages, WireStages
from swarmd.node.cluster.claims import successor, winner
from swarmd.node.cluster.ownership import (
    BUSY_GAIN_SECONDS,
    FIRST_MOVE_RETRY_SECONDS,
    FIRST_RETRY_SECONDS,
    GAIN_SECONDS,
    IDLE_SECONDS,
    LAST_RETRY_SECONDS,
    STEADY_SECONDS,
    OwnedInstance,
)
from swarmd.node.cluster.planning import Surroundings
from swarmd.partition.costs import ModelCosts
from swarmd.partition.plan import Capacity, Promise

MB = 1_000_000
A, B, C = "a" * 64, "b" * 64, "c" * 64
MODEL = ModelSummary("tiny", "0" * 64, 60 * MB, 8192, "llama")
COSTS = ModelCosts((10 * MB,) * 6, 0, 0, 0, 0)
PROMISES = (Promise(4096, 8192), Promise(2048, 4096))
WHERE = (Address("192.0.2.1", 7000),)
ELSEWHERE = (Address("192.0.2.2", 7000),)


def capacities(**megabytes):
    return [Capacity(letter * 64, "cpu", size * MB, letter) for letter, size in megabytes.items()]


def around(*, suspects="", leaving="", avoided="", cut=(), **megabytes):
    silent, going, bad, *pairs = [
        frozenset(letter * 64 for letter in letters) for letters in (suspects, leaving, avoided, *cut)
    ]
    return Surroundings(capacities(**megabytes), suspects=silent, leaving=going, avoided=bad, cut=frozenset(pairs))


def instance(**options):
    return OwnedInstance("tiny-1", MODEL, COSTS, PROMISES, **options)


def started(split_over=None, **options):
    """An instance that was planned on a and b (or what is given) at time 0, and its plan."""
    owned = instance(**options)
    [action] = owned.consider(split_over or around(a=40, b=30), 0)
    assert isinstance(action, StartStages)
    return owned


def ready(split_over=None, **options):
    """The same with every stage started and wired."""
    owned = started(split_over, **options)
    for index in range(len(owned.record.stages)):
        owned.on_started(owned.epoch, index, WHERE)
    for index in range(len(owned.record.stages)):
        owned.on_wired(owned.epoch, index, 0)
    assert owned.record.state is InstanceState.READY
    return owned


def nodes(owned):
    return [stage.node for stage in owned.record.stages]


def test_it_is_planned_started_wired_and_ready():
    owned = instance()
    assert (owned.record.state, owned.epoch) == (InstanceState.PLANNING, 0)
    [start] = owned.consider(around(a=40, b=30), 0)
    assert isinstance(start, StartStages)
    assert (start.epoch, owned.record.state) == (1, InstanceState.LOADING)
    assert [(s.node, s.start, s.end) for s in start.plan.stages] == [
        (s.node, s.start, s.end) for s in owned.record.stages
    ]
    assert nodes(owned) == [A, B]
    assert owned.record.model.context == 4096
    assert owned.on_started(1, 1, ELSEWHERE) == []
    assert owned.on_started(1, 0, WHERE) == [WireStages(1, owned.record.stages)]
    assert [stage.addresses for stage in owned.record.stages] == [WHERE, ELSEWHERE]
    assert owned.on_wired(1, 0, 0) == []
    assert owned.record.state is InstanceState.LOADING
    owned.on_wired(1, 1, 0)
    assert (owned.record.state, owned.record.reason) == (InstanceState.READY, "")


def test_nothing_is_done_while_it_loads_or_serves():
    assert started().consider(around(a=40, b=30), 100) == []
    assert ready().consider(around(a=40, b=30, c=30), 100, idle=True) == [], "a new node is no reason to move"


def test_the_first_epoch_is_above_all_that_anybody_has_seen():
    assert started(epoch=7).epoch == 8


def test_a_promise_that_fits_is_what_the_record_says():
    costs = replace(COSTS, kv_bytes_per_token=500)
    owned = OwnedInstance("tiny-1", MODEL, costs, PROMISES)
    owned.consider(around(a=75), 0)
    assert owned.record.model.context == 2048
    assert any("reduced to 2048" in line for line in owned.record.explanation)


def test_too_little_memory_is_waited_out_with_a_reason_that_says_how_much_is_missing():
    owned = instance()
    assert owned.consider(around(a=40), 0) == []
    assert owned.record.state is InstanceState.WAITING
    assert "20.0 MB missing" in owned.record.reason
    told = owned.record
    assert owned.consider(around(a=40), 1) == []
    assert owned.record is told, "the same reason is not published again"
    [start] = owned.consider(around(a=40, b=30), 2)
    assert (start.epoch, owned.record.reason) == (1, "")


def test_a_duplicate_answer_counts_once():
    owned = started()
    owned.on_started(1, 0, WHERE)
    assert owned.on_started(1, 0, ELSEWHERE) == []
    assert owned.record.stages[0].addresses == WHERE
    assert owned.on_started(1, 1, WHERE) != []
    assert owned.on_started(1, 1, WHERE) == [], "also while it is being wired"
    owned.on_wired(1, 0, 0)
    owned.on_wired(1, 0, 0)
    assert owned.record.state is InstanceState.LOADING


def test_a_stage_that_is_not_started_yet_cannot_be_wired():
    owned = started()
    owned.on_wired(1, 0, 0)
    owned.on_wired(1, 1, 0)
    assert owned.record.state is InstanceState.LOADING
    owned.on_started(1, 0, WHERE)
    assert owned.on_started(1, 1, WHERE) == [WireStages(1, owned.record.stages)]


def test_a_stage_that_is_lost_ends_the_epoch_and_the_next_one_follows_after_a_pause():
    owned = ready()
    assert owned.on_stage_lost(1, "node b: out of memory", 10) == [], "what is sound may be kept"
    assert (owned.record.state, owned.record.reason) == (InstanceState.PLANNING, "node b: out of memory")
    assert (owned.record.stages, owned.record.explanation) == ((), ())
    assert owned.on_stage_lost(1, "node a: lost its neighbour", 10) == [], "one loss is told by several"
    assert owned.record.reason == "node b: out of memory"
    assert owned.consider(around(a=40, b=30), 10 + FIRST_RETRY_SECONDS - 0.01) == []
    [start] = owned.consider(around(a=40, b=30), 10 + FIRST_RETRY_SECONDS)
    assert start.epoch == 2


def test_who_is_refused_room_lets_go_of_what_it_holds_since_others_may_wait_for_that():
    owned = ready()
    assert owned.on_stage_lost(1, "killed", 10) == []
    owned.consider(around(a=40, b=30), 20)
    assert owned.on_stage_lost(2, "node b: other stages take 10 MB of it", 20, refused=True) == [StopStages(2, (A, B))]
    assert owned.record.state is InstanceState.PLANNING
    [start] = owned.consider(around(a=40, c=30), 30)
    assert (start.epoch, nodes(owned)) == (3, [A, C]), "nothing is left to be stopped"


def test_who_is_found_missing_after_a_loss_is_planned_around_at_once():
    owned = ready()
    owned.on_stage_lost(1, "node a: b has said nothing for 2.0 s", 10)
    assert owned.consider(around(a=70, b=30), 10.1) == [], "perhaps it will turn out who"
    silent = around(a=70, b=30, suspects="b")
    assert owned.consider(silent, 10.1)[0] == StopStages(1, (B,))
    assert nodes(owned) == [A]
    owned.on_stage_lost(2, "node a: cannot be loaded", 10.1)
    assert owned.consider(silent, 10.2) == [], "nothing has changed since"


def test_a_reason_of_any_length_leaves_the_record_readable_by_others():
    owned = ready()
    owned.on_stage_lost(1, "x" * 5000, 10)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(owned.record), type=InstanceRecord) == owned.record
    assert owned.record.reason.startswith("xxx")


def test_pauses_double_up_to_a_bound_however_often_it_fails_and_start_anew_when_it_has_served():
    owned = instance()
    now, pauses = 0.0, []
    for _ in range(2000):
        before = now
        while not owned.consider(around(a=40, b=30), now):
            now += FIRST_RETRY_SECONDS
        pauses.append(now - before)
        owned.on_stage_lost(owned.epoch, "it cannot be loaded", now)
    assert pauses[:8] == [0, 0.25, 0.5, 1, 2, 4, 8, LAST_RETRY_SECONDS]
    assert set(pauses[8:]) == {LAST_RETRY_SECONDS}
    now += LAST_RETRY_SECONDS
    owned.consider(around(a=70), now)
    owned.on_started(owned.epoch, 0, WHERE)
    owned.on_wired(owned.epoch, 0, now)
    now += STEADY_SECONDS
    owned.on_stage_lost(owned.epoch, "killed", now)
    assert owned.consider(around(a=70), now + FIRST_RETRY_SECONDS) != []


@pytest.mark.parametrize("make", [started, ready])
def test_when_a_node_is_lost_the_others_take_its_layers_at_once(make):
    owned = make(around(a=40, b=30))
    stop, start = owned.consider(around(a=40, c=30), 5)
    assert stop == StopStages(1, (B,)), "nodes that stay replace their stages themselves"
    assert (start.epoch, nodes(owned), owned.record.state) == (2, [A, C], InstanceState.LOADING)
    assert owned.record.reason == "1 of 2 stages lost their node"


def test_a_device_that_its_node_no_longer_has_is_a_loss():
    gpu = Capacity(A, "cuda:0", 40 * MB, "a (cuda:0)", accelerator=True)
    owned = ready(Surroundings([*capacities(a=30), gpu]))
    assert [(s.node, s.device) for s in owned.record.stages] == [(A, "cuda:0"), (A, "cpu")]
    [start] = owned.consider(around(a=30, b=40), 5)
    assert isinstance(start, StartStages)
    assert [(s.node, s.device) for s in owned.record.stages] == [(B, "cpu"), (A, "cpu")]


def test_when_the_others_cannot_hold_the_model_their_stages_end_and_it_waits():
    owned = ready()
    assert owned.consider(around(a=40), 5) == [StopStages(1, (A, B))]
    assert owned.record.state is InstanceState.WAITING
    assert "20.0 MB missing" in owned.record.reason
    assert owned.record.stages == ()
    [start] = owned.consider(around(a=40, b=30), 6)
    assert start.epoch == 2


def test_a_waiting_instance_does_not_hide_a_new_reason():
    owned = ready()
    owned.on_stage_lost(1, "killed", 5)
    owned.consider(around(a=40), 6)
    assert "20.0 MB missing" in owned.record.reason


def old_epoch_events(owned):
    return (
        owned.on_started(1, 0, ELSEWHERE),
        owned.on_wired(1, 1, 0),
        owned.on_stage_lost(1, "an old story", 50),
        owned.on_progress(1, 0, 5, 10),
    )


@pytest.mark.parametrize("stage", ["loading", "wiring", "ready", "waiting"])
def test_what_an_earlier_epoch_still_says_changes_nothing(stage):
    owned = ready()
    owned.on_stage_lost(1, "killed", 10)
    if stage != "waiting":
        owned.consider(around(a=40, b=30), 20)
    if stage in ("wiring", "ready"):
        for index in range(2):
            owned.on_started(2, index, WHERE)
    if stage == "ready":
        for index in range(2):
            owned.on_wired(2, index, 0)
    before = owned.record
    assert old_epoch_events(owned) == ([], [], [], None)
    assert owned.record == before


def test_what_an_epoch_to_come_would_say_changes_nothing_either():
    owned = started()
    before = owned.record
    assert owned.on_stage_lost(2, "from the future", 0) == []
    assert owned.on_started(2, 0, WHERE) == []
    assert owned.record == before


def test_progress_is_the_sum_over_the_stages_that_have_reported():
    owned = started()
    owned.on_progress(1, 0, 5, 10)
    owned.on_progress(1, 1, 1, 20)
    owned.on_progress(1, 0, 9, 10)
    assert (owned.record.done_bytes, owned.record.total_bytes) == (10, 30)


@pytest.mark.parametrize("report", [(1, 2, 5, 10), (1, -1, 5, 10), (1, 0, 11, 10), (1, 0, -1, 10), (1, 0, 0, 2**60)])
def test_progress_that_cannot_be_is_ignored(report):
    owned = started()
    owned.on_progress(*report)
    assert owned.record.total_bytes == 0


def moving(owned, surroundings, now, **options):
    """The actions once a gain has lasted."""
    assert owned.consider(surroundings, now, **options) == [], "it may be gone in a moment"
    return owned.consider(surroundings, now + GAIN_SECONDS, **options)


def complete(owned, epoch, stages, now=0):
    for index in range(stages):
        owned.on_started(epoch, index, ELSEWHERE)
    return [action for index in range(stages) for action in owned.on_wired(epoch, index, now)]


def test_a_better_plan_that_fits_beside_the_present_one_takes_over_without_a_break():
    owned = ready(around(a=40, b=30))
    served = owned.record
    better = around(a=40, b=30, c=100)
    [start] = moving(owned, better, 10)
    assert (start.epoch, start.beside, [s.node for s in start.plan.stages]) == (2, True, [C])
    assert owned.record is served, "the present epoch serves on"
    assert owned.consider(better, 20) == []
    assert complete(owned, 2, 1, 20) == [StopStages(1, (A, B))]
    assert (owned.epoch, nodes(owned), owned.record.state) == (2, [C], InstanceState.READY)
    assert owned.record.stages[0].addresses == ELSEWHERE


def test_a_gain_that_goes_away_again_moves_nothing():
    owned = ready(around(a=40, b=30))
    for now in range(0, 40, 2):
        assert owned.consider(around(a=40, b=30, c=100), now) == []
        assert owned.consider(around(a=40, b=30), now + 1) == []


def test_what_fails_on_its_way_to_take_over_changes_nothing_and_is_tried_again_later():
    owned = ready(around(a=40, b=30))
    served, better = owned.record, around(a=40, b=30, c=100)
    [start] = moving(owned, better, 10)
    assert owned.on_stage_lost(2, "node c: disk full", 13) == [StopStages(2, (C,), since=2)]
    assert (owned.record, owned.move) == (served, None)
    assert owned.consider(better, 13 + FIRST_MOVE_RETRY_SECONDS - 0.1) == []
    [start] = moving(owned, better, 13 + FIRST_MOVE_RETRY_SECONDS)
    assert start.epoch == 3
    assert owned.consider(around(a=40, b=30), 30) == [StopStages(3, (C,), since=3)], "its node has gone"


def test_when_what_serves_is_lost_what_was_to_take_over_goes_on_alone():
    owned = ready(around(a=40, b=30))
    moving(owned, around(a=40, b=30, c=100), 10)
    assert owned.on_stage_lost(1, "killed", 13) == [StopStages(1, (A, B))]
    assert (owned.epoch, owned.record.state, nodes(owned)) == (2, InstanceState.LOADING, [C])
    complete(owned, 2, 1)
    assert owned.record.state is InstanceState.READY


def test_where_memory_is_short_layers_are_fetched_first_and_then_the_stages_change_places():
    owned = ready(around(a=70), split=True)
    more = around(a=70, b=30, c=30)
    assert owned.consider(more, 5, idle=False) == []
    assert owned.consider(more, 5 + BUSY_GAIN_SECONDS - 0.1, idle=False) == [], "streams would have to wait"
    assert owned.consider(more, 5 + BUSY_GAIN_SECONDS - 0.1, idle=True) == [], "perhaps for a moment only"
    owned = ready(around(a=70), split=True)
    owned.consider(more, 5, idle=False)
    assert owned.consider(more, 5 + IDLE_SECONDS - 0.1, idle=True) == []
    [fetch] = owned.consider(more, 5 + IDLE_SECONDS, idle=True)
    assert isinstance(fetch, FetchStages)
    assert (fetch.epoch, len(fetch.plan.stages), owned.record.state) == (2, 3, InstanceState.READY)
    assert owned.on_fetched(2, 0) == owned.on_fetched(2, 1) == owned.on_fetched(2, 0) == []
    [start] = owned.on_fetched(2, 2)
    assert (start.epoch, start.beside, owned.epoch, owned.record.state) == (2, False, 2, InstanceState.LOADING)
    complete(owned, 2, 3)
    assert owned.record.state is InstanceState.READY


def test_asked_to_split_it_stays_where_it_is_when_that_gives_no_more_stages():
    owned = ready(around(a=40, b=30), split=True)
    assert owned.consider(around(a=400, b=300), 5, idle=True) == []
    assert owned.consider(around(a=400, b=300), 500, idle=True) == []


def test_a_node_that_leaves_is_relieved_at_once():
    owned = ready(around(a=40, b=30))
    [start] = owned.consider(around(a=40, b=30, c=100, leaving="b"), 5)
    assert (start.beside, [s.node for s in start.plan.stages]) == (True, [C])
    owned = ready(around(a=40, b=30))
    [fetch] = owned.consider(around(a=40, b=30, c=30, leaving="b"), 5)
    assert isinstance(fetch, FetchStages)
    owned.on_fetched(2, 0)
    stop, start = owned.on_fetched(2, 1)
    assert (stop, start.beside) == (StopStages(1, (B,)), False)


def test_a_node_that_leaves_and_cannot_be_spared_is_told_so_and_serves_on():
    owned = ready(around(a=40, b=30))
    assert owned.consider(around(a=40, b=30, leaving="b"), 5) == []
    assert (owned.record.state, owned.record.missing_bytes) == (InstanceState.READY, 20 * MB)
    assert "a node leaves" in owned.record.reason


def test_nodes_that_are_silent_are_not_planned_with_but_waited_for_if_needed():
    owned = instance()
    [start] = owned.consider(around(a=40, b=30, c=30, suspects="b"), 0)
    assert [s.node for s in start.plan.stages] == [A, C]
    owned = instance()
    assert owned.consider(around(a=40, b=30, suspects="b"), 0) == []
    assert (owned.record.state, owned.record.missing_bytes) == (InstanceState.PLANNING, 0)
    assert owned.consider(around(a=40, b=30), 1) != []


def test_nodes_that_gave_trouble_are_used_only_if_needed():
    owned = instance()
    [start] = owned.consider(around(a=40, b=30, c=30, avoided="b"), 0)
    assert [s.node for s in start.plan.stages] == [A, C]
    [start] = instance().consider(around(a=40, b=30, avoided="b"), 0)
    assert [s.node for s in start.plan.stages] == [A, B]


def test_nodes_that_cannot_reach_each_other_are_never_neighbours():
    [start] = instance().consider(around(a=40, b=30, c=25, cut=["ab"]), 0)
    assert [s.node for s in start.plan.stages] == [A, C]
    owned = instance()
    assert owned.consider(around(a=40, b=30, cut=["ab"]), 0) == []
    assert "cannot reach each other" in owned.record.reason


def test_an_heir_goes_on_with_what_runs_and_keeps_what_its_owner_wished():
    left = ready(around(a=40, b=30), split=True).record
    heir = OwnedInstance("tiny-1", MODEL, COSTS, [Promise(8192, 16384), *PROMISES])
    assert heir.adopt(left, 50) == [TakeStages(1, left.stages)]
    assert (heir.epoch, heir.record.term, heir.record.state, heir.record.stages) == (
        1,
        1,
        InstanceState.READY,
        left.stages,
    )
    for now in (50, 60, 500):
        assert heir.consider(around(a=40, b=30), now, idle=True) == []
    assert winner([(A, left), (B, heir.record)])[0] == B


def test_letting_go_stops_every_stage_once():
    owned = ready()
    assert owned.stop() == [StopStages(1, (A, B))]
    assert instance().stop() == []


def claim(owner, epoch):
    return owner, InstanceRecord("tiny-1", MODEL, InstanceState.READY, epoch)


@pytest.mark.parametrize(
    ("claims", "owner"),
    [
        ([(A, 1)], A),
        ([(A, 1), (B, 2)], B),
        ([(B, 2), (A, 2)], A),
        ([(C, 3), (B, 3), (A, 1)], B),
    ],
)
def test_of_rival_claims_the_highest_epoch_counts_and_then_the_lowest_owner(claims, owner):
    assert winner([claim(*one) for one in claims])[0] == owner


def lost_instance(*stage_nodes):
    stages = tuple(StageRecord(node, "cpu", index, index + 1, 1) for index, node in enumerate(stage_nodes))
    return InstanceRecord("tiny-1", MODEL, InstanceState.READY, 3, stages=stages)


@pytest.mark.parametrize(
    ("stage_nodes", "alive", "holders", "heir"),
    [
        ((A, B, C), [C, B], [], B),
        ((C, B), [A, B, C], [A], B),
        ((A,), [B, C], [C, B], B),
        ((A,), [B, C], [C], C),
        ((A,), [B, C], [A], None),
        ((), [], [], None),
    ],
)
def test_the_lowest_stage_holder_takes_over_or_else_the_lowest_file_holder(stage_nodes, alive, holders, heir):
    assert successor(lost_instance(*stage_nodes), alive, holders) == heir


def test_what_has_served_is_taken_again_while_all_of_it_can_be_relied_on():
    owned = ready()
    before = [(stage.node, stage.start, stage.end) for stage in owned.record.stages]
    owned.on_stage_lost(1, "node b: crashed", 10)
    more = around(a=40, b=30, c=200)
    owned.consider(more, 11)
    assert [(stage.node, stage.start, stage.end) for stage in owned.record.stages] == before, "its stages are kept"


@pytest.mark.parametrize("trouble", [{"suspects": "b"}, {"avoided": "b"}, {"leaving": "b"}, {"cut": ["ab"]}, {"b": 20}])
def test_it_is_not_taken_again_where_one_of_its_nodes_is_better_done_without(trouble):
    owned = ready()
    owned.on_stage_lost(1, "node b: crashed", 10)
    owned.consider(around(**{"a": 40, "b": 30, "c": 200} | trouble), 11)
    assert nodes(owned) == [C]
