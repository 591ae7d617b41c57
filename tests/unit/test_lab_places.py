"""What the lab makes of one machine: cores, shares of cores, and networks, each no better than was asked for."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import psutil
import pytest
from machine import CpuWatch, read_bandwidth
from pinning import CpuQuota, on_cores, why_no_quota
from relay import delayed_lan, measure, why_unavailable

SPIN = [sys.executable, "-c", "while True: pass"]

needs_pinning = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot pin processes")
needs_namespaces = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
needs_quotas = pytest.mark.skipif(why_no_quota() is not None, reason=str(why_no_quota()))


@needs_pinning
def test_what_is_started_on_a_core_stays_there_and_the_starter_does_not() -> None:
    before = os.sched_getaffinity(0)
    core = max(before)
    with on_cores([core]):
        command = [sys.executable, "-c", "import os; print(os.sched_getaffinity(0))"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.strip() == str({core})
    assert os.sched_getaffinity(0) == before


@needs_quotas
def test_a_quota_holds_a_process_and_its_children_to_their_share() -> None:
    with (
        CpuQuota(0.2) as quota,
        subprocess.Popen(["sh", "-c", "read go; exec " + " ".join(map(repr, SPIN))], stdin=subprocess.PIPE) as process,
    ):
        try:
            quota.add(process.pid)
            assert process.stdin is not None
            process.stdin.write(b"\n")
            process.stdin.close()
            began, spinning = time.monotonic(), psutil.Process(process.pid)
            while (used := sum(spinning.cpu_times()[:2])) < 0.3:
                assert time.monotonic() - began < 60
            share = used / (time.monotonic() - began)
        finally:
            process.kill()
    assert share < 0.3


@pytest.mark.parametrize("share", [0.0, -1.0, 1000.0])
def test_a_quota_that_makes_no_sense_is_refused(share: float) -> None:
    with pytest.raises(ValueError):
        CpuQuota(share)


def test_time_of_those_that_take_part_is_not_counted_as_that_of_others() -> None:
    with subprocess.Popen(SPIN) as process:
        try:
            watch, began_at = CpuWatch([process.pid]), time.monotonic()
            spinning = psutil.Process(process.pid)
            began = sum(spinning.cpu_times()[:2])
            while sum(spinning.cpu_times()[:2]) < began + 0.3:
                os.sched_yield()
            _, own = watch.read()
            seconds = time.monotonic() - began_at
        finally:
            process.kill()
    assert own * seconds >= 0.25


def test_memory_is_read_at_some_speed() -> None:
    assert read_bandwidth([0]) > 1e8


@needs_namespaces
@pytest.mark.netns
def test_a_delayed_network_is_never_faster_than_asked_for() -> None:
    with delayed_lan(2, delay_ms=5, rate_mbps=200) as network:
        assert len(network.namespaces) == 2
        assert [psutil.pid_exists(pid) for pid in network.pids] == [True]
        round_trip, rate = measure(network, 4 << 20)
    assert round_trip >= 10
    assert 1 < rate <= 200
    assert not any(os.path.exists(f"/var/run/netns/{name}") for name in network.namespaces)
