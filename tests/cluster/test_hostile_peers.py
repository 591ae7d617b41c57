"""A running node among strangers: it refuses them with a line in its log, stays up, and keeps nothing of them."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from support import hostile
from support.swarm import Node, join

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(120),
    pytest.mark.skipif(not psutil.LINUX, reason="the daemon is watched through /proc"),
]

QUIET = ("--model", "none", "--no-mdns")
WARM_UP, ROUNDS = 60, 300
MOST_GROWTH = 10 << 20
# A buffer for 2 GiB that is never written to costs address space only.
MOST_ADDRESS_SPACE = 1 << 30
MOST_LOG_LINES = 100


class Victim:
    """A node that strangers know, and its daemon's process. `descriptors`: how many it has open when it is at peace."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.port = node.link_port
        self.process = psutil.Process(node.process.pid)
        self.descriptors = self.process.num_fds()

    def suffer(self, attack: Callable[[], object]) -> None:
        """Be attacked many times, and be as before: answering, no larger, with nothing left open and a readable log."""
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: attack(), range(WARM_UP)))
            self.until_at_peace()
            size, address_space = self.process.memory_info().rss, most_address_space(self.process)
            list(pool.map(lambda _: attack(), range(ROUNDS)))
        assert self.node.get("/health")
        self.until_at_peace()
        assert self.process.memory_info().rss - size < MOST_GROWTH
        assert most_address_space(self.process) - address_space < MOST_ADDRESS_SPACE
        assert len(self.node.output) < MOST_LOG_LINES, "strangers can fill the log"

    def until_at_peace(self) -> None:
        deadline = time.monotonic() + 20
        while self.process.num_fds() > self.descriptors:
            assert time.monotonic() < deadline, "connections of strangers stay open"


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    with Node(tmp_path_factory.mktemp("hostile") / "victim", *QUIET) as node:
        # Measuring its speed is over, and with it the process that did it.
        node.until(lambda state: state["nodes"][0]["devices"][0]["compute"])
        yield Victim(node)


def most_address_space(process: psutil.Process) -> int:
    """The most address space that a process has had so far, in bytes."""
    [kilobytes] = re.findall(r"VmPeak:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
    return int(kilobytes) * 1024


def test_a_node_with_another_token_is_refused_and_both_logs_say_why(victim: Victim, tmp_path: Path) -> None:
    with Node(tmp_path / "stranger", *QUIET, "--peer", f"127.0.0.1:{victim.port}") as stranger:
        stranger.until_said(r"no link to 127.0.0.1 port \d+: .*another swarm.*token")
        victim.node.until_said(r"refused a connection from 127.0.0.1 port \d+: .*another swarm.*token")
        for one in (victim.node, stranger):
            assert [seen["id"] for seen in one.get("/api/swarm")["nodes"]] == [one.id]


def test_a_node_with_another_token_on_the_same_network_is_named_and_left_alone(tmp_path: Path) -> None:
    with Node(tmp_path / "one", "--model", "none") as one, Node(tmp_path / "two", "--model", "none") as two:
        for here, other in ((one, two), (two, one)):
            here.until_said(f"{other.id[:12]} on this network belongs to another swarm")
            assert [seen["id"] for seen in here.get("/api/swarm")["nodes"]] == [here.id]
            assert "refused" not in here.log


@pytest.mark.parametrize(
    ("data", "says"),
    [
        pytest.param(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "plain HTTP request", id="http"),
        pytest.param(b"hello, is anybody there?\r\n", "does not speak TLS", id="text"),
        pytest.param(bytes(range(256)) * 256, "does not speak TLS", id="garbage"),
        pytest.param(b"\x80\x00\x00\x00\x80\x00\x00\x00" + bytes(4096), "does not speak TLS", id="2 GiB frame"),
        pytest.param(b"\x16\x03\x01\xff\xff" + b"\x01" * 70_000, "does not speak TLS", id="long record"),
    ],
)
def test_plain_tcp_leaves_nothing_behind(victim: Victim, data: bytes, says: str) -> None:
    victim.suffer(lambda: hostile.send_plainly(victim.port, data))
    victim.node.until_said(f"refused a connection from 127.0.0.1 .*{says}")


def test_half_handshakes_leave_nothing_behind(victim: Victim) -> None:
    victim.suffer(lambda: hostile.break_off_handshake(victim.port))
    victim.node.until_said("it closed the connection during the handshake")


def test_self_signed_certificates_are_told_nothing(victim: Victim, tmp_path: Path) -> None:
    context = hostile.self_signed_context(tmp_path)

    def knock() -> None:
        assert hostile.show_certificate(victim.port, context) == b""

    victim.suffer(knock)


@pytest.mark.parametrize("after_hello", [False, True], ids=["before the hello", "after the hello"])
@pytest.mark.parametrize(
    ("header", "payload"), [(hostile.TWO_GIB, 0), (64, hostile.TWO_GIB)], ids=["header", "payload"]
)
def test_a_member_that_announces_2_gib_is_cut_off(victim: Victim, header: int, payload: int, after_hello: bool) -> None:
    member = hostile.BadMember(victim.node.token())
    said = member.announce(victim.port, header, payload, after_hello=after_hello)
    if after_hello:
        assert b"2147483648 bytes; the limit is" in said
    victim.suffer(lambda: member.announce(victim.port, header, payload, after_hello=after_hello))
    victim.node.until_said(r"announces a (header|payload) of 2147483648 bytes; the limit is")


def test_after_all_that_members_are_still_welcome(victim: Victim, tmp_path: Path) -> None:
    with join(victim.node.token(), tmp_path / "friend", *QUIET, "--peer", f"127.0.0.1:{victim.port}") as friend:
        state = victim.node.until(lambda s: any(n["id"] == friend.id and n["state"] == "alive" for n in s["nodes"]))
        assert {seen["id"] for seen in friend.until_members(2)["nodes"]} <= {seen["id"] for seen in state["nodes"]}
