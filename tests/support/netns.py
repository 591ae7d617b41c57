"""Network namespaces joined by a bridge: several machines on one.

Needs root and iproute2; everything is deleted after use.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable
from typing import Self, TypeVar

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000

_NO_MULTICAST = """
table inet no_multicast {
  chain arriving {
    type filter hook input priority 0;
    icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept
    meta pkttype { multicast, broadcast } drop
  }
}
"""


def why_unavailable() -> str | None:
    """Why namespaces cannot be used here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2"
    probe = f"swarmd-probe-{secrets.token_hex(3)}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", probe], capture_output=True, check=False)
    return None if made.returncode == 0 else f"ip netns does not work here: {made.stderr.strip()}"


def ip(*arguments: str) -> str:
    """What `ip` prints; raises with its words when it fails."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


class Lan:
    """A bridge with `count` namespaces on it, each with one interface `eth0` at 10.77.X.1, 10.77.X.2, ..."""

    def __init__(self, count: int) -> None:
        self.tag = secrets.token_hex(2)
        self.subnet = f"10.77.{secrets.randbelow(250)}"
        self.bridge = f"swb{self.tag}"
        self.names = [f"sw{self.tag}n{index}" for index in range(count)]

    def __enter__(self) -> Self:
        try:
            ip("link", "add", self.bridge, "type", "bridge", "mcast_snooping", "0")
            ip("link", "set", self.bridge, "up")
            for index, name in enumerate(self.names):
                self._add(index, name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # A namespace's own end of its line would go only some time after it.
        lines = [["ip", "link", "del", self._outer(index)] for index in range(len(self.names))]
        for command in [
            *lines,
            *(["ip", "netns", "del", name] for name in self.names),
            ["ip", "link", "del", self.bridge],
        ]:
            subprocess.run(command, capture_output=True, check=False)

    def address(self, index: int) -> str:
        """The IPv4 address of a namespace."""
        return f"{self.subnet}.{index + 1}"

    def addresses(self, index: int) -> set[str]:
        """All addresses of a namespace, IPv6 ones among them."""
        told = ip("-n", self.names[index], "-brief", "address", "show", "dev", "eth0")
        return {word.partition("/")[0] for word in told.split() if "/" in word}

    def drop_multicast(self) -> None:
        """No multicast reaches a namespace, as on guest networks that isolate their clients. Needs nftables.

        Only neighbour discovery goes on, without which there is no IPv6.
        """
        for name in self.names:
            subprocess.run(["ip", "netns", "exec", name, "nft", "-f", "-"], input=_NO_MULTICAST, text=True, check=True)

    def _outer(self, index: int) -> str:
        return f"sw{self.tag}v{index}"

    def _add(self, index: int, name: str) -> None:
        outer = self._outer(index)
        ip("netns", "add", name)
        ip("link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("link", "set", outer, "master", self.bridge)
        ip("link", "set", outer, "up")
        ip("-n", name, "address", "add", f"{self.address(index)}/24", "dev", "eth0")
        ip("-n", name, "link", "set", "lo", "up")
        ip("-n", name, "link", "set", "eth0", "up")


def inside(namespace: str | None, work: Callable[[], T]) -> T:
    """Run `work` in a namespace; sockets that it makes stay there. None: here."""
    if namespace is None:
        return work()
    results: list[T] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            with open(f"/var/run/netns/{namespace}") as file:
                if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), f"setns to {namespace} failed")
            results.append(work())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]


def connect(namespace: str | None, host: str, port: int, timeout: float | None) -> socket.socket:
    """A TCP connection made in a namespace."""
    return inside(namespace, lambda: socket.create_connection((host, port), timeout))
