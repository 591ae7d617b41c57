"""Finding nodes on the local network by mDNS / DNS-SD (RFC 6762, 6763).

What arrives here is a hint and nothing more: anybody on the network can say anything. A sighting is worth a
dial, and the link decides who is there. That somebody is gone is never concluded from mDNS.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import re
from collections.abc import Awaitable, Callable

from msgspec import Struct
from zeroconf import (
    BadTypeInNameException,
    DNSQuestionType,
    Error,
    InterfaceChoice,
    IPVersion,
    ServiceStateChange,
    Zeroconf,
)
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from swarmd.discovery.addresses import usable_addresses

log = logging.getLogger("swarmd.discovery")

SERVICE_TYPE = "_swarmd._tcp.local."
MAX_SEEN = 1024
_MAX_RESOLVING = 64
_RESOLVE_MS = 3000
_REFRESH_SECONDS = 5.0
_MAX_ADDRESSES = 16
# A DNS label holds 63 bytes, a node id is 64 hex digits: the name is its first half, the TXT record has all
# of it.
_NAME_DIGITS = 32


class Sighting(Struct, frozen=True):
    """A node that says it is on this network; nothing of it is proven. Addresses are (host, port)."""

    node_id: str
    swarm_tag: str
    version: int
    addresses: tuple[tuple[str, int], ...]


class MdnsDiscovery:
    """Announces this node and reports the nodes it sees, of any swarm, at each change of what they say."""

    def __init__(
        self,
        node_id: str,
        swarm_tag: str,
        protocol_version: int,
        port: int,
        on_sighting: Callable[[Sighting], None],
    ):
        self._node_id = node_id
        self._swarm_tag = swarm_tag
        self._protocol_version = protocol_version
        self._port = port
        self._on_sighting = on_sighting
        self._zeroconf: AsyncZeroconf | None = None
        self._browser: AsyncServiceBrowser | None = None
        self._announced: list[str] = []
        self._seen: dict[str, Sighting | None] = {}
        self._resolving: dict[str, asyncio.Task[None]] = {}
        self._refresher: asyncio.Task[None] | None = None
        self._announcing: Awaitable[None] | None = None
        self._trouble = ""
        self._crowded = False

    async def start(self) -> None:
        """Announce and browse. Where the network does not allow it, says so in the log and keeps trying."""
        # Its warnings, with tracebacks, are about single interfaces that cannot multicast; the others do.
        logging.getLogger("zeroconf").setLevel(logging.ERROR)
        await self._refresh()
        self._refresher = asyncio.create_task(self._keep_fresh(), name="mdns refresh")

    def rename(self, swarm_tag: str) -> None:
        """Announce another swarm tag from the next look at the interfaces on."""
        if swarm_tag != self._swarm_tag:
            self._swarm_tag = swarm_tag
            self._announced = []

    async def close(self) -> None:
        """Say goodbye on the network and stop. Idempotent."""
        tasks = [*self._resolving.values(), *([self._refresher] if self._refresher else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._refresher = None
        await self._stop()

    async def _keep_fresh(self) -> None:
        """Take up interfaces and addresses that come later; a machine may start before its network does."""
        while True:
            await asyncio.sleep(_REFRESH_SECONDS)
            await self._refresh()

    async def _refresh(self) -> None:
        try:
            if self._zeroconf is None:
                await self._open()
            else:
                await self._follow(self._zeroconf)
        except (OSError, Error, RuntimeError) as error:
            self._say_trouble(f"{error}")
            await self._stop()
        else:
            if self._trouble:
                log.info("mdns works again")
            self._trouble = ""

    async def _open(self) -> None:
        self._zeroconf = open_zeroconf()
        self._announced = _announceable(usable_addresses())
        # The name is unique already, so the probing of RFC 6762 section 8.1, over a second, is left out.
        self._announcing = await self._zeroconf.async_register_service(
            self._service(self._announced), cooperating_responders=True
        )
        # A QM question is answered at once by a node on this same machine, unlike the usual first question.
        self._browser = AsyncServiceBrowser(
            self._zeroconf.zeroconf,
            SERVICE_TYPE,
            handlers=[self._on_change],
            question_type=DNSQuestionType.QM,
        )

    async def _follow(self, zeroconf: AsyncZeroconf) -> None:
        announcing, self._announcing = self._announcing, None
        if announcing is not None:
            await announcing
        await zeroconf.async_update_interfaces()
        addresses = _announceable(usable_addresses())
        if addresses != self._announced:
            self._announced = addresses
            await (await zeroconf.async_update_service(self._service(addresses)))

    async def _stop(self) -> None:
        browser, self._browser = self._browser, None
        zeroconf, self._zeroconf = self._zeroconf, None
        with contextlib.suppress(OSError, Error, RuntimeError):
            if browser is not None:
                await browser.async_cancel()
            if zeroconf is not None:
                await zeroconf.async_close()

    def _service(self, addresses: list[str]) -> AsyncServiceInfo:
        name = self._node_id[:_NAME_DIGITS]
        return AsyncServiceInfo(
            SERVICE_TYPE,
            f"{name}.{SERVICE_TYPE}",
            port=self._port,
            server=f"{name}.local.",
            parsed_addresses=[address.partition("%")[0] for address in addresses],
            properties={"v": str(self._protocol_version), "id": self._node_id, "tag": self._swarm_tag},
        )

    def _on_change(self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        if state_change is ServiceStateChange.Removed:
            self._seen.pop(name, None)
            return
        if name.startswith(self._node_id[:_NAME_DIGITS]) or name in self._resolving:
            return
        full = name not in self._seen and len(self._seen) >= MAX_SEEN
        if full or len(self._resolving) >= _MAX_RESOLVING:
            if not self._crowded:
                log.warning("the network announces more nodes by mdns than are looked at")
            self._crowded = True
            return
        task = asyncio.ensure_future(self._look_at(zeroconf, name))
        self._resolving[name] = task
        task.add_done_callback(lambda _: self._resolving.pop(name, None))

    async def _look_at(self, zeroconf: Zeroconf, name: str) -> None:
        try:
            info = AsyncServiceInfo(SERVICE_TYPE, name)
            known = info.load_from_cache(zeroconf)
            if not known and not await info.async_request(zeroconf, _RESOLVE_MS, DNSQuestionType.QM):
                return
            sighting = read_sighting(info)
        except (OSError, Error, BadTypeInNameException, ValueError) as error:
            log.debug("an mdns answer is not usable: %s", error)
            return
        if self._seen.get(name) != sighting:
            self._seen[name] = sighting
            self._on_sighting(sighting)

    def _say_trouble(self, trouble: str) -> None:
        if trouble != self._trouble:
            self._trouble = trouble
            log.warning("mdns is limited or off (%s); nodes can be named with --peer HOST:PORT", trouble)


def open_zeroconf() -> AsyncZeroconf:
    """mDNS on every interface, IPv6 too where there is any. Raises OSError, zeroconf.Error or RuntimeError."""
    try:
        return AsyncZeroconf(interfaces=InterfaceChoice.All, ip_version=IPVersion.All)
    except OSError:  # no IPv6 on this machine
        return AsyncZeroconf(interfaces=InterfaceChoice.All, ip_version=IPVersion.V4Only)


def _announceable(addresses: list[str]) -> list[str]:
    """Loopback leads another machine to itself: it is announced only where there is nothing else."""
    outside = [a for a in addresses if not ipaddress.ip_address(a.partition("%")[0]).is_loopback]
    return outside or addresses


def _lacks_scope(host: str) -> bool:
    """Whether this is a link-local IPv6 address without its interface: it cannot be dialled."""
    address = ipaddress.ip_address(host)
    return isinstance(address, ipaddress.IPv6Address) and address.is_link_local and not address.scope_id


def read_sighting(info: AsyncServiceInfo) -> Sighting:
    """What a service record says, checked. Raises `ValueError` for anything a node does not announce."""
    properties = info.properties
    node_id = _text(properties.get(b"id"), r"[0-9a-f]{64}")
    swarm_tag = _text(properties.get(b"tag"), r"[0-9a-f]{16}")
    version = int(_text(properties.get(b"v"), r"[0-9]{1,5}"))
    port = info.port
    if port is None or not 1 <= port <= 65535:
        raise ValueError("no port")
    hosts = [host for host in info.parsed_scoped_addresses() if not _lacks_scope(host)][:_MAX_ADDRESSES]
    if not hosts:
        raise ValueError("no address")
    return Sighting(node_id, swarm_tag, version, tuple((host, port) for host in hosts))


def _text(value: bytes | None, pattern: str) -> str:
    text = (value or b"")[:255].decode("ascii", errors="replace")
    if re.fullmatch(pattern, text) is None:
        raise ValueError("a field is missing or malformed")
    return text
