"""The lab's faults do what they say, and are gone afterwards: else tests under faults would prove nothing."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from support.host_faults import exhaust_memory, family, full_disk, kill_all, small_disk, stopped, why_no_small_disk
from support.netns import connect, inside
from support.network_faults import FaultyLan, why_no_network_faults

network = pytest.mark.skipif(why_no_network_faults() is not None, reason=str(why_no_network_faults()))
SOON = 0.5


@pytest.fixture(scope="module")
def lan() -> Iterator[FaultyLan]:
    with FaultyLan(3) as lan:
        yield lan


class Pair:
    """A TCP connection from one machine to another, its ends named by their machines."""

    def __init__(self, lan: FaultyLan, one: int, other: int) -> None:
        with inside(lan.names[other], lambda: socket.create_server((lan.address(other), 0))) as listener:
            here = connect(lan.names[one], lan.address(other), listener.getsockname()[1], 5)
            there, _ = listener.accept()
        self.ends = {one: here, other: there}

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        for end in self.ends.values():
            end.close()

    def arrives(self, sender: int, seconds: float) -> bool:
        """Whether a word of `sender` gets to the other end in time."""
        [receiver] = [end for machine, end in self.ends.items() if machine != sender]
        receiver.settimeout(seconds)
        self.ends[sender].sendall(b"word")
        try:
            return receiver.recv(64) != b""
        except TimeoutError:
            return False


@network
def test_an_unplugged_machine_hears_nothing_until_it_is_plugged_in(lan: FaultyLan) -> None:
    with Pair(lan, 0, 1) as pair:
        assert pair.arrives(0, 5)
        with lan.unplugged(1):
            assert not pair.arrives(0, SOON)
        assert pair.arrives(0, 5)


@network
def test_frames_are_dropped_between_groups_only(lan: FaultyLan) -> None:
    with Pair(lan, 0, 1) as apart, Pair(lan, 0, 2) as together:
        with lan.divided([0, 2], [1]):
            assert not apart.arrives(0, SOON)
            assert not apart.arrives(1, SOON)
            assert together.arrives(0, 5)
        assert apart.arrives(0, 5)


@network
def test_a_half_open_link_drops_one_direction(lan: FaultyLan) -> None:
    with Pair(lan, 0, 1) as pair:
        with lan.dropping([(0, 1)]):
            assert not pair.arrives(0, SOON)
            # What arrives the other way is never acknowledged, but it arrives.
            assert pair.arrives(1, 5)
        assert pair.arrives(0, 5)


@network
def test_connections_of_two_machines_are_reset_and_those_of_others_are_not(lan: FaultyLan) -> None:
    with Pair(lan, 0, 1) as struck, Pair(lan, 0, 2) as spared:
        lan.reset(0, 1)
        with pytest.raises(ConnectionError):
            struck.arrives(1, 5)
        assert spared.arrives(0, 5)


@network
def test_a_slowed_machine_sends_at_the_rate(lan: FaultyLan) -> None:
    size = 500_000

    def seconds() -> float:
        with Pair(lan, 0, 1) as pair:
            began, left = time.monotonic(), size
            sender = threading.Thread(target=pair.ends[0].sendall, args=(bytes(size),))
            sender.start()
            while left:
                left -= len(pair.ends[1].recv(1 << 16))
            sender.join()
            return time.monotonic() - began

    with lan.slowed(0, mbps=8):
        assert seconds() > 0.3
    assert seconds() < 0.3


@network
def test_on_a_long_line_everything_arrives_late_and_in_order(lan: FaultyLan) -> None:
    with Pair(lan, 0, 1) as pair:

        def seconds(sender: int) -> float:
            began = time.monotonic()
            assert pair.arrives(sender, 5)
            return time.monotonic() - began

        with lan.delayed(1, 300):
            assert seconds(0) >= 0.3
            assert seconds(1) >= 0.3
            sent = bytes(range(256)) * 2000
            sender = threading.Thread(target=pair.ends[0].sendall, args=(sent,))
            sender.start()
            came = b""
            while len(came) < len(sent):
                came += pair.ends[1].recv(1 << 16)
            sender.join()
            assert came == sent
            with lan.dropping([(0, 1)]):
                assert not pair.arrives(0, 2 * SOON)
        pair.arrives(0, 5)
        assert seconds(0) < 0.3


@network
def test_what_is_left_on_leaving_is_undone() -> None:
    with FaultyLan(2) as lan:
        lan.dropping([(0, 1)]).__enter__()
        lan.unplugged(0).__enter__()
        lan.delayed(1, 5).__enter__()
        tag = lan.tag
    for listing in (["nft", "list", "tables"], ["ip", "link"], ["ip", "netns"]):
        assert tag not in subprocess.run(listing, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(why_no_small_disk() is not None, reason=str(why_no_small_disk()))
def test_a_full_disk_takes_not_a_byte_until_it_has_room_again(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with small_disk(folder, "1m"):
        with full_disk(folder), pytest.raises(OSError, match="No space left"):
            (folder / "more").write_bytes(b"x")
        (folder / "more").write_bytes(bytes(500_000))
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="limits of other processes are set on Linux only")
def test_a_process_gets_no_more_memory() -> None:
    script = "print('up', flush=True); input(); bytearray(64 << 20); print('had it')"
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        exhaust_memory(psutil.Process(process.pid))
        said, failure = process.communicate(b"\n", timeout=20)
    assert said == b""
    assert b"MemoryError" in failure


def test_a_stopped_family_stands_still_and_goes_on_and_can_be_killed() -> None:
    child = "print(0, flush=True); input(); print(1, flush=True); input()"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', '{child}'])"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        with closing(process.stdin):
            assert process.stdout.readline() == "0\n"  # both are there
            with stopped(family(process.pid)):
                assert [one.status() for one in family(process.pid)] == [psutil.STATUS_STOPPED] * 2
            process.stdin.write("\n")
            assert process.stdout.readline() == "1\n"
            both = family(process.pid)
            assert len(both) == 2
            kill_all(both)
            assert not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in both)
