"""The life of one request across the epochs of its instance: when to try, when to wait, when to give up. Pure.

Whoever serves the request (the entry node's gateway, or a simulation) keeps to a simple loop:

- Ask `next` with what the swarm knows of the instance. An `Attempt` is to be made at once: stream from that epoch's
  driver, given the prompt and all tokens so far. After a `Wait`, ask again at that time, or earlier when the instance's
  record changes. A `Fail` ends the request.
- During an attempt, tell of `on_tokens`, and ask `abandon` whenever the record changes, and every second or two. When
  the attempt is lost or abandoned, tell of `on_lost` and ask `next`.

All times are seconds of one clock that never goes back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from swarmd.discovery.records import InstanceRecord, InstanceState

FailCode = Literal["node_lost", "not_enough_memory", "engine_error", "deadline"]


class Attempt(NamedTuple):
    """Stream from the driver of this record now."""

    record: InstanceRecord


class Wait(NamedTuple):
    """Nothing can be done before this time, unless the record changes."""

    until: float


class Fail(NamedTuple):
    """The request is over."""

    code: FailCode
    message: str
    retry_after: int | None = None


@dataclass(frozen=True)
class Patience:
    """How long a request waits, in seconds.

    `request` is for all of it. `recovery` is for going on after the last token, however well the next epoch comes on.
    Beside that a wait ends when for so long nothing has changed: `loading` while stages are brought up, `failing` while
    the owner waits before it tries again, `short` while memory is lacking, `nobody` while nobody owns the instance,
    `unnoticed` while the owner takes the lost epoch for sound. `silent` is how long an attempt may be without a token
    once its epoch is over.
    """

    request: float = 7200.0
    recovery: float = 300.0
    loading: float = 90.0
    failing: float = 30.0
    short: float = 1.0
    nobody: float = 9.0
    unnoticed: float = 15.0
    silent: float = 2.0


MOST_LOSSES = 3
"""So many pipelines in a row that ended without a new token are more than chance: the request may be what ends them."""

# The same epoch is tried again, as perhaps only the way to it was lost.
FIRST_RETRY_SECONDS = 0.5
LAST_RETRY_SECONDS = 4.0
# Who may have ended pipelines, and who only shared them, do not come back at the same moment.
SPREAD_SECONDS = 3.0


def lacks_memory(record: InstanceRecord) -> bool:
    """Whether the instance waits for memory that is not there."""
    return record.state is InstanceState.WAITING and record.missing_bytes > 0


class Recovery:
    """One request, from `now` on. `spread`, from 0 to 1, should differ between requests: see `MOST_LOSSES`."""

    def __init__(self, now: float, spread: float = 0.0, patience: Patience = Patience()) -> None:
        self._patience = patience
        self._spread = spread
        self._deadline = now + patience.request
        self._instance = ""
        # The epoch of the latest attempt, and those in a row that were lost without a token.
        self._epoch = -1
        self._losses = 0
        self._counted = -1
        self._reason = ""
        self._lost_at: float | None = None
        # The epoch that was lost last, and when for the first time.
        self._lost_epoch, self._epoch_lost_at = -1, now
        self._not_before = now
        self._retry_seconds = FIRST_RETRY_SECONDS
        self._heard_at = now
        # When the latest attempt began, or its latest token came. And what the record says, and since when.
        self._seen: tuple[object, ...] | None = None
        self._seen_at = now

    @property
    def recovering(self) -> bool:
        """Whether an epoch was lost and nothing has come since."""
        return self._lost_at is not None

    def on_tokens(self, now: float) -> None:
        """New tokens came: whatever was lost before is forgotten."""
        self._heard_at = now
        self._lost_at = None
        self._losses = 0
        self._counted = self._lost_epoch = -1
        self._retry_seconds = FIRST_RETRY_SECONDS

    def on_lost(self, reason: str, now: float, *, moved: bool = False) -> None:
        """The attempt is over. `moved`: its epoch was ended on purpose, which speaks against nobody."""
        self._reason = reason
        self._seen = None  # what the record said during the attempt does not count
        if self._lost_at is None:
            self._lost_at = now
        if self._lost_epoch != self._epoch:
            self._lost_epoch, self._epoch_lost_at = self._epoch, now
        if self._epoch != self._counted and not moved:
            self._counted = self._epoch
            self._losses += 1
        self._not_before = now
        if self._losses >= MOST_LOSSES - 1:
            self._not_before += self._spread * SPREAD_SECONDS

    def abandon(self, record: InstanceRecord | None, now: float) -> bool:
        """Whether the attempt under way is to be given up: another epoch serves, or this one is over and says nothing.

        A driver that stands still keeps its links, so nobody hears of its end from itself.
        """
        if now >= self._deadline:
            return True
        if record is None or record.id != self._instance:
            return False
        if record.state is InstanceState.READY:
            return record.epoch > self._epoch
        return now - self._heard_at > self._patience.silent

    def next(self, record: InstanceRecord | None, now: float) -> Attempt | Wait | Fail:
        """What to do now, before the first attempt and after each that was lost."""
        if now >= self._deadline:
            return Fail("deadline", f"the answer took longer than {self._patience.request:.0f} s")
        if self._losses >= MOST_LOSSES:
            return Fail("engine_error", f"this request ended {self._losses} pipelines in a row: {self._reason}")
        if record is not None and self._instance and record.id != self._instance:
            record = None  # the name stands for another model now
        self._note(record, now)
        if record is not None and record.state is InstanceState.READY and self._may_try(record, now):
            self._instance, self._epoch, self._heard_at = record.id, record.epoch, now
            return Attempt(record)
        return self._wait(record, now)

    def _note(self, record: InstanceRecord | None, now: float) -> None:
        seen = (record.epoch, record.state, record.done_bytes) if record is not None else ()
        if seen != self._seen:
            self._seen, self._seen_at = seen, now

    def _may_try(self, record: InstanceRecord, now: float) -> bool:
        if record.epoch > self._epoch:
            return now >= self._not_before
        # Its owner does not know that it is lost, or it is not.
        if record.epoch < self._epoch or now < self._not_before + self._retry_seconds:
            return False
        self._retry_seconds = min(2 * self._retry_seconds, LAST_RETRY_SECONDS)
        return True

    def _wait(self, record: InstanceRecord | None, now: float) -> Wait | Fail:
        patience = self._patience
        lost_at = self._seen_at if self._lost_at is None else self._lost_at
        ends = lost_at + patience.recovery
        if record is None:
            ends, why = min(ends, self._seen_at + patience.nobody), "nobody took the model over"
        elif record.state is InstanceState.READY and record.epoch > self._epoch:
            why = self._reason  # it is tried as soon as its turn comes
        elif record.state is InstanceState.READY:
            # Tried again and again, it fails again and again.
            ends, why = min(ends, self._epoch_lost_at + patience.unnoticed), self._reason
        elif lacks_memory(record):
            ends, why = min(ends, self._seen_at + patience.short), record.reason
        elif record.state is InstanceState.WAITING:
            ends, why = min(ends, self._seen_at + patience.failing), record.reason
        else:
            ends, why = min(ends, self._seen_at + patience.loading), record.reason or f"it is {record.state.value}"
        if now >= ends and record is not None and lacks_memory(record):
            return Fail("not_enough_memory", why, retry_after=10)
        if now >= ends:
            words = f"a node of the pipeline was lost and no other could go on with the answer in time ({why})"
            return Fail("node_lost", words, retry_after=10)
        soon = [self._not_before, self._not_before + self._retry_seconds]
        return Wait(min([ends, self._deadline, *(time for time in soon if time > now)]))
