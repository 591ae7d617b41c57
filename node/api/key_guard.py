"""The API key: compared in constant time, and guessed slowly.

A wrong key is answered after a second. Of the requests that wait so, each address may have a few and all addresses
together some more; while they are used up, nothing of that address is compared. So guesses per second are bounded,
however many connections somebody opens, and so is the memory for keeping count. The right key never waits.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import time
from collections import Counter

from aiohttp import web

from swarmd.node.api.errors import ApiError

log = logging.getLogger("swarmd.api")

WRONG_KEY_SECONDS = 1.0
MOST_PER_ADDRESS = 4
MOST_TOGETHER = 32
LOG_SECONDS = 10.0


class KeyGuard:
    """Asks for one key."""

    def __init__(self, key: str) -> None:
        self._digest = _digest(key)
        self._waiting: Counter[str] = Counter()
        self._refused = 0  # since the last line in the log
        self._logged = -LOG_SECONDS

    async def check(self, request: web.Request) -> None:
        """Raises ApiError 401 for a wrong or missing key, 429 for one guess too many."""
        header = request.headers.get("Authorization")
        if header is None:  # no guess, so no wait
            raise _refused()
        address = _address(request.remote)
        if self._waiting[address] >= MOST_PER_ADDRESS or self._waiting.total() >= MOST_TOGETHER:
            raise ApiError(429, "too many wrong API keys; try again in a moment", code="too_many_keys", retry_after=1)
        scheme, _, given = header.partition(" ")
        if hmac.compare_digest(_digest(given.strip()), self._digest) and scheme.lower() == "bearer":
            return
        await self._wait(address)
        raise _refused()

    async def _wait(self, address: str) -> None:
        self._log(address)
        self._waiting[address] += 1
        try:
            await asyncio.sleep(WRONG_KEY_SECONDS)
        finally:
            self._waiting[address] -= 1
            if not self._waiting[address]:
                del self._waiting[address]

    def _log(self, address: str) -> None:
        self._refused += 1
        if (now := time.monotonic()) - self._logged >= LOG_SECONDS:
            log.warning("refused wrong API keys: %d, the last from %s", self._refused, address)
            self._refused, self._logged = 0, now


def _refused() -> ApiError:
    return ApiError(401, "this endpoint wants its API key: Authorization: Bearer KEY", code="invalid_api_key")


def _digest(key: str) -> bytes:
    """Of one length whatever the key's, so that comparing tells nothing about that either."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _address(remote: str | None) -> str:
    """Who counts as one: an IPv4 address, or the /64 network that an IPv6 host can choose addresses from."""
    try:
        address = ipaddress.ip_address((remote or "").partition("%")[0])
    except ValueError:
        return "unknown"
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is None:
        return str(ipaddress.ip_network((int(address), 64), strict=False))
    return str(address)
