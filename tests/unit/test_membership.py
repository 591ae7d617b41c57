"""Who is in the swarm, case by case: records, suspicion, going, coming back, and forgetting."""

import pytest
from msgspec.structs import replace

from swarmd.discovery.records import InstanceRecord, InstanceState, ModelSummary, NodeRecord
from swarmd.node.cluster.membership import (
    FORGET_SECONDS,
    GONE_SECONDS,
    MAX_GONE,
    SUSPECT_SECONDS,
    MemberChange,
    Membership,
    MemberState,
)

A, B = "a" * 64, "b" * 64
ALIVE, SUSPECT, GONE = MemberState.ALIVE, MemberState.SUSPECT, MemberState.GONE


def record(node_id=A, counter=1, name="one", leaving=False):
    return NodeRecord(node_id, name, "0", counter, leaving=leaving)


def member(node_id=A, now=0.0, **fields):
    """A membership with one member that has a link."""
    membership = Membership()
    membership.on_linked(node_id, now)
    membership.on_record(record(node_id, **fields), now)
    return membership


def state(membership, node_id=A):
    found = membership.get(node_id)
    return found.state if found else None


def test_a_node_becomes_a_member_with_its_first_record():
    membership = Membership()
    assert membership.on_linked(A, 0) == []
    assert membership.on_heard(A, 0) == []
    assert (membership.get(A), membership.alive()) == (None, [])
    assert membership.on_record(record(), 1) == [MemberChange(A, ALIVE, joined=True)]
    assert membership.alive() == [record()]


@pytest.mark.parametrize(
    ("counters", "expected"),
    [((1, 2, 3), 3), ((3, 2, 1), 3), ((2, 2), 2), ((1, 3, 2), 3)],
)
def test_the_last_writer_wins(counters, expected):
    membership = member(counter=0)
    for counter in counters:
        membership.on_record(record(counter=counter, name=f"of {counter}"), 1)
    assert membership.alive() == [record(counter=expected, name=f"of {expected}")]


def test_a_newer_record_is_told_and_an_older_one_is_not():
    membership = member(counter=5)
    assert membership.on_record(record(counter=6), 1) == [MemberChange(A, ALIVE)]
    assert membership.on_record(record(counter=6), 2) == []
    assert membership.on_record(record(counter=4), 2) == []


@pytest.mark.parametrize("sign", ["record", "heartbeat"])
def test_whoever_says_anything_in_time_is_not_suspected(sign):
    membership = member()
    now = 0.0
    for _ in range(10):
        now += SUSPECT_SECONDS - 0.1
        if sign == "record":
            membership.on_record(record(), now)
        else:
            membership.on_heard(A, now)
        assert membership.tick(now) == []
    assert state(membership) is ALIVE


def test_silence_leads_to_suspicion_and_then_to_being_gone():
    membership = member()
    assert membership.tick(SUSPECT_SECONDS - 0.01) == []
    assert membership.tick(SUSPECT_SECONDS) == [MemberChange(A, SUSPECT)]
    assert membership.alive() == [record()], "who is suspected may yet answer"
    assert membership.tick(SUSPECT_SECONDS + GONE_SECONDS - 0.01) == []
    assert membership.tick(SUSPECT_SECONDS + GONE_SECONDS) == [MemberChange(A, GONE)]
    assert membership.alive() == []
    assert membership.members[A].record == record(), "what it had is still known, for whoever takes over"


def test_a_node_says_whom_it_does_not_hear_from_the_first_suspicion_on():
    membership = member()
    assert membership.cut_off() == ()
    membership.tick(SUSPECT_SECONDS)
    assert membership.cut_off() == (A,)
    membership.on_heard(A, SUSPECT_SECONDS)
    assert membership.cut_off() == ()
    membership.tick(2 * SUSPECT_SECONDS)
    membership.tick(2 * SUSPECT_SECONDS + GONE_SECONDS)
    assert membership.cut_off() == (A,)


def test_a_node_is_not_cut_off_from_one_that_left():
    membership = member()
    membership.on_record(record(counter=2, leaving=True), 1)
    membership.on_unlinked(A, 2)
    assert membership.cut_off() == ()


def test_a_closed_link_leads_to_suspicion_at_once():
    membership = member()
    assert membership.on_unlinked(A, 1) == [MemberChange(A, SUSPECT)]
    assert membership.tick(1 + GONE_SECONDS) == [MemberChange(A, GONE)]


def test_a_link_that_closes_on_a_suspect_does_not_give_it_more_time():
    membership = member()
    membership.tick(SUSPECT_SECONDS)
    assert membership.on_unlinked(A, SUSPECT_SECONDS + 1) == []
    assert membership.tick(SUSPECT_SECONDS + GONE_SECONDS) == [MemberChange(A, GONE)]


def test_one_of_two_links_may_close():
    membership = member()
    membership.on_linked(A, 0)
    assert membership.on_unlinked(A, 1) == []
    assert state(membership) is ALIVE
    assert membership.on_unlinked(A, 1) == [MemberChange(A, SUSPECT)]


def test_who_says_that_it_leaves_is_gone_with_its_link():
    membership = member()
    assert membership.on_record(record(counter=2, leaving=True), 1) == [MemberChange(A, ALIVE)]
    assert membership.on_unlinked(A, 1) == [MemberChange(A, GONE)]


def test_a_suspect_that_leaves_is_gone_with_its_link():
    membership = member(leaving=True)
    membership.tick(SUSPECT_SECONDS)
    assert membership.on_unlinked(A, SUSPECT_SECONDS) == [MemberChange(A, GONE)]


def test_a_suspect_that_speaks_again_is_alive_and_has_not_joined_anew():
    membership = member()
    membership.tick(SUSPECT_SECONDS)
    assert membership.on_heard(A, SUSPECT_SECONDS + 1) == [MemberChange(A, ALIVE, heard_again=True)]
    assert membership.tick(SUSPECT_SECONDS + GONE_SECONDS) == []


def test_a_suspect_whose_link_is_back_is_alive():
    membership = member()
    membership.on_unlinked(A, 1)
    assert membership.on_linked(A, 2) == [MemberChange(A, ALIVE, heard_again=True)]


def test_who_was_silent_for_long_over_a_link_that_held_joins_again_when_it_speaks():
    membership = member()
    membership.tick(SUSPECT_SECONDS)
    membership.tick(SUSPECT_SECONDS + GONE_SECONDS)
    assert membership.on_heard(A, 10) == [MemberChange(A, ALIVE, joined=True, heard_again=True)]


def test_who_is_gone_and_linked_again_joins_with_its_new_record_and_not_with_the_old_one():
    membership = member(counter=7, leaving=True)
    membership.on_unlinked(A, 1)
    assert membership.on_linked(A, 5) == []
    assert membership.alive() == [], "what it said before it left does not count any more"
    assert membership.on_record(record(counter=8), 5) == [MemberChange(A, ALIVE, joined=True, heard_again=True)]
    assert membership.alive() == [record(counter=8)]


def test_a_node_whose_clock_was_set_back_while_it_was_off_is_believed():
    """Its counter is made from the clock; a machine without a battery may start in the past."""
    membership = member(counter=1000)
    membership.on_unlinked(A, 1)
    membership.on_linked(A, 2)
    assert membership.on_record(record(counter=3, name="restarted"), 2) == [MemberChange(A, ALIVE)]
    assert membership.on_record(record(counter=2, name="older"), 2) == []
    assert membership.alive() == [record(counter=3, name="restarted")]


def test_words_without_a_link_revive_nobody():
    membership = member()
    membership.on_unlinked(A, 1)
    assert membership.on_heard(A, 2) == []
    assert membership.on_record(record(counter=9), 2) == []
    assert state(membership) is SUSPECT
    assert membership.tick(1 + GONE_SECONDS) == [MemberChange(A, GONE)]


def test_who_is_long_gone_is_forgotten_and_may_come_back_as_new():
    membership = member()
    membership.on_unlinked(A, 0)
    membership.tick(GONE_SECONDS)
    membership.tick(GONE_SECONDS + FORGET_SECONDS)
    assert state(membership) is GONE
    membership.tick(GONE_SECONDS + FORGET_SECONDS + 0.01)
    assert membership.get(A) is None
    membership.on_linked(A, 100)
    assert membership.on_record(record(), 100) == [MemberChange(A, ALIVE, joined=True)]


def test_who_hangs_over_a_link_that_holds_is_not_forgotten_because_its_record_will_not_come_again():
    membership = member()
    for now in (SUSPECT_SECONDS, SUSPECT_SECONDS + GONE_SECONDS, 2 * FORGET_SECONDS):
        membership.tick(now)
    assert state(membership) is GONE
    assert membership.on_heard(A, 2 * FORGET_SECONDS) == [MemberChange(A, ALIVE, joined=True, heard_again=True)]


def test_only_so_many_are_remembered_and_the_latest_of_them():
    membership = Membership()
    for index in range(3 * MAX_GONE):
        node_id = f"{index:064x}"
        now = index * 0.01
        membership.on_linked(node_id, now)
        membership.on_record(record(node_id, leaving=True), now)
        membership.on_unlinked(node_id, now)
    membership.tick(5)
    assert sorted(membership.members) == [f"{index:064x}" for index in range(2 * MAX_GONE, 3 * MAX_GONE)]


def test_members_do_not_affect_each_other():
    membership = member(A)
    membership.on_linked(B, 0)
    membership.on_record(record(B), 0)
    membership.on_heard(B, 2)
    assert membership.tick(SUSPECT_SECONDS) == [MemberChange(A, SUSPECT)]
    assert state(membership, B) is ALIVE


def test_the_view_that_is_handed_out_is_a_copy():
    membership = member()
    membership.members.clear()
    assert membership.alive() == [record()]


def test_an_expelled_node_is_gone_at_once():
    membership = member()
    assert membership.expel(A, 1) == [MemberChange(A, GONE)]
    assert membership.alive() == []
    assert membership.expel(A, 1) == []
    assert membership.expel(B, 1) == [], "nobody"


def test_owners_are_remembered_for_their_heirs_however_many_go_at_once():
    """A network of hundreds that falls in two: the other half goes in a moment, and its instances need new owners."""
    membership = Membership()
    owned = InstanceRecord("tiny-1", ModelSummary("tiny", "0" * 64, 1, 64, "llama"), InstanceState.READY, 1)
    for index in range(3 * MAX_GONE):
        node_id = f"{index:064x}"
        membership.on_linked(node_id, 0)
        membership.on_record(replace(record(node_id), instances=(owned,) if index == 0 else ()), 0)
    for index in range(3 * MAX_GONE):
        membership.on_unlinked(f"{index:064x}", 1 + index / 1000)
    membership.tick(1 + GONE_SECONDS)
    membership.tick(2 + GONE_SECONDS)
    assert len(membership.gone()) == MAX_GONE
    assert [gone.id for gone in membership.gone() if gone.instances] == [f"{0:064x}"]
    membership.tick(3 + GONE_SECONDS + FORGET_SECONDS)
    assert membership.gone() == [], "not for ever"
