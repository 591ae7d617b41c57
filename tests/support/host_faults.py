"""What can happen to a machine and its processes: kills, pauses, a full disk, no memory left. Linux only, if noted."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

_STAGE = "swarmd.node.serving.stage_main"
_FILLER = "filler"


def family(pid: int) -> list[psutil.Process]:
    """A process and all that it has started, itself first; empty when it is gone."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def stages_of(pid: int) -> list[psutil.Process]:
    """The stage processes of a daemon that hold a stage, or load it (on Linux; elsewhere also the spare one)."""
    found = []
    for child in family(pid)[1:]:
        with contextlib.suppress(psutil.NoSuchProcess):
            if _STAGE in child.cmdline() and child.name() != "swarmd spare":
                found.append(child)
    return found


def kill_all(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL for all, then wait until they are gone."""
    found = list(processes)
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(found, timeout=5)


@contextmanager
def stopped(processes: Iterable[psutil.Process]) -> Iterator[None]:
    """SIGSTOP, and SIGCONT on leaving for those that are still there. Inside, all stand still."""
    found = list(processes)
    for process in found:
        process.suspend()
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            _until_still(process)
    try:
        yield
    finally:
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()


def _until_still(process: psutil.Process, seconds: float = 10) -> None:
    """The signal works when the kernel next looks at each thread, on a busy machine not at once."""
    deadline = time.monotonic() + seconds
    while process.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
        assert time.monotonic() < deadline, f"{process} does not stop"
        time.sleep(0.001)


def exhaust_memory(process: psutil.Process) -> None:
    """From now on the process gets no more memory: its address space may not grow (RLIMIT_AS). Linux only."""
    size = process.memory_info().vms
    process.rlimit(psutil.RLIMIT_AS, (size, size))


def why_no_small_disk() -> str | None:
    """Why a file system of a given size cannot be made here, or None."""
    return None if os.geteuid() == 0 and Path("/proc/filesystems").exists() else "a disk of its own needs root on Linux"


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system of its own at `folder`, in memory, of a size like "64m"; needs root."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "swarmd-test", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """The file system of `folder` is full to the last byte; meant for one made by `small_disk`."""
    filler = folder / _FILLER
    try:
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(1 << 16)):
                pass
        yield
    finally:
        filler.unlink(missing_ok=True)
