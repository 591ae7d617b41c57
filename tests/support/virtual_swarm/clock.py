"""Virtual time for asyncio: whoever would wait is at once at the next moment at which something happens."""

from __future__ import annotations

import asyncio
import random
import selectors
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch


class NothingLeftError(AssertionError):
    """Somebody waits for what will never happen."""


class _Jump(selectors.SelectSelector):
    """Waits for nothing: the time passes instead."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.moments = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise NothingLeftError("all tasks wait, and no time is set at which anything happens")
        self.now += max(0.0, timeout)
        self.moments += 1
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps; work for executors is done on the spot."""

    def __init__(self) -> None:
        self._jump = _Jump()
        super().__init__(self._jump)

    def time(self) -> float:
        return self._jump.now

    @property
    def moments(self) -> int:
        """At how many moments something has happened."""
        return self._jump.moments

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future


class VirtualTime:
    """Stands in for the module `time`."""

    def __init__(self, loop: VirtualLoop) -> None:
        self.monotonic = self.perf_counter = loop.time

    def time_ns(self) -> int:
        return round(self.monotonic() * 1e9)


@contextmanager
def virtual(loop: VirtualLoop, seed: int, *modules: ModuleType) -> Iterator[None]:
    """These modules see the loop's time, and chance that the seed decides."""
    clock, chance = VirtualTime(loop), random.Random(seed)
    with ExitStack() as stack:
        for module in modules:
            if hasattr(module, "time"):
                stack.enter_context(patch.object(module, "time", clock))
            if hasattr(module, "random"):
                stack.enter_context(patch.object(module, "random", chance))
        yield
