"""Who has been silent for too long, and which step away for too long. Pure: times, in seconds, are passed in."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

Who = TypeVar("Who", bound=Hashable)


@dataclass
class _Watched:
    heard: float
    limit: float


class Overdue(NamedTuple, Generic[Who]):
    """Somebody who has said nothing for so many seconds, longer than allowed."""

    who: Who
    silent: float


class Silence(Generic[Who]):
    """Watches those who are to be heard of again and again.

    `overdue` is to be asked every `tick` seconds. When it is asked much later, then the one who asks stood still (its
    process was stopped, or had no core) and could hear nobody: that time is not held against anybody.
    """

    def __init__(self, tick: float) -> None:
        self._tick = tick
        self._watched: dict[Who, _Watched] = {}
        self._asked: float | None = None

    def watch(self, who: Who, now: float, limit: float) -> None:
        """From now on `who` must be heard of every `limit` seconds."""
        self._watched[who] = _Watched(now, limit)

    def heard(self, who: Who, now: float) -> None:
        """There was a sign of life; of somebody who is not watched it is ignored."""
        if (watched := self._watched.get(who)) is not None:
            watched.heard = max(now, watched.heard)

    def allow(self, who: Who, limit: float) -> None:
        """Another limit from now on."""
        if (watched := self._watched.get(who)) is not None:
            watched.limit = limit

    def forget(self, who: Who) -> None:
        """Nobody waits for `who` any more; unknown ones are let be."""
        self._watched.pop(who, None)

    def overdue(self, now: float) -> list[Overdue[Who]]:
        """Everybody who is silent for longer than allowed, again at every call until forgotten."""
        stood_still = 0.0 if self._asked is None else now - self._asked - self._tick
        self._asked = now
        if stood_still > self._tick:
            for watched in self._watched.values():
                watched.heard = min(now, watched.heard + stood_still)
        return [
            Overdue(who, now - watched.heard)
            for who, watched in self._watched.items()
            if now - watched.heard > watched.limit
        ]


FIRST_SECONDS = 300.0
LEAST_SECONDS = 20.0
TIMES_THE_USUAL = 30
# Kernels that are compiled when they are first needed make the first steps slow.
FIRST_STEPS = 8
_FADE = 0.98


class StepPatience:
    """How long to wait for the answer to a step before something must hang.

    Generous: the slowest of the latest answers many times over, and besides for every token in flight the most that
    one took. Until the first steps are done nothing is known, and compilers may be at work.
    """

    def __init__(self) -> None:
        self._answers = 0
        self._slowest = 0.0
        self._per_token = 0.0
        self._last: float | None = None

    @property
    def settled(self) -> bool:
        """Whether the first steps are done."""
        return self._answers >= FIRST_STEPS

    def answered(self, now: float, seconds: float, tokens: int) -> None:
        """A step of so many tokens was answered after so many seconds."""
        self._answers += 1
        self._last = now
        self._slowest = max(seconds, self._slowest * _FADE)
        self._per_token = max(seconds / max(tokens, 1), self._per_token * _FADE)

    def limit(self, tokens: int) -> float:
        """So long may there be no answer at all while steps with so many tokens in all are in flight."""
        if not self.settled:
            return FIRST_SECONDS
        return max(LEAST_SECONDS, TIMES_THE_USUAL * self._slowest) + tokens * self._per_token

    def overdue(self, now: float, oldest_sent: float, tokens: int) -> bool:
        """Whether it has been too long since the oldest step in flight was sent, or since any was answered."""
        since = oldest_sent if self._last is None else max(oldest_sent, self._last)
        return now - since > self.limit(tokens)
