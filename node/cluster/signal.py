"""A change signal: whoever waits is woken by the next notification."""

from __future__ import annotations

import asyncio


class Signal:
    """Broadcasts "something changed" within one event loop; carries no data, so nobody can fall behind."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        """Wake everybody who waits now."""
        event, self._event = self._event, asyncio.Event()
        event.set()

    async def wait(self, timeout: float | None = None) -> bool:
        """Wait for the next notification; False when `timeout` seconds passed first."""
        event = self._event
        try:
            async with asyncio.timeout(timeout):
                await event.wait()
        except TimeoutError:
            return False
        return True
