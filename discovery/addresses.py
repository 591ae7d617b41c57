"""The addresses under which other machines may reach this one."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

import ifaddr

from swarmd.discovery.records import MAX_ADDRESSES, Address


def usable_addresses() -> list[str]:
    """Every IPv4 and IPv6 address of every interface, the likeliest to work from elsewhere first.

    Loopback comes last. Link-local IPv6 addresses carry their interface (``fe80::1%eth0``), which means
    something on this machine only: another one has to put its own there. At most MAX_ADDRESSES.
    """
    found: dict[str, int] = {}
    for adapter in ifaddr.get_adapters():
        for ip in adapter.ips:
            text = ip.ip if isinstance(ip.ip, str) else ip.ip[0]
            address = ipaddress.ip_address(text.partition("%")[0])
            if address.is_multicast or address.is_unspecified:
                continue
            scoped = address.version == 6 and address.is_link_local
            found[f"{address}%{adapter.name}" if scoped else str(address)] = _rank(address)
    return sorted(found, key=lambda text: found[text])[:MAX_ADDRESSES]


def _rank(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> int:
    if address.is_loopback:
        return 3
    if address.is_link_local:
        return 2
    return 0 if address.version == 4 else 1


def advertised(hosts: Sequence[str], port: int) -> tuple[Address, ...]:
    """The addresses under which a process that listens on every interface can be reached."""
    return tuple(Address(host, port) for host in hosts[:MAX_ADDRESSES])
