"""Who is overdue: silence is counted, but never the time in which the listener itself stood still."""

import pytest

from swarmd.node.serving.liveness import FIRST_SECONDS, FIRST_STEPS, LEAST_SECONDS, Overdue, Silence, StepPatience


def names(silence: Silence[str], now: float) -> list[str]:
    return [found.who for found in silence.overdue(now)]


def ticks(silence: Silence[str], begin: float, end: float, tick: float = 0.25) -> float | None:
    """When somebody is overdue first, asked at every tick."""
    now = begin
    while now <= end:
        if silence.overdue(now):
            return now
        now += tick
    return None


def test_who_stops_talking_is_overdue_after_the_limit_and_until_forgotten():
    silence: Silence[str] = Silence(0.25)
    silence.watch("a", 0.0, 2.0)
    silence.watch("b", 0.0, 2.0)
    for now in (0.5, 1.0, 1.5, 2.0, 2.5):
        silence.heard("b", now)
        silence.heard("stranger", now)
    assert ticks(silence, 0.0, 3.0) == 2.25
    assert silence.overdue(2.5) == [Overdue("a", 2.5)]
    silence.forget("a")
    silence.forget("a")
    assert names(silence, 2.75) == []


def test_a_sign_of_life_counts_from_then_on():
    silence: Silence[str] = Silence(0.25)
    silence.watch("a", 0.0, 2.0)
    assert ticks(silence, 0.0, 1.75) is None
    silence.heard("a", 1.8)
    silence.heard("a", 1.0)  # an older one takes nothing back
    assert ticks(silence, 2.0, 5.0) == 4.0


def test_the_limit_may_change():
    silence: Silence[str] = Silence(0.25)
    silence.watch("a", 0.0, 60.0)
    assert ticks(silence, 0.0, 50.0) is None
    silence.heard("a", 50.0)
    silence.allow("a", 2.0)
    silence.allow("stranger", 2.0)
    assert ticks(silence, 50.25, 60.0) == 52.25


@pytest.mark.parametrize("pause", [1.0, 30.0, 86400.0])
def test_the_time_in_which_the_listener_stood_still_is_nobodys_fault(pause: float):
    """A process that was stopped, or a machine that slept, does not believe on waking that all others are dead."""
    silence: Silence[str] = Silence(0.25)
    silence.watch("alive", 0.0, 2.0)
    silence.watch("dead", 0.0, 2.0)
    assert ticks(silence, 0.0, 1.0) is None
    woke = 1.0 + pause
    assert names(silence, woke) == []
    silence.heard("alive", woke + 0.1)
    assert ticks(silence, woke + 0.25, woke + 0.75) is None
    silence.heard("alive", woke + 0.75)
    assert ticks(silence, woke + 1.0, woke + 1.75) is not None, "but whoever stays silent is found out"
    assert names(silence, woke + 2.0) == ["dead"]


def test_a_tick_that_comes_a_little_late_forgives_nothing():
    silence: Silence[str] = Silence(0.25)
    silence.watch("a", 0.0, 2.0)
    assert ticks(silence, 0.0, 2.5, tick=0.45) == pytest.approx(2.25)


def settled(seconds: float, tokens: int = 1) -> StepPatience:
    patience = StepPatience()
    for number in range(FIRST_STEPS):
        patience.answered(float(number), seconds, tokens)
    return patience


def test_the_first_steps_may_take_long():
    patience = StepPatience()
    assert not patience.overdue(FIRST_SECONDS, 0.0, 4)
    assert patience.overdue(FIRST_SECONDS + 1, 0.0, 4)
    patience.answered(1.0, 1.0, 4)
    assert not patience.settled
    assert not patience.overdue(200.0, 1.0, 4)


def test_after_that_the_limit_follows_what_is_usual():
    fast, slow = settled(0.01), settled(3.0)
    assert fast.settled
    assert LEAST_SECONDS <= fast.limit(1) < LEAST_SECONDS + 1
    assert slow.limit(1) >= 90.0
    last = FIRST_STEPS - 1.0
    assert not fast.overdue(last + 19.0, 0.0, 1), "it counts from the latest answer"
    assert fast.overdue(last + 21.0, 0.0, 1)
    assert not fast.overdue(last + 21.0, last + 15.0, 1), "and from when the oldest was sent"


def test_many_tokens_in_flight_may_take_as_long_as_they_would_one_by_one():
    """A long prompt behind short answers, on a slow machine."""
    patience = settled(1.0, tokens=1)
    assert patience.limit(256) > 256


def test_a_slow_spell_is_forgotten():
    patience = settled(10.0)
    for number in range(500):
        patience.answered(float(number), 0.01, 1)
    assert patience.limit(1) < LEAST_SECONDS + 1
