"""Measure how long nodes take to find each other by mDNS on one machine.

python bench/discovery_time.py [--starts N]

A first node runs; a second one of the same swarm is started again and again. Each time counts from the moment when the
new node is ready (it says where its page is) to the moment when the first node's feed shows it as a member. That can
be a little below zero, because a node is found while it still prints. Prints one table.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from link_latency import describe_machine

BAR_SECONDS = 3.0
PATIENCE_SECONDS = 60.0


class Node:
    """A daemon without a model. `ready_at` is the time at which it said that it is up."""

    def __init__(self, data_dir: Path, token: str | None) -> None:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("SWARMD_")}
        command = [sys.executable, "-m", "swarmd.node.cli.app", "--data-dir", str(data_dir), "--name", data_dir.name]
        command += ["--listen", "127.0.0.1:0", "--port", "0", "--model", "none"]
        if token is not None:
            command.append("join")
            environment["SWARMD_TOKEN"] = token
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.url, self.ready_at = self._wait()
        # What it goes on to say must not fill the pipe.
        threading.Thread(target=self.process.communicate, daemon=True).start()

    def states(self) -> Iterator[tuple[float, dict[str, str]]]:
        """(time, state of every node by name), again at every change."""
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=PATIENCE_SECONDS)
        connection.request("GET", "/api/events")
        with connection.getresponse() as response:
            for line in response:
                if line.startswith(b'data: {"self"'):
                    now, state = time.monotonic(), json.loads(line[6:])
                    yield now, {node["name"]: node["state"] for node in state["nodes"]}

    def stop(self) -> None:
        """End it and wait."""
        self.process.terminate()
        self.process.wait()

    def _wait(self) -> tuple[str, float]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if found := re.search(r"dashboard:\s+(http\S+)", line):
                return found[1], time.monotonic()
        raise SystemExit("the node did not come up; start `swarmd` by hand to see why")


@contextmanager
def running(data_dir: Path, token: str | None = None) -> Iterator[Node]:
    """A node, ended on leaving."""
    node = Node(data_dir, token)
    try:
        yield node
    finally:
        node.stop()


def measure(first: Node, root: Path, token: str, number: int) -> float:
    """Seconds from a new node's being ready to its being a member in the eyes of the first one."""
    name = f"node{number}"
    seen_at = threading.Event()
    times: list[float] = []

    def watch() -> None:
        for now, states in first.states():
            if states.get(name) == "alive":
                times.append(now)
                seen_at.set()
                return

    threading.Thread(target=watch, daemon=True).start()
    with running(root / name, token) as node:
        if not seen_at.wait(PATIENCE_SECONDS):
            raise SystemExit(f"{name} was not seen within {PATIENCE_SECONDS:.0f} s")
        return times[0] - node.ready_at


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=10, help="how often to start the second node (default 10)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="swarmd-bench-") as folder, running(Path(folder) / "first") as first:
        root = Path(folder)
        command = [sys.executable, "-m", "swarmd.node.cli.app", "--data-dir", str(root / "first"), "token"]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        token = re.findall(r"swarmd1-\S+", printed)[0]
        times = [measure(first, root, token, number) for number in range(options.starts)]
    print(describe_machine())
    print(f"{'from ready to member seen':28}{'median':>10}{'min':>10}{'max':>10}")
    cells = (statistics.median(times), min(times), max(times))
    print(f"{f'mDNS, {len(times)} starts':28}" + "".join(f"{cell:>9.2f}s" for cell in cells))
    print(f"bar: median under {BAR_SECONDS:.0f} s: {'met' if cells[0] < BAR_SECONDS else 'missed'}")


if __name__ == "__main__":
    main()
