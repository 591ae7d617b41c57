"""What every fuzz target is checked for, and how inputs are made.

A run is a function of the target and the seed: input number n is made by a generator seeded with both and n, from the
target's seeds and from earlier inputs that had an outcome never seen before.
"""

from __future__ import annotations

import re
import resource
import signal
import time
import tracemalloc
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

from fuzz.mutate import mutate

SEEDS = Path(__file__).parent / "seeds"
"""Inputs that once broke something: SEEDS/TARGET/NAME. Each run begins with those of its target."""

CPU_SECONDS = 10.0
"""The longest that one input may compute. Generous: the targets take milliseconds, with tracemalloc."""
ADDRESS_SPACE = 1 << 30
"""What the process may map beyond what it has at the target's start, so that native code is bounded too."""
MAX_INPUT = 1 << 20
_POOL = 400
_VARIABLE = re.compile(r"'[^']*'|\"[^\"]*\"|`[^`]*`|[0-9]+|\(.*\)|0x[0-9a-f]+")


class Target(ABC):
    """One parser under test.

    `errors` are all that it may raise. Taken together, Python's and numpy's allocations of one input may have
    `memory + memory_per_byte * len(input)` bytes at a time.
    """

    name: str
    errors: tuple[type[Exception], ...] = ()
    memory = 1 << 20
    memory_per_byte = 64
    share = 1.0
    """How many inputs it gets in a run, relative to the others."""

    def seeds(self) -> list[bytes]:
        """Inputs as they ought to be; none unless a target has some."""
        return []

    def make(self, random: Random, pool: list[bytes]) -> bytes:
        """The next input."""
        return mutate(random, random.choice(pool), random.choice(pool))

    @abstractmethod
    def run(self, data: bytes) -> str:
        """Parse `data`; a word for what came of it. Raises one of `errors`, and AssertionError for a broken promise."""

    def close(self) -> None:
        """Give back what `seeds` or `run` took; nothing unless a target says so."""
        return


class Violation(Exception):
    """A target broke a promise on `data`."""

    def __init__(self, what: str, data: bytes) -> None:
        super().__init__(what)
        self.data = data


class _TooSlow(BaseException):
    pass


@dataclass
class Tally:
    """What a run of one target came to. Seconds are of CPU time, `peak` is bytes."""

    target: str
    inputs: int = 0
    seconds: float = 0.0
    outcomes: set[str] = field(default_factory=set)
    slowest: float = 0.0
    peak: int = 0


class Examiner:
    """Gives inputs to one target and measures them. A context manager, for the main thread of a process of its own."""

    def __init__(self, target: Target, *, limit_address_space: bool = True) -> None:
        self.target = target
        self.tally = Tally(target.name)
        self._limit = limit_address_space
        self._before: list[Callable[[], Any]] = []

    def __enter__(self) -> Examiner:
        handler = signal.signal(signal.SIGPROF, _raise_too_slow)
        self._before.append(lambda: signal.signal(signal.SIGPROF, handler))
        if not tracemalloc.is_tracing():
            tracemalloc.start()
            self._before.append(tracemalloc.stop)
        if self._limit:
            soft, hard = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (_mapped_bytes() + ADDRESS_SPACE, hard))
            self._before.append(lambda: resource.setrlimit(resource.RLIMIT_AS, (soft, hard)))
        return self

    def __exit__(self, *exc: object) -> None:
        for restore in reversed(self._before):
            restore()

    def examine(self, data: bytes) -> str:
        """Run one input; its outcome. Raises `Violation`."""
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        began = time.process_time()
        try:
            outcome = self.target.run(data)
        except self.target.errors as error:
            outcome = f"{type(error).__name__}: {_VARIABLE.sub('#', str(error))[:120]}"
        except _TooSlow:
            raise Violation(f"takes more than {CPU_SECONDS} s", data) from None
        except Exception as error:
            raise Violation(f"{type(error).__name__}: {str(error)[:300]}", data) from error
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        seconds = time.process_time() - began
        peak = tracemalloc.get_traced_memory()[1] - before
        bound = self.target.memory + self.target.memory_per_byte * len(data)
        if peak > bound:
            raise Violation(f"takes {peak} bytes for {len(data)}; the bound is {bound}", data)
        self._count(outcome, seconds, peak)
        return outcome

    def _count(self, outcome: str, seconds: float, peak: int) -> None:
        tally = self.tally
        tally.inputs += 1
        tally.seconds += seconds
        tally.outcomes.add(outcome)
        tally.slowest = max(tally.slowest, seconds)
        tally.peak = max(tally.peak, peak)


class Inputs:
    """The inputs of a run, without end: kept seeds, then mutations. `note` says which were worth building on."""

    def __init__(self, target: Target, seed: int, first: int = 0) -> None:
        self._target = target
        self._seed = seed
        self.number = first
        self._pool = target.seeds()
        self._own = len(self._pool)

    def __iter__(self) -> Iterator[bytes]:
        if self.number == 0:
            yield from self._pool[: self._own]
            yield from kept(self._target.name).values()
        while True:
            random = Random(f"{self._seed}/{self._target.name}/{self.number}")
            yield self._target.make(random, self._pool)[:MAX_INPUT]
            self.number += 1

    def note(self, data: bytes) -> None:
        """An input with a new outcome: later ones are made from it too, in place of an older one if there are many."""
        if len(self._pool) < _POOL:
            self._pool.append(data)
        else:
            place = self._own + self.number % (_POOL - self._own)
            self._pool[place] = data


def kept(target: str) -> dict[str, bytes]:
    """The inputs that once broke a target, by name."""
    folder = SEEDS / target.replace(" ", "-")
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*"))}


def _raise_too_slow(number: int, frame: FrameType | None) -> None:
    raise _TooSlow


def _mapped_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    return pages * resource.getpagesize()
