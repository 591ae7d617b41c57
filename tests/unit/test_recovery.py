"""The life of a request across epochs, in virtual time: what is lost is tried again, and nothing waits for ever."""

import math
import random

import pytest

from swarmd.discovery.records import InstanceRecord, InstanceState, ModelSummary
from swarmd.node.serving.recovery import MOST_LOSSES, SPREAD_SECONDS, Attempt, Fail, Patience, Recovery, Wait

PATIENCE = Patience()
MODEL = ModelSummary("m", "0" * 64, 1, 100, "llama")


def record(epoch: int, state: str = "ready", *, done: int = 0, missing: int = 0, id: str = "i") -> InstanceRecord:
    reason = f"{missing} bytes missing" if missing else ""
    return InstanceRecord(id, MODEL, InstanceState(state), epoch, reason=reason, done_bytes=done, missing_bytes=missing)


def begun(now: float = 0.0, epoch: int = 1, spread: float = 0.0) -> Recovery:
    """A request whose first attempt runs."""
    recovery = Recovery(now, spread)
    assert recovery.next(record(epoch), now) == Attempt(record(epoch))
    return recovery


def lost(now: float = 10.0, epoch: int = 1) -> Recovery:
    """A request that had tokens and has lost its epoch."""
    recovery = begun(now - 1, epoch)
    recovery.on_tokens(now - 0.5)
    recovery.on_lost("a node is gone", now)
    return recovery


def outcome(recovery: Recovery, seen: InstanceRecord | None, now: float) -> tuple[float, Attempt | Fail]:
    """When the request is tried again or fails, if the record stays as it is."""
    for _ in range(1000):
        decision = recovery.next(seen, now)
        if not isinstance(decision, Wait):
            return now, decision
        assert decision.until > now
        now = decision.until
    raise AssertionError("it waits for ever")


def test_a_request_goes_on_in_the_next_epoch_at_once():
    recovery = lost()
    assert recovery.recovering
    assert isinstance(recovery.next(record(1), 10.0), Wait), "the owner has not noticed yet"
    assert isinstance(recovery.next(record(2, "loading"), 10.1), Wait)
    assert recovery.next(record(2), 12.0) == Attempt(record(2))
    recovery.on_tokens(12.1)
    assert not recovery.recovering


def test_when_only_the_way_to_the_driver_was_lost_the_same_epoch_is_tried_again():
    recovery = lost()
    now, decision = outcome(recovery, record(1), 10.0)
    assert decision == Attempt(record(1))
    assert 10.3 <= now <= 11.0
    recovery.on_tokens(now)
    assert not recovery.recovering


def test_an_epoch_that_its_owner_takes_for_sound_for_ever_is_given_up():
    recovery, now, tries = lost(), 10.0, 0
    while True:
        now, decision = outcome(recovery, record(1), now)
        if isinstance(decision, Fail):
            break
        tries += 1
        recovery.on_lost("it says that it is over", now)
    assert (decision.code, decision.retry_after) == ("node_lost", 10)
    assert now == pytest.approx(10 + PATIENCE.unnoticed)
    assert 4 <= tries <= 8, "more and more seldom, and it never counts as another loss"


def test_when_memory_is_no_longer_enough_that_is_said_soon():
    now, decision = outcome(lost(), record(1, "waiting", missing=1000), 10.0)
    assert isinstance(decision, Fail)
    assert (decision.code, decision.message) == ("not_enough_memory", "1000 bytes missing")
    assert now - 10.0 <= 2.0
    recovery = lost()
    assert isinstance(recovery.next(record(1, "waiting", missing=1000), 10.0), Wait)
    assert recovery.next(record(2), 11.0) == Attempt(record(2)), "a node that comes back at once is waited for"


@pytest.mark.parametrize(
    ("state", "seconds"),
    [("loading", PATIENCE.loading), ("planning", PATIENCE.loading), ("waiting", PATIENCE.failing)],
)
def test_who_makes_no_progress_is_given_up(state, seconds):
    now, decision = outcome(lost(), record(2, state), 10.0)
    assert isinstance(decision, Fail)
    assert decision.code == "node_lost"
    assert now == pytest.approx(10.0 + seconds)


def test_nobody_there_is_given_up_sooner():
    now, decision = outcome(lost(), None, 10.0)
    assert isinstance(decision, Fail)
    assert decision.code == "node_lost"
    assert now == pytest.approx(10.0 + PATIENCE.nobody)


def test_while_loading_makes_progress_a_request_waits_for_minutes_but_not_for_ever():
    recovery, now, done = lost(), 10.0, 0
    decision = recovery.next(record(2, "loading"), now)
    while isinstance(decision, Wait):
        now += 20.0
        done += 1
        assert now < 1000
        decision = recovery.next(record(2, "loading", done=done), now)
    assert isinstance(decision, Fail)
    assert now - 10.0 >= PATIENCE.recovery
    assert now - 10.0 < PATIENCE.recovery + 20.0


def test_three_pipelines_in_a_row_without_a_token_end_the_request():
    recovery, now = begun(spread=0.5), 1.0
    decision: Attempt | Fail = Attempt(record(1))
    for epoch in range(1, MOST_LOSSES + 1):
        recovery.on_lost("signal 11", now)
        now, decision = outcome(recovery, record(epoch + 1), now)
    assert isinstance(decision, Fail)
    assert decision.code == "engine_error"
    assert "ended 3 pipelines" in decision.message
    assert "signal 11" in decision.message


def test_a_token_between_losses_or_an_epoch_that_was_ended_on_purpose_speaks_for_a_request():
    recovery, now = begun(), 1.0
    for epoch in range(1, 20):
        if epoch % 2:
            recovery.on_tokens(now)
        recovery.on_lost("lost", now, moved=epoch % 3 == 0)
        now, decision = outcome(recovery, record(epoch + 1), now)
        assert decision == Attempt(record(epoch + 1))
    for epoch in range(20, 30):
        recovery.on_lost("moved", now, moved=True)
        now, decision = outcome(recovery, record(epoch + 1), now)
        assert decision == Attempt(record(epoch + 1))


def test_those_that_were_lost_twice_together_do_not_come_back_together():
    """One of them may be what ends pipelines: the others get their tokens before it, or after it has failed."""
    back = []
    for spread in (0.0, 0.25, 0.5, 1.0):
        recovery = begun(spread=spread)
        recovery.on_lost("lost", 1.0)
        assert recovery.next(record(2), 1.0) == Attempt(record(2)), "the first time there is no reason to wait"
        recovery.on_lost("lost", 2.0)
        now, decision = outcome(recovery, record(3), 2.0)
        assert decision == Attempt(record(3))
        back.append(now - 2.0)
    assert back == pytest.approx([0.0, 0.25 * SPREAD_SECONDS, 0.5 * SPREAD_SECONDS, SPREAD_SECONDS])


def test_the_deadline_ends_a_request_whatever_it_waits_for():
    recovery = begun()
    recovery.on_tokens(7000.0)
    recovery.on_lost("lost", 7199.0)
    assert recovery.next(record(2, "loading"), 7199.0) == Wait(7199.5)
    now, decision = outcome(recovery, record(2, "loading"), 7199.0)
    assert now == pytest.approx(7200.0)
    assert isinstance(decision, Fail)
    assert decision.code == "deadline"


def test_an_attempt_is_abandoned_for_a_newer_epoch_that_serves():
    recovery = begun(epoch=4)
    recovery.on_tokens(1.0)
    assert not recovery.abandon(record(4), 100.0)
    assert not recovery.abandon(record(3), 100.0)
    assert not recovery.abandon(record(5, "loading"), 2.0), "tokens may still come"
    assert recovery.abandon(record(4), PATIENCE.request + 1), "there is an end to everything"
    assert not recovery.abandon(None, 100.0), "who does not see the owner may well see the driver"
    assert not recovery.abandon(record(5, id="other"), 100.0)
    assert recovery.abandon(record(5), 1.5)


def test_an_attempt_whose_epoch_is_over_is_abandoned_when_it_says_nothing():
    recovery = begun(epoch=4)
    recovery.on_tokens(1.0)
    over = record(4, "waiting", missing=5)
    assert not recovery.abandon(over, 2.0)
    recovery.on_tokens(2.5)
    assert not recovery.abandon(over, 4.0)
    assert recovery.abandon(over, 4.6)
    recovery.on_lost("nothing came from its driver any more", 4.6)
    now, decision = outcome(recovery, over, 4.6)
    assert isinstance(decision, Fail)
    assert decision.code == "not_enough_memory"
    assert now < 7.0


def test_the_name_of_the_model_may_stand_for_another_one_meanwhile():
    recovery = lost()
    _, decision = outcome(recovery, record(9, id="other"), 10.0)
    assert isinstance(decision, Fail)
    assert decision.code == "node_lost"


@pytest.mark.parametrize("seed", range(200))
def test_whatever_happens_a_request_ends_and_time_never_stands_still(seed):
    """Random epochs, states and losses: every decision leads on, and the request is over by its deadline."""
    rng = random.Random(seed)
    recovery, now, epoch, tokens = Recovery(0.0, rng.random()), 0.0, 1, 0
    seen: InstanceRecord | None = record(1)
    for _ in range(20_000):
        decision = recovery.next(seen, now)
        if isinstance(decision, Fail):
            assert now <= PATIENCE.request + 1
            return
        if isinstance(decision, Wait):
            assert now < decision.until < math.inf
            now = min(decision.until, now + rng.expovariate(1.0))
        else:
            assert decision.record is seen
            now += rng.expovariate(0.5)
            if rng.random() < 0.6:
                recovery.on_tokens(now)
                tokens += 1
            recovery.on_lost("lost", now, moved=rng.random() < 0.1)
        if rng.random() < 0.7:
            state = rng.choice(["ready", "ready", "loading", "planning", "waiting"])
            epoch += rng.random() < 0.5
            seen = None if rng.random() < 0.1 else record(epoch, state, done=rng.randrange(3), missing=rng.randrange(2))
    raise AssertionError("it did not end")
