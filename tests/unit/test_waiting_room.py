"""How long requests wait for their turn, and how much may wait, in a time that the test sets."""

from __future__ import annotations

import pytest

from swarmd.node.engine.sampling_params import SamplingParams
from swarmd.node.serving.sequences import Phase, Sequence
from swarmd.node.serving.steps import Limits, QueueFull
from swarmd.node.serving.waiting_room import MOST_WAITING_TOKENS, WaitingRoom

LIMITS = Limits(n_stages=2, kv_tokens=100, context=60)


def sequence(seq: int, tokens: int = 10) -> Sequence:
    return Sequence(seq, list(range(tokens)), SamplingParams(), 5, frozenset())


def test_who_waited_too_long_is_named_once_and_in_the_order_of_coming():
    room = WaitingRoom(LIMITS, seconds=60)
    for seq, now in enumerate((0.0, 1.0, 30.0)):
        room.enter(sequence(seq), now)
    assert room.overdue(59.9) == []
    assert room.overdue(61.0) == [0, 1]
    assert room.overdue(61.0) == []
    assert room.overdue(90.0) == [2]
    assert room.tokens == 0


def test_who_has_begun_never_waits_too_long_though_it_is_put_back():
    room = WaitingRoom(LIMITS, seconds=60)
    begun, other = sequence(0), sequence(1, tokens=7)
    room.enter(begun, 0.0)
    room.enter(other, 0.0)
    begun.phase = Phase.RUNNING
    room.let_in()
    assert room.tokens == 7
    begun.phase = Phase.WAITING
    begun.tokens.append(5)
    assert room.overdue(1000.0) == [1]


def test_the_tokens_of_those_who_wait_are_bounded_and_come_free():
    room = WaitingRoom(LIMITS)
    waiting = [sequence(index, tokens=50) for index in range(16)]
    for one in waiting:
        room.check(50)
        room.enter(one, 0.0)
    assert room.tokens == 8 * LIMITS.kv_tokens
    with pytest.raises(QueueFull):
        room.check(1)
    room.leave(waiting[3])
    room.leave(waiting[3])
    room.check(50)
    with pytest.raises(QueueFull):
        room.check(51)


@pytest.mark.parametrize("context", [4096, 4 * MOST_WAITING_TOKENS])
def test_the_bound_does_not_grow_with_the_machine_but_always_has_room_for_one(context):
    room = WaitingRoom(Limits(n_stages=1, kv_tokens=8 * MOST_WAITING_TOKENS, context=context))
    most = max(context, MOST_WAITING_TOKENS)
    room.check(most)
    with pytest.raises(QueueFull):
        room.check(most + 1)
