"""What is measured, as processes: where each runs, how it is started and awaited, and how all are ended."""

from __future__ import annotations

import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from harness import connect, inside
from load import Server
from pinning import on_cores
from workloads import BenchModel

START_SECONDS = 120.0
_LOOK_SECONDS = 0.1


class Unavailable(Exception):
    """This cannot be measured here; the message says why and what to do."""


@dataclass(frozen=True)
class Place:
    """Where one node or worker runs: its cores (none: any), its threads, its share of a core's time (0: no limit)."""

    cores: tuple[int, ...] = ()
    threads: int = 1
    quota: float = 0.0

    def __str__(self) -> str:
        cores = f"core{'s' * (len(self.cores) > 1)} {','.join(map(str, self.cores))}" if self.cores else "any core"
        quota = f", {self.quota:.0%} of a core" if self.quota else ""
        return f"{cores}, {self.threads} thread{'s' * (self.threads > 1)}{quota}"


@dataclass(frozen=True)
class Needs:
    """What a contender is to serve, under which name in the table: `streams` sequences of at most `length` tokens."""

    name: str
    model: BenchModel
    streams: int
    length: int


@dataclass
class Contender:
    """A running service: where it answers, its processes (their children are theirs), how it was started.

    `place` is where it reads the weights for one stream, None when it reads others than the file's.
    """

    name: str
    server: Server
    detail: str
    pids: list[int]
    place: Place | None


class Processes:
    """Processes with their logs in a temporary folder; all are killed on leaving."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._started: list[tuple[str, subprocess.Popen[bytes], Path]] = []
        self._folder = Path()

    def __enter__(self) -> Self:
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="swarmd-bench-")))
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed([process for _, process, _ in self._started]):
            process.kill()
            process.wait()
        self._stack.close()

    @property
    def pids(self) -> list[int]:
        """Of all processes."""
        return [started[1].pid for started in self._started]

    def start(self, name: str, command: Sequence[str], cores: Sequence[int], namespace: str | None = None) -> None:
        """Start one, pinned to `cores`, in a network namespace if one is given."""
        prefix = ["ip", "netns", "exec", namespace] if namespace else []
        log = self._folder / f"{len(self._started)}-{name}.log"
        with on_cores(cores), log.open("wb") as file:
            process = subprocess.Popen(
                [*prefix, *command], stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )
        self._started.append((name, process, log))

    def wait_for(self, server: Server) -> None:
        """Until `/health` answers 200. Raises Unavailable with the last words of a process that has ended."""
        self._wait(lambda: inside(server.namespace, lambda: _healthy(server.url)), server.url)

    def wait_for_port(self, host: str, port: int, namespace: str | None) -> None:
        """Until something accepts connections there. Raises Unavailable as `wait_for` does."""
        self._wait(lambda: _accepts(host, port, namespace), f"{host}:{port}")

    def _wait(self, ready: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            for name, process, log in self._started:
                if process.poll() is not None:
                    words = log.read_text(errors="replace").strip()[-500:]
                    raise Unavailable(f"{name} ended with status {process.returncode}: {words}")
            if time.monotonic() > deadline:
                raise Unavailable(f"{what} did not answer within {START_SECONDS:.0f} s")
            time.sleep(_LOOK_SECONDS)


def free_port(namespace: str | None = None) -> int:
    """A TCP port that is free at the moment."""
    with inside(namespace, socket.socket) as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _accepts(host: str, port: int, namespace: str | None) -> bool:
    try:
        connect(namespace, host, port, 2).close()
    except OSError:
        return False
    return True
