"""Measure what a token costs besides computing: a ring of real stage processes whose engines compute nothing.

python bench/hop_cost.py [--stages N] [--tokens N] [--repeats N] [--compute-ms MS] [--baseline TREE] [--profile FOLDER]

An entry process (the daemon's part: gateway, HTTP server) and N stage processes, over links as between nodes; stage i
runs on core i, the entry process beside stage 0, as on N machines of one core. The load comes from this process over
HTTP. Columns: tok/s of all streams together, milliseconds from token to token of one stream, and the CPU microseconds
that one token costs in the entry process, in the first stage (which drives) and in the others, by thread. With
`--compute-ms` each stage's engine burns that much CPU per step. `--baseline` names another checkout, measured
alternately with this one. `--profile` has the stages write where their time goes (SWARMD_PROFILE) into a folder.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import msgspec

HERE = Path(__file__).resolve()
ROOT = HERE.parent.parent
PARTS = ("dashboard", "discovery", "node", "partition", "transport")
STREAMS = (1, 8)
PROMPT_TOKENS = 32
START_SECONDS = 60.0
RUN_SECONDS = 120.0

CpuTimes = dict[str, float]
"""CPU seconds so far, by "process/thread"."""


@dataclass
class Variant:
    """A source tree and its running swarm."""

    name: str
    process: asyncio.subprocess.Process
    url_port: int
    pids: dict[str, int]
    rates: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    costs: dict[int, list[CpuTimes]] = field(default_factory=lambda: defaultdict(list))


def link_sources(root: Path, folder: Path) -> Path:
    """A folder for PYTHONPATH in which `swarmd` is the checkout at `root`."""
    package = folder / "swarmd"
    package.mkdir(parents=True)
    for part in PARTS:
        (package / part).symlink_to(root / part)
    return folder


def burn_bytes(milliseconds: float) -> int:
    """How much must be hashed to burn so much CPU."""
    block, times = bytes(1 << 20), []
    for _ in range(20):
        begin = time.perf_counter()
        hashlib.sha256(block).digest()
        times.append(time.perf_counter() - begin)
    return int(milliseconds / 1e3 * len(block) / min(times))


async def start(name: str, root: Path, folder: Path, options: argparse.Namespace) -> Variant:
    """Start the processes of one source tree and wait until the ring is up."""
    path = os.pathsep.join([str(link_sources(root, folder / name)), str(ROOT / "tests")])
    environment = os.environ | {"PYTHONPATH": path}
    if options.profile:
        environment["SWARMD_PROFILE"] = options.profile
    arguments = ("--stages", str(options.stages), "--burn", str(options.burn))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(HERE.parent / "hop_ring.py"), "entry", *arguments),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )
    assert process.stdout is not None
    async with asyncio.timeout(START_SECONDS):
        line = await process.stdout.readline()
    if not line:
        raise SystemExit(f"the ring of {root} did not start; its errors stand above")
    ready = msgspec.json.decode(line)
    return Variant(name, process, ready["port"], ready["pids"])


def cpu_times(pids: dict[str, int]) -> CpuTimes:
    """CPU seconds of every thread, from Linux' /proc/PID/task/TID/schedstat (its first field, nanoseconds)."""
    times: CpuTimes = defaultdict(float)
    for name, pid in pids.items():
        for task in Path(f"/proc/{pid}/task").iterdir():
            thread = "loop" if task.name == str(pid) else "compute"
            times[f"{name}/{thread}"] += int((task / "schedstat").read_text().split()[0]) / 1e9
    return times


async def one_stream(port: int, seed: int, tokens: int) -> None:
    """Ask for a streamed answer and read it to its end."""
    prompt = [1000 + (seed * 7919 + i * 31) % 40000 for i in range(PROMPT_TOKENS)]
    body = msgspec.json.encode({"model": "hop", "prompt": prompt, "max_tokens": tokens, "stream": True})
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    seen, tail = 0, b""
    while not tail.endswith(b"data: [DONE]\n\n\r\n"):
        data = await reader.read(1 << 16)
        if not data:
            raise SystemExit("an answer broke off")
        seen += data.count(b'"text":')
        tail = (tail + data)[-64:]
        if b"0\r\n\r\n" in tail:
            break
    writer.close()
    if seen < tokens:
        raise SystemExit(f"an answer had {seen} pieces of text instead of {tokens}: {tail!r}")


async def run_once(variant: Variant, streams: int, tokens: int, seed: int) -> None:
    """One measurement: all streams at once."""
    before, begin = cpu_times(variant.pids), time.perf_counter()
    async with asyncio.timeout(RUN_SECONDS):
        await asyncio.gather(*(one_stream(variant.url_port, seed * 100 + i, tokens) for i in range(streams)))
    seconds, after = time.perf_counter() - begin, cpu_times(variant.pids)
    total = streams * tokens
    variant.rates[streams].append(total / seconds)
    variant.costs[streams].append({name: (after[name] - before.get(name, 0.0)) / total * 1e6 for name in after})


def show(variants: list[Variant], stages: int) -> None:
    """The table, one line per source tree and number of streams."""
    columns = ["entry/loop", *(f"stage {i}/{thread}" for i in range(stages) for thread in ("loop", "compute"))]
    heads = ["source", "streams", "tok/s", "ms/step", *columns, "all CPU us"]
    rows = []
    for streams in STREAMS:
        for variant in variants:
            rate = median(variant.rates[streams])
            costs = [median(times.get(name, 0.0) for times in variant.costs[streams]) for name in columns]
            shown = [f"{value:.0f}" for value in (*costs, sum(costs))]
            rows.append([variant.name, str(streams), f"{rate:.0f}", f"{1e3 * streams / rate:.3f}", *shown])
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    for row in [heads, *rows]:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


async def measure(options: argparse.Namespace) -> None:
    """Start the variants, measure them alternately, print."""
    trees = [("this", ROOT)] + ([("baseline", options.baseline)] if options.baseline else [])
    with tempfile.TemporaryDirectory() as folder:
        variants = [await start(name, root, Path(folder), options) for name, root in trees]
        try:
            for repeat in range(-1, options.repeats):
                for streams in STREAMS:
                    for variant in variants:
                        await run_once(variant, streams, options.tokens, repeat + 2)
                        if repeat < 0:  # warms up
                            variant.rates.clear()
                            variant.costs.clear()
            show(variants, options.stages)
        finally:
            for variant in variants:
                assert variant.process.stdin is not None
                variant.process.stdin.close()
                await variant.process.wait()


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=2, help="stages of the ring (default 2)")
    parser.add_argument("--tokens", type=int, default=300, help="tokens of one answer (default 300)")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each kind (default 5)")
    parser.add_argument("--compute-ms", type=float, default=0.0, help="CPU milliseconds of a step in each stage")
    parser.add_argument("--baseline", type=lambda text: Path(text).resolve(), help="another checkout to compare with")
    parser.add_argument("--profile", default="", help="folder for the stages' profiles")
    options = parser.parse_args()
    options.burn = burn_bytes(options.compute_ms)
    asyncio.run(measure(options))


if __name__ == "__main__":
    main()
