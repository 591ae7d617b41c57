"""Whose word counts for an instance, who inherits it, and whom plans avoid."""

# Which action it is, is what each test says.
# pyright: reportAttributeAccessIssue=false

from msgspec.structs import replace

from swarmd.discovery.records import (
    Address,
    Claim,
    DeviceRecord,
    InstanceRecord,
    InstanceState,
    ModelSummary,
    NodeRecord,
    StageRecord,
)
from swarmd.node.cluster import planning
from swarmd.node.cluster.actions import StartStages, StopStages, TakeStages
from swarmd.node.cluster.ledger import Ledger, View
from swarmd.node.cluster.ownership import GAIN_SECONDS
from swarmd.node.cluster.trouble import FIRST_SECONDS, FORGIVE_SECONDS, LAST_SECONDS, MAX_NODES, Trouble
from swarmd.node.drain import ties
from swarmd.partition.connected import plan_connected
from swarmd.partition.costs import ModelCosts
from swarmd.partition.plan import Promise

MB = 1_000_000
A, B, C, D = (letter * 64 for letter in "abcd")
MODEL = ModelSummary("tiny", "0" * 64, 60 * MB, 8192, "llama")
COSTS = ModelCosts((10 * MB,) * 6, 0, 0, 0, 0)
PROMISES = [Promise(4096, 8192)]
INSTANCE = MODEL.sha256[:16]


def node(node_id, megabytes=0, *instances, **more):
    device = DeviceRecord("cpu", "cpu", "a CPU", 999 * MB, 999 * MB, megabytes * MB, 1e9, 1e9)
    return NodeRecord(node_id, f"node-{node_id[0]}", "1", 1, devices=(device,), instances=instances, **more)


def running(*stage_nodes, epoch=3, term=0, state=InstanceState.READY):
    stages = tuple(
        StageRecord(one, "cpu", i, i + 1, MB, (Address("192.0.2.1", 7000),)) for i, one in enumerate(stage_nodes)
    )
    return InstanceRecord(INSTANCE, MODEL, state, epoch, term, stages=stages)


def test_of_rival_claims_the_same_one_counts_whoever_looks():
    first, second = running(B, epoch=3), running(C, epoch=4)
    nodes = [node(A), node(B, 0, first), node(C, 0, second)]
    assert Ledger(A).all(nodes) == [(C, second)]
    assert Ledger(A).all([nodes[0], nodes[2], nodes[1]]) == [(C, second)]
    handed_on = replace(first, term=1)
    assert Ledger(A).all([node(B, 0, first), node(C, 0, handed_on)]) == [(C, handed_on)], "the later term counts"


def test_a_lower_claim_is_let_go():
    ledger = Ledger(A)
    ledger.own(MODEL, COSTS, PROMISES)
    ledger.consider(View([node(A, 70)]), 0)
    assert ledger.yield_to_winners([node(A, 70), node(B, 70, running(B, epoch=1))]) == [], "the lower id of two equals"
    [won] = ledger.yield_to_winners([node(A, 70), node(B, 70, running(B, epoch=2))])
    assert (won.owner, won.epoch, ledger.records) == (B, 2, ())
    assert ledger.own(MODEL, COSTS, PROMISES).epoch == 2, "the next plan has a higher epoch than any that was seen"


def test_a_claim_of_an_owner_that_only_others_see_counts_too():
    """Nodes that cannot reach each other but share a neighbour do not fight."""
    told = Claim(INSTANCE, "tiny", B, 5, 0)
    ledger = Ledger(A)
    ledger.own(MODEL, COSTS, PROMISES)
    view = [node(A, 70), node(C, 70, follows=(told,))]
    assert ledger.claims(view)[INSTANCE] == told
    assert [claim.owner for claim in ledger.yield_to_winners(view)] == [B]
    assert ledger.orphans(View(view, gone=[node(B, 0, running(A, B))])) == [], "for somebody it is still there"
    assert ledger.orphans(View([node(A), node(C)], gone=[node(B, 0, running(A, B))])) != []


def test_what_a_neighbour_says_of_an_owner_that_is_seen_is_old():
    told = Claim(INSTANCE, "tiny", B, 9, 0)
    nodes = [node(A), node(B, 0, running(B, epoch=3)), node(C, follows=(told,))]
    assert Ledger(A).claims(nodes)[INSTANCE].epoch == 3
    assert Ledger(A).claims([node(A), node(B), node(C, follows=(told,))]) == {}


def test_only_owners_that_are_seen_are_followed():
    told = Claim(INSTANCE, "tiny", D, 9, 0)
    nodes = [node(A), node(B, 0, running(B)), node(C, follows=(told,))]
    assert Ledger(A).follows(nodes) == (Claim(INSTANCE, "tiny", B, 3, 0),)


def test_the_lowest_stage_holder_inherits_what_is_left_when_an_owner_is_gone():
    gone = node(D, 0, running(B, C))
    for one, inherits in ((A, False), (B, True), (C, False)):
        view = View([node(one), *(node(other) for other in (A, B, C) if other != one)], gone=[gone])
        assert bool(Ledger(one).orphans(view)) == inherits
    claimed = View([node(B), node(A, 0, running(B, C, term=1)), node(C)], gone=[gone])
    assert Ledger(B).orphans(claimed) == [], "somebody has it already"


def test_an_heir_keeps_the_stages_if_all_of_them_are_there():
    left = running(B, C)
    heir = Ledger(B)
    [order] = heir.take_over(left, COSTS, PROMISES, View([node(B, 70), node(C, 70)]), 0)
    assert order.action == TakeStages(3, left.stages)
    assert [(record.epoch, record.term, record.state) for record in heir.records] == [(3, 1, InstanceState.READY)]
    assert heir.take_over(left, COSTS, PROMISES, View([node(B, 70)]), 0) == [], "it has it"
    for view in (View([node(B, 70)]), View([node(B, 70), node(C, 70)], suspects=frozenset({C}))):
        planner = Ledger(B)
        assert planner.take_over(left, COSTS, PROMISES, view, 0) == []
        [order] = planner.consider(view, 0)
        assert isinstance(order.action, StartStages)
        assert order.action.epoch == 4


def test_an_owner_that_leaves_hands_over_once_it_has_no_part_in_it():
    def heir(record):
        return Ledger(B).orphans(View([node(B), node(A, 0, record, leaving=True), node(C)]))

    assert heir(running(A, B)) == [], "its stage is to be moved first"
    assert heir(running(B, C, state=InstanceState.LOADING)) == []
    [record] = heir(running(B, C))
    assert record.stages[0].node == B


def test_a_node_whose_stage_does_not_come_up_is_avoided_and_then_tried_again():
    ledger = Ledger(A)
    ledger.own(MODEL, COSTS, PROMISES)
    view = View([node(A, 40), node(B, 60), node(C, 30)])
    [order] = ledger.consider(view, 0)
    assert [stage.node for stage in order.action.plan.stages] == [B]
    ledger.on_stage_lost(INSTANCE, 1, "disk full", 1, culprit=B, starting=True)
    stop, order = ledger.consider(view, 2)
    assert stop.action == StopStages(1, (B,))
    assert [stage.node for stage in order.action.plan.stages] == [A, C]
    owned = ledger.owned[INSTANCE]
    for index in range(2):
        owned.on_started(2, index, (Address("192.0.2.1", 7000),))
    for index in range(2):
        owned.on_wired(2, index, 2)
    assert ledger.consider(view, 1 + FIRST_SECONDS - 0.1) == []
    ledger.consider(view, 1 + FIRST_SECONDS)
    [order] = ledger.consider(view, 1 + FIRST_SECONDS + GAIN_SECONDS)
    assert [stage.node for stage in order.action.plan.stages] == [B], "one node is better than two"


def test_trouble_is_avoided_for_longer_each_time_and_forgiven_in_the_end():
    trouble = Trouble()
    trouble.on_crashed(A, 0)
    assert trouble.avoided(0) == frozenset(), "once may happen to anybody"
    now, spans = 0.0, []
    for _ in range(12):
        trouble.on_crashed(A, now)
        begin = now
        while A in trouble.avoided(now):
            now += FIRST_SECONDS
        spans.append(now - begin)
    assert spans[:4] == [5, 10, 20, 40]
    assert spans[-1] == LAST_SECONDS
    now += FORGIVE_SECONDS + LAST_SECONDS + 1
    trouble.on_crashed(A, now)
    assert trouble.avoided(now) == frozenset()


def test_trouble_of_strangers_does_not_add_up():
    trouble = Trouble()
    for index in range(3 * MAX_NODES):
        trouble.on_failed(f"{index:064x}", 0)
    assert len(trouble.avoided(0)) == MAX_NODES


def test_a_node_that_leaves_is_kept_by_its_answers_and_by_what_others_can_take():
    ours, theirs = running(A, B), running(B, C)
    assert ties(A, [(B, ours)], 0) == "its part of tiny"
    assert ties(A, [(A, theirs)], 2) == "2 answers and its part of tiny"
    assert ties(A, [(B, theirs)], 1) == "1 answer"
    assert ties(A, [(B, theirs)], 0) == ""
    assert ties(A, [(B, replace(ours, missing_bytes=5))], 0) == "", "nobody has room for it"


def test_nothing_is_planned_again_while_nothing_changes(monkeypatch):
    """With hundreds of nodes a plan takes milliseconds, and owners look at the swarm twice a second."""
    planned = []

    def plan(*arguments, **options):
        planned.append(arguments)
        return plan_connected(*arguments, **options)

    monkeypatch.setattr(planning, "plan_connected", plan)
    ledger = Ledger(A)
    ledger.own(MODEL, COSTS, PROMISES)
    there = [node(A, 40), node(B, 30)]
    ledger.consider(View(there), 0)
    owned = ledger.owned[INSTANCE]
    for index in range(2):
        owned.on_started(1, index, (Address("192.0.2.1", 7000),))
    for index in range(2):
        owned.on_wired(1, index, 0)
    planned.clear()
    for now in range(1, 6):
        assert ledger.consider(View(list(there)), now) == []
    assert len(planned) == 1
    there = [*there, node(C, 70)]
    ledger.consider(View(there), 6)
    assert len(planned) == 2, "one more has come"
    [order] = ledger.consider(View(there), 6 + GAIN_SECONDS)
    assert [stage.node for stage in order.action.plan.stages] == [C], "who lasts counts, though nothing changes"


def test_a_member_that_was_away_is_told_again_to_end_the_stages_of_a_move_that_was_given_up():
    """The order to end them may have been lost with the link, and they are of no epoch that is over."""
    ledger = Ledger(A)
    ledger.own(MODEL, COSTS, PROMISES)
    view = View([node(A, 40), node(B, 30)])
    ledger.consider(view, 0)
    assert ledger.on_heard_again(B) == [], "it is being started"
    owned = ledger.owned[INSTANCE]
    for index in range(2):
        owned.on_started(1, index, (Address("192.0.2.1", 7000),))
    for index in range(2):
        owned.on_wired(1, index, 0)
    assert ledger.on_heard_again(B) == [], "there was no other epoch"
    better = View([*view.nodes, node(C, 70)])
    ledger.consider(better, 1)
    [order] = ledger.consider(better, 1 + GAIN_SECONDS)
    assert order.action.epoch == 2
    assert ledger.on_heard_again(C) == [], "its stage is to take over"
    ledger.on_stage_lost(INSTANCE, 2, "the link was lost", 5)
    [order] = ledger.on_heard_again(C)
    assert order.action == StopStages(2, (C,), since=2)
    ledger.consider(View([node(A, 40)]), 6)
    [order] = ledger.on_heard_again(B)
    assert order.action == StopStages(2, (B,)), "nothing serves"
