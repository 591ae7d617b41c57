"""mDNS: what is believed of an announcement, and two nodes seeing each other on the real network."""

import asyncio
import contextlib
import socket

import pytest
from zeroconf import InterfaceChoice, ServiceStateChange
from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

from swarmd.discovery import mdns
from swarmd.discovery.mdns import SERVICE_TYPE, MdnsDiscovery, Sighting, read_sighting

A, B = "a" * 64, "b" * 64
TAG = "0123456789abcdef"


def announcement(**changes) -> AsyncServiceInfo:
    properties = {"v": "1", "id": A, "tag": TAG, **changes.pop("properties", {})}
    fields = {"port": 7000, "parsed_addresses": ["192.0.2.1", "fd00::2", "fe80::1"], **changes}
    return AsyncServiceInfo(SERVICE_TYPE, f"{A[:32]}.{SERVICE_TYPE}", properties=properties, **fields)


def test_an_announcement_is_read():
    # A link-local address without its interface cannot be dialled.
    assert read_sighting(announcement()) == Sighting(A, TAG, 1, (("192.0.2.1", 7000), ("fd00::2", 7000)))


@pytest.mark.parametrize(
    "changes",
    [
        {"properties": {"id": "A" * 64}},
        {"properties": {"id": "a" * 63}},
        {"properties": {"id": None}},
        {"properties": {"tag": "../../../../etc/"}},
        {"properties": {"v": "one"}},
        {"properties": {"v": "9" * 200}},
        {"properties": {"v": b"\xff\xfe"}},
        {"port": 0},
        {"parsed_addresses": []},
        {"parsed_addresses": ["fe80::1"]},
    ],
)
def test_anything_else_is_not_believed(changes):
    with pytest.raises(ValueError):
        read_sighting(announcement(**changes))


def test_addresses_of_an_announcement_are_bounded():
    many = [f"10.0.0.{i}" for i in range(1, 200)]
    assert len(read_sighting(announcement(parsed_addresses=many)).addresses) == 16


async def test_names_are_bounded_whatever_the_network_says(monkeypatch, caplog):
    monkeypatch.setattr(mdns, "MAX_SEEN", 10)
    discovery = MdnsDiscovery(A, TAG, 1, 7000, lambda sighting: None)

    async def look(zeroconf, name):
        discovery._seen[name] = None

    monkeypatch.setattr(discovery, "_look_at", look)
    for i in range(500):
        name = f"{i:032x}.{SERVICE_TYPE}"
        discovery._on_change(None, SERVICE_TYPE, name, ServiceStateChange.Added)  # pyright: ignore[reportArgumentType]
        if i % 50 == 0:
            await asyncio.gather(*discovery._resolving.values())
    assert len(discovery._seen) + len(discovery._resolving) <= 10 + 64
    assert sum("announces more nodes" in record.message for record in caplog.records) == 1


async def test_without_a_network_it_says_so_once_and_starts_all_the_same(monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise OSError(19, "No such device")

    monkeypatch.setattr(mdns, "AsyncZeroconf", broken)
    discovery = MdnsDiscovery(A, TAG, 1, 7000, lambda sighting: None)
    await discovery.start()
    await discovery._refresh()
    await discovery.close()
    (line,) = [record.getMessage() for record in caplog.records]
    assert "No such device" in line
    assert "--peer HOST:PORT" in line


async def multicast_problem() -> str | None:
    """Why multicast to ourselves does not work here, None if it does."""
    with contextlib.ExitStack() as stack:
        try:
            probe = AsyncZeroconf(interfaces=InterfaceChoice.All)
            await probe.async_close()
            sender = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 1)
            sender.sendto(b"", ("224.0.0.251", 5353))
        except OSError as error:
            return str(error)
    return None


async def test_two_nodes_see_each_other_on_the_real_network():
    problem = await multicast_problem()
    if problem:
        pytest.skip(f"no multicast on this machine: {problem}")
    seen: dict[str, Sighting] = {}
    both = asyncio.Event()

    def on_sighting(sighting: Sighting) -> None:
        if sighting.node_id in (A, B):
            seen[sighting.node_id] = sighting
        if len(seen) == 2:
            both.set()

    # Of different swarms: whose node it is, the caller decides.
    first = MdnsDiscovery(A, TAG, 1, 7001, on_sighting)
    second = MdnsDiscovery(B, TAG[::-1], 2, 7002, on_sighting)
    await first.start()
    try:
        await second.start()
        async with asyncio.timeout(10):
            await both.wait()
    finally:
        await first.close()
        await second.close()
    assert (seen[A].swarm_tag, seen[A].version) == (TAG, 1)
    assert (seen[B].swarm_tag, seen[B].version) == (TAG[::-1], 2)
    assert {port for _, port in seen[B].addresses} == {7002}
    await first.close()  # once more harms nothing
