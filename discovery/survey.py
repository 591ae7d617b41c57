"""What can be learned of the local network by listening for a moment, without announcing anything: for `swarmd doctor`.

A one-shot DNS question (RFC 6762, section 5.1) tells whether an interface lets multicast out at all; a short browse
tells which nodes answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket

from zeroconf import BadTypeInNameException, DNSQuestionType, Error, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo

from swarmd.discovery.addresses import usable_addresses
from swarmd.discovery.mdns import MAX_SEEN, SERVICE_TYPE, Sighting, open_zeroconf, read_sighting

_GROUP = ("224.0.0.251", 5353)
_LABELS = b"".join(bytes([len(label)]) + label.encode() for label in SERVICE_TYPE.split("."))
# Header with one question; who (PTR, 12) is there of this type in the Internet's class (1)?
_QUESTION = bytes([0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0]) + _LABELS + bytes([0, 12, 0, 1])


def multicast_troubles() -> dict[str, str]:
    """Each IPv4 address of this machine beyond loopback -> why no multicast leaves by it; "" where it does."""
    addresses = (ipaddress.ip_address(text.partition("%")[0]) for text in usable_addresses())
    return {str(ip): _trouble_of(ip) for ip in addresses if ip.version == 4 and not ip.is_loopback}


def _trouble_of(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, ip.packed)
            sock.setblocking(False)
            sock.sendto(_QUESTION, _GROUP)
    except OSError as error:
        return error.strerror or str(error)
    return ""


async def nodes_in_sight(seconds: float) -> list[Sighting]:
    """The nodes of any swarm that answer within `seconds`, in no order; OSError where mDNS cannot be used at all."""
    try:
        zeroconf = open_zeroconf()
    except (Error, RuntimeError) as error:
        raise OSError(str(error)) from None
    names: set[str] = set()

    def note(zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        if state_change is not ServiceStateChange.Removed and len(names) < MAX_SEEN:
            names.add(name)

    # A QM question is answered at once, also by a node on this same machine.
    browser = AsyncServiceBrowser(zeroconf.zeroconf, SERVICE_TYPE, handlers=[note], question_type=DNSQuestionType.QM)
    try:
        await asyncio.sleep(seconds)
        sightings = [_sighting(zeroconf.zeroconf, name) for name in names]
    finally:
        with contextlib.suppress(OSError, Error, RuntimeError):
            await browser.async_cancel()
            await zeroconf.async_close()
    return [sighting for sighting in sightings if sighting is not None]


def _sighting(zeroconf: Zeroconf, name: str) -> Sighting | None:
    try:
        info = AsyncServiceInfo(SERVICE_TYPE, name)
        return read_sighting(info) if info.load_from_cache(zeroconf) else None
    except (Error, BadTypeInNameException, ValueError):
        return None
