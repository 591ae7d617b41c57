"""What a table must say about the machine it was measured on, and what else that machine was doing meanwhile."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import psutil
from pinning import on_cores

# Instruction sets that decide how fast quantized products are; names as in /proc/cpuinfo.
_X86_FLAGS = ("avx2", "f16c", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_int8")
_ARM_FLAGS = ("asimddp", "i8mm", "sve")
_PACKAGES = ("swarmd", "torch", "transformers", "numpy", "aiohttp")
_READ_BYTES = 256 << 20
_READ_TIMES = 6


@dataclass(frozen=True)
class Machine:
    """A description; `bandwidth` is bytes per second read by one core, `bandwidth_all` by all at once."""

    processor: str
    flags: tuple[str, ...]
    cores: int
    memory_bytes: int
    system: str
    versions: dict[str, str]
    load: float
    bandwidth: float
    bandwidth_all: float

    def lines(self) -> list[str]:
        """For the head of a table."""
        return [
            f"{self.processor}, {self.cores} cores ({' '.join(self.flags)}), {self.memory_bytes / 2**30:.0f} GiB, "
            f"{self.system}",
            ", ".join(f"{name} {version}" for name, version in self.versions.items()),
            f"memory read: {self.bandwidth / 1e9:.1f} GB/s by one core, {self.bandwidth_all / 1e9:.1f} by all at once; "
            f"load average before: {self.load:.2f}",
        ]

    def as_json(self) -> dict[str, Any]:
        """The same for machines."""
        return asdict(self)


def describe_machine() -> Machine:
    """Describe this machine; takes some seconds, because it measures memory."""
    load = psutil.getloadavg()[0]
    cores = _cores()
    return Machine(
        processor=_cpuinfo("model name") or platform.processor() or platform.machine(),
        flags=tuple(flag for flag in _X86_FLAGS + _ARM_FLAGS if flag in _cpuinfo("flags", "Features").split()),
        cores=len(cores),
        memory_bytes=psutil.virtual_memory().total,
        system=f"{platform.system()} {platform.release()}",
        versions={"Python": platform.python_version()} | _versions(),
        load=load,
        bandwidth=read_bandwidth(cores[:1]),
        bandwidth_all=read_bandwidth(cores),
    )


def read_bandwidth(cores: Sequence[int]) -> float:
    """Bytes per second that processes pinned to these cores, one each, read from memory together."""
    with ThreadPoolExecutor(len(cores)) as pool:
        return sum(pool.map(_read_in_a_process, cores))


def _read_in_a_process(core: int) -> float:
    command = [sys.executable, __file__, "--read"]
    with on_cores([core]):
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _best_read() -> float:
    """Bytes per second of the fastest of some passes over more memory than any cache holds, by one thread.

    The maximum over bytes is one vector instruction a line, so that memory is what it waits for.
    """
    import numpy as np

    memory = np.ones(_READ_BYTES, np.uint8)
    times = []
    for _ in range(_READ_TIMES):
        began = time.perf_counter()
        memory.max()
        times.append(time.perf_counter() - began)
    return _READ_BYTES / min(times)


class CpuWatch:
    """How many cores were busy with something else than the measured processes, and how busy those were."""

    def __init__(self, pids: Iterable[int]) -> None:
        """`pids`: the processes that take part, with all that they started; this process is always one of them."""
        self._pids = {os.getpid(), *pids}
        self._began, self._busy, self._own = time.monotonic(), _busy_seconds(), self._own_seconds()

    def read(self) -> tuple[float, float]:
        """(cores used by others, cores used by those that take part) on average since the start."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        own = max(0.0, self._own_seconds() - self._own)
        return max(0.0, _busy_seconds() - self._busy - own) / seconds, own / seconds

    def _own_seconds(self) -> float:
        processes: dict[int, psutil.Process] = {}
        for pid in self._pids:
            try:
                process = psutil.Process(pid)
                family = process.children(recursive=True) if pid != os.getpid() else []
            except psutil.NoSuchProcess:
                continue
            processes |= {member.pid: member for member in (process, *family)}
        return sum(map(_cpu_seconds, processes.values()))


def _cpu_seconds(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return times.user + times.system


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _cpuinfo(*keys: str) -> str:
    if not os.path.exists("/proc/cpuinfo"):
        return ""
    with open("/proc/cpuinfo") as file:
        return next((line.partition(":")[2].strip() for line in file if line.partition("\t")[0].strip() in keys), "")


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__" and sys.argv[1:] == ["--read"]:
    print(_best_read())
