"""The thread that computes: everything in order, results and errors where they belong."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading

import pytest

from swarmd.node.serving.compute_thread import ComputeThread
from swarmd.node.serving.prompt_wakeup import wake_promptly


async def test_posted_and_awaited_work_is_done_in_order_on_one_thread():
    compute, done = ComputeThread(), []
    for number in range(100):
        compute.post(lambda number=number: done.append((number, threading.get_ident())))
    ident = await asyncio.get_running_loop().run_in_executor(compute, threading.get_ident)
    assert [number for number, _ in done] == list(range(100))
    assert {thread for _, thread in done} == {ident} != {threading.get_ident()}


async def test_an_error_reaches_whoever_awaits_and_the_thread_goes_on():
    compute, loop = ComputeThread(), asyncio.get_running_loop()
    with pytest.raises(ZeroDivisionError):
        await loop.run_in_executor(compute, lambda: 1 / 0)
    assert await loop.run_in_executor(compute, lambda: 2) == 2


def test_work_that_was_given_up_before_its_turn_is_not_done():
    compute, gate, done = ComputeThread(), threading.Event(), []
    compute.post(gate.wait)
    given_up = compute.submit(done.append, 1)
    assert given_up.cancel()
    gate.set()
    assert compute.submit(lambda: 2).result(10) == 2
    assert done == []


def test_a_process_ends_although_its_thread_computes():
    code = (
        "import threading\n"
        "from swarmd.node.serving.compute_thread import ComputeThread\n"
        "begun = threading.Event()\n"
        "compute = ComputeThread()\n"
        "compute.post(lambda: (begun.set(), threading.Event().wait()))\n"
        "begun.wait()\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=30).returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="time slices are asked for on Linux only")
def test_short_slices_change_neither_priority_nor_policy():
    told = {}

    def ask() -> None:
        told["taken"] = wake_promptly()
        told["after"] = (os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0))

    before = (os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0))
    thread = threading.Thread(target=ask)  # a thread of its own: slices belong to a thread
    thread.start()
    thread.join()
    assert told["after"] == before
    assert isinstance(told["taken"], bool)
