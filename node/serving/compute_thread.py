"""The thread on which a stage process computes, beside its event loop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class ComputeThread(Executor):
    """One thread that does what it is given, in order.

    An `Executor`, so that a coroutine can await blocking work (`loop.run_in_executor`). What happens at every step uses
    `post`, which makes no future and wakes nobody else. The thread ends with the process: nobody waits for a step that
    is still being computed then.
    """

    def __init__(self) -> None:
        self._work: SimpleQueue[Callable[[], object]] = SimpleQueue()
        threading.Thread(target=self._run, name="compute", daemon=True).start()

    def post(self, work: Callable[[], object]) -> None:
        """Do `work` when what was given before is done. It must not raise: nobody would hear of it."""
        self._work.put(work)

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Call `fn` when what was given before is done; the future of its result."""
        future: Future[T] = Future()

        def call() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        self.post(call)
        return future

    def _run(self) -> None:
        while True:
            self._work.get()()
