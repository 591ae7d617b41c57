"""Machines on a slow or distant network, on one machine: network namespaces whose packets a relay holds back.

    with delayed_lan(2, delay_ms=10, rate_mbps=1000) as lan:
        lan.namespaces[0], lan.address(0)

python bench/relay.py [--delay-ms D] [--rate-mbps R]    measures such a network: round trip and throughput

With a delay, each namespace has a TUN device whose other end is a process of this file: a packet leaves it at
max(now, line free) + length / rate, and arrives `delay_ms` later; so a round trip takes two delays. Packets are up to
64 KB (segmentation offload), which lets it hold 1 Gb/s; for more, measure what it reaches. Without a delay it is a
bridge, and the kernel's token bucket filter on both ends of each veth keeps the rate. Needs root and iproute2;
everything is deleted after use. Names and addresses are IPv4 only; multicast does not pass a relay.
"""

from __future__ import annotations

import argparse
import ctypes
import heapq
import os
import secrets
import select
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol

from harness import IFF_TUN, VNET_HEADER, Lan, connect, from_device, inside, ip, open_device, why_unavailable

__all__ = ["Network", "delayed_lan", "why_unavailable"]

_PR_SET_TIMERSLACK = 29
# (burst, limit) of the token bucket by rate in Mb/s, at which the rate was found to be held.
_BUCKETS = {1000: ("64k", "1mb"), 2500: ("256k", "2mb"), 10_000: ("1mb", "4mb")}


class Network(Protocol):
    """Namespaces that reach each other, as `delayed_lan` gives them."""

    @property
    def namespaces(self) -> Sequence[str]:
        """Their names, for `ip netns exec`."""
        ...

    @property
    def pids(self) -> Sequence[int]:
        """The processes that carry its packets."""
        ...

    def address(self, index: int) -> str:
        """The IPv4 address of a namespace."""
        ...


class RelayedLan:
    """Namespaces joined by a relay process. `delay_ms` is one way; a rate of 0 is no limit."""

    def __init__(self, count: int, delay_ms: float, rate_mbps: float) -> None:
        tag = secrets.token_hex(2)
        self.subnet = f"10.78.{secrets.randbelow(250)}"
        self.namespaces = [f"sr{tag}n{index}" for index in range(count)]
        self._options = ["--delay-ms", str(delay_ms), "--rate-mbps", str(rate_mbps)]
        self._relay: subprocess.Popen[str] | None = None

    def __enter__(self) -> RelayedLan:
        try:
            for name in self.namespaces:
                ip("netns", "add", name)
                ip("-n", name, "link", "set", "lo", "up")
            self._start()
            for index, name in enumerate(self.namespaces):
                ip("-n", name, "address", "add", f"{self.address(index)}/24", "dev", "tun0")
                ip("-n", name, "link", "set", "tun0", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._relay is not None:
            self._relay.kill()
            self._relay.communicate()
        for name in self.namespaces:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    @property
    def pids(self) -> list[int]:
        """The relay process."""
        return [self._relay.pid] if self._relay else []

    def address(self, index: int) -> str:
        """The IPv4 address of a namespace."""
        return f"{self.subnet}.{index + 1}"

    def _start(self) -> None:
        command = [sys.executable, __file__, "--relay", ",".join(self.namespaces), *self._options]
        self._relay = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._relay.stdout is not None
        if self._relay.stdout.readline().strip() != "ready":
            raise RuntimeError("the relay did not start; what it says stands above")


class ShapedLan(Lan):
    """Namespaces on a bridge, with a rate in Mb/s in both directions; 0 is no limit."""

    def __init__(self, count: int, rate_mbps: float) -> None:
        super().__init__(count)
        self._rate = rate_mbps

    @property
    def namespaces(self) -> list[str]:
        """Their names."""
        return self.names

    @property
    def pids(self) -> list[int]:
        """None: the kernel carries the packets."""
        return []

    def _add(self, index: int, name: str) -> None:
        super()._add(index, name)
        if self._rate:
            burst, limit = _BUCKETS.get(int(self._rate), ("256k", "2mb"))
            bucket = ["root", "tbf", "rate", f"{self._rate}mbit", "burst", burst, "limit", limit]
            for place in (["-n", name], []):
                device = "eth0" if place else self._outer(index)
                subprocess.run(["tc", *place, "qdisc", "add", "dev", device, *bucket], check=True)


@contextmanager
def delayed_lan(count: int, delay_ms: float = 0.0, rate_mbps: float = 0.0) -> Iterator[Network]:
    """`count` namespaces that reach each other `delay_ms` late (one way) at `rate_mbps` each way; zeros: no limit."""
    if delay_ms:
        with RelayedLan(count, delay_ms, rate_mbps) as relayed:
            yield relayed
    else:
        shaped = ShapedLan(count, rate_mbps)
        with shaped:
            yield shaped


class Line:
    """When packets of one network leave and arrive: every port sends and receives at the rate, both at once."""

    def __init__(self, ports: int, delay: float, rate: float) -> None:
        """`delay` in seconds one way, `rate` in bytes per second; 0 is no limit."""
        self._delay, self._rate = delay, rate
        self._sending, self._receiving = [0.0] * ports, [0.0] * ports

    def arrival(self, source: int, target: int, length: int, now: float) -> float:
        """When a packet of `length` bytes, given to port `source` now, is at port `target`."""
        begin = max(now, self._sending[source], self._receiving[target])
        sent = begin + length / self._rate if self._rate else begin
        self._sending[source] = self._receiving[target] = sent
        return sent + self._delay


def relay(namespaces: Sequence[str], delay_ms: float, rate_mbps: float) -> None:
    """The relay process: open a TUN device in each namespace, say "ready", carry packets until killed."""
    # Timers as exact as they can be: the default slack of 50 us is half of the shortest delay that is of interest.
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
    devices = [inside(name, partial(open_device, "tun0", IFF_TUN)) for name in namespaces]
    line = Line(len(devices), delay_ms / 1000, rate_mbps * 1e6 / 8)
    port_of = {device: port for port, device in enumerate(devices)}
    under_way: list[tuple[float, int, int, bytes]] = []
    number = 0
    print("ready", flush=True)
    while True:
        while under_way and under_way[0][0] <= time.monotonic():
            _, _, target, packet = heapq.heappop(under_way)
            _write(devices[target], packet)
        wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        for device in select.select(devices, [], [], wait)[0]:
            for packet in from_device(device):
                target = packet[VNET_HEADER + 19] - 1  # the last byte of the IPv4 destination
                if packet[VNET_HEADER] >> 4 == 4 and 0 <= target < len(devices):
                    length = len(packet) - VNET_HEADER
                    due = line.arrival(port_of[device], target, length, time.monotonic())
                    number += 1  # packets that are due at one time stay in order
                    heapq.heappush(under_way, (due, number, target, packet))


def _write(device: int, packet: bytes) -> None:
    try:
        os.write(device, packet)
    except OSError as error:  # the device is going down, or its queue is full: a network loses such packets
        print(f"relay: lost a packet of {len(packet)} bytes: {error}", file=sys.stderr)


def measure(network: Network, size: int = 64 << 20) -> tuple[float, float]:
    """(median round trip of one byte in ms, throughput of `size` bytes in Mb/s) from namespace 0 to namespace 1."""
    first, second = network.namespaces[:2]
    listener = inside(second, lambda: socket.create_server((network.address(1), 0)))

    def answer() -> None:
        with listener.accept()[0] as peer:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for _ in range(101):
                peer.sendall(peer.recv(1))
            left = size
            while left:
                left -= len(peer.recv(1 << 20))
            peer.sendall(b".")

    thread = threading.Thread(target=answer)
    thread.start()
    with connect(first, network.address(1), listener.getsockname()[1], 60) as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        times = []
        for _ in range(101):
            began = time.perf_counter()
            peer.sendall(b".")
            peer.recv(1)
            times.append(time.perf_counter() - began)
        began = time.perf_counter()
        peer.sendall(bytes(size))
        peer.recv(1)
        rate = size * 8 / (time.perf_counter() - began) / 1e6
    thread.join()
    listener.close()
    return statistics.median(times) * 1e3, rate


def main() -> None:
    """Measure a network, or be its relay process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay-ms", type=float, default=0.6, help="one way (default 0.6)")
    parser.add_argument("--rate-mbps", type=float, default=1000.0, help="0 for no limit (default 1000)")
    parser.add_argument("--relay", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.relay:
        relay(options.relay.split(","), options.delay_ms, options.rate_mbps)
        return
    if reason := why_unavailable():
        sys.exit(reason)
    with delayed_lan(2, options.delay_ms, options.rate_mbps) as network:
        round_trip, rate = measure(network)
    print(f"asked: {options.delay_ms} ms one way, {options.rate_mbps:.0f} Mb/s")
    print(f"found: {round_trip:.2f} ms round trip, {rate:.0f} Mb/s")


if __name__ == "__main__":
    main()
