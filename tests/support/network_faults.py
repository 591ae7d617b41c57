"""What can happen to a network: plugs pulled, frames lost in one direction or both, slow and long lines, resets.

Every fault is a context that is undone on leaving. Frames are dropped where they cross the bridge, as a switch with a
defect does it: neither side is told. Needs root, iproute2 and nftables.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import count, permutations, product
from pathlib import Path

from support.netns import Lan, ip, why_unavailable

LONG_LINE = Path(__file__).with_name("long_line.py")
# Bytes that the token bucket lets through at once, and that wait in it: small, so that the rate is felt.
_BURST, _LIMIT = "16k", "256k"


def why_no_network_faults() -> str | None:
    """Why the network's faults cannot be made here, or None."""
    if reason := why_unavailable():
        return reason
    if missing := [tool for tool in ("nft", "tc", "ss") if shutil.which(tool) is None]:
        return f"faults of the network need {missing[0]}"
    table = "table bridge swarmd_probe { chain forward { type filter hook forward priority 0; }\n}\n"
    made = subprocess.run(["nft", "-f", "-"], input=table, text=True, capture_output=True, check=False)
    subprocess.run(["nft", "delete", "table", "bridge", "swarmd_probe"], capture_output=True, check=False)
    return None if made.returncode == 0 else f"nftables cannot filter bridges here: {made.stderr.strip()}"


class FaultyLan(Lan):
    """A `Lan` whose plugs and lines can fail; machines are named by their index."""

    def __init__(self, machines: int) -> None:
        super().__init__(machines)
        self._numbers = count()
        self._tables: set[str] = set()
        self._lines: list[subprocess.Popen[str]] = []

    def __exit__(self, *_: object) -> None:
        for table in sorted(self._tables):
            self._forget(table)
        for line in [*self._lines]:
            self._end(line)
        super().__exit__()

    @contextmanager
    def unplugged(self, machine: int) -> Iterator[None]:
        """Its plug is out of the switch: no carrier."""
        ip("link", "set", self._outer(machine), "down")
        try:
            yield
        finally:
            ip("link", "set", self._outer(machine), "up")

    @contextmanager
    def dropping(self, routes: Iterable[tuple[int, int]]) -> Iterator[None]:
        """Frames from the first machine of each pair to the second one vanish."""
        table = f"swf{self.tag}_{next(self._numbers)}"
        rules = "\n".join(f"iifname {self._ports(a)} oifname {self._ports(b)} drop" for a, b in routes)
        chain = f"table bridge {table} {{ chain forward {{ type filter hook forward priority 0;\n{rules}\n}}\n}}\n"
        self._tables.add(table)
        subprocess.run(["nft", "-f", "-"], input=chain, text=True, check=True)
        try:
            yield
        finally:
            self._forget(table)

    def divided(self, *groups: Sequence[int]) -> AbstractContextManager[None]:
        """Nothing passes between the groups."""
        sides = permutations(groups, 2)
        return self.dropping(route for one, other in sides for route in product(one, other))

    def reset(self, machine: int, other: int) -> None:
        """Every TCP connection between two machines is reset, on both sides."""
        for address in self.addresses(other):
            command = ["ip", "netns", "exec", self.names[machine], "ss", "-K", "dst", f"[{address}]"]
            subprocess.run(command, capture_output=True, check=False)

    @contextmanager
    def slowed(self, machine: int, mbps: float) -> Iterator[None]:
        """No more than so many Mb/s go to and from a machine."""
        bucket = ["root", "tbf", "rate", f"{mbps}mbit", "burst", _BURST, "limit", _LIMIT]
        places = [(["-n", self.names[machine]], "eth0"), ([], self._outer(machine))]
        for place, device in places:
            subprocess.run(["tc", *place, "qdisc", "add", "dev", device, *bucket], check=True)
        try:
            yield
        finally:
            for place, device in places:
                subprocess.run(["tc", *place, "qdisc", "del", "dev", device, "root"], capture_output=True, check=False)

    @contextmanager
    def delayed(self, machine: int, delay_ms: float) -> Iterator[None]:
        """Everything to and from a machine arrives so much later, so a round trip takes two delays more."""
        plug, tap = self._outer(machine), self._tap(machine)
        ip("link", "set", plug, "nomaster")
        line = subprocess.Popen(
            [sys.executable, LONG_LINE, plug, tap, str(delay_ms)], stdout=subprocess.PIPE, text=True
        )
        self._lines.append(line)
        try:
            assert line.stdout is not None
            if line.stdout.readline().strip() != "ready":
                raise RuntimeError("the long line did not start; what it says stands above")
            ip("link", "set", tap, "master", self.bridge)
            ip("link", "set", tap, "up")
            yield
        finally:
            self._end(line)
            ip("link", "set", plug, "master", self.bridge)

    def _tap(self, machine: int) -> str:
        return f"sw{self.tag}t{machine}"

    def _ports(self, machine: int) -> str:
        """Where a machine may be on the bridge, in nftables' words."""
        return f'{{ "{self._outer(machine)}", "{self._tap(machine)}" }}'

    def _end(self, line: subprocess.Popen[str]) -> None:
        """With the process its TAP device is gone."""
        line.kill()
        line.communicate()
        self._lines.remove(line)

    def _forget(self, table: str) -> None:
        subprocess.run(["nft", "delete", "table", "bridge", table], capture_output=True, check=False)
        self._tables.discard(table)
