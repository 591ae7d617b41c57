"""The change signal: whoever waits is woken, nobody who does not wait matters."""

import asyncio

from swarmd.node.cluster.signal import Signal


async def test_everybody_who_waits_is_woken():
    signal = Signal()
    waiting = [asyncio.create_task(signal.wait(5)) for _ in range(3)]
    asyncio.get_running_loop().call_soon(signal.notify)
    assert await asyncio.gather(*waiting) == [True, True, True]


async def test_a_notification_before_the_wait_does_not_count():
    signal = Signal()
    signal.notify()
    assert not await signal.wait(0)


async def test_a_wait_ends_when_its_time_is_over_and_the_next_one_works():
    signal = Signal()
    assert not await signal.wait(0.001)
    asyncio.get_running_loop().call_soon(signal.notify)
    assert await signal.wait(5)


async def test_a_wait_without_limit_can_be_cancelled():
    signal = Signal()
    waiting = asyncio.create_task(signal.wait())
    asyncio.get_running_loop().call_soon(waiting.cancel)
    results = await asyncio.gather(waiting, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
