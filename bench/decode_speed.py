"""Measure serving on this machine through the real HTTP endpoint: one node, then two nodes that share the model.

python bench/decode_speed.py [--model PATH] [--threads N] [--repeats N]

Every node gets N threads, half of the physical cores by default, as if it were a machine of that size: so the ratio is
what a second machine of the same kind brings or costs. Columns: decode tok/s of one stream and of eight together, and
TTFT for a prompt of 512 tokens; medians of the repeats, with the lowest and the highest. The named baseline is
`transformers` in fp32 with N threads on the same prompts. Prompts are random token ids, new ones for each repeat, so
that no cache helps; answers are greedy and kept from ending early. The default model comes from the same cache as the
tests' (SWARMD_TEST_MODEL names a copy).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import psutil
from link_latency import describe_machine

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from support.swarm import Node, join  # noqa: E402

from swarmd.node.models.catalog import DEFAULT_MODEL  # noqa: E402
from swarmd.node.models.front import ModelFront  # noqa: E402
from swarmd.node.models.store import ModelStore  # noqa: E402

STREAMS = 8
SHORT_PROMPT, LONG_PROMPT, NEW_TOKENS = 16, 512, 32
# Room for all streams and for the long prompt; both nodes could hold the model alone, so --split decides.
NODE_OPTIONS = ("--no-mdns", "--model", "none", "--context", "1024", "--memory", "1GB")
REQUEST_SECONDS = 120.0
BASELINE_SECONDS = 120.0


@dataclass(frozen=True)
class Workload:
    """The prompts, as token ids, one entry per repeat, and the ids that would end an answer."""

    single: list[list[int]]
    batches: list[list[list[int]]]
    long: list[list[int]]
    ends: tuple[int, ...]


@dataclass
class Figures:
    """What was measured: tok/s of one stream and of all together, and TTFT in seconds."""

    name: str
    single: list[float] = field(default_factory=list)
    batched: list[float] = field(default_factory=list)
    ttft: list[float] = field(default_factory=list)


def make_workload(model: Path, repeats: int) -> Workload:
    """Prompts for a model; the same ones at every run."""
    tokenizer = ModelFront.load(model).tokenizer
    draw = random.Random(512)
    plain = [token for token in range(tokenizer.vocab_size) if token not in tokenizer.eos_ids]

    def prompts(count: int, length: int) -> list[list[int]]:
        return [draw.choices(plain, k=length) for _ in range(count)]

    return Workload(
        single=prompts(repeats, SHORT_PROMPT),
        batches=[prompts(STREAMS, SHORT_PROMPT) for _ in range(repeats)],
        long=prompts(repeats, LONG_PROMPT),
        ends=tuple(sorted(tokenizer.eos_ids)),
    )


def token_times(node: Node, model: str, prompt: list[int], new_tokens: int, ends: tuple[int, ...]) -> list[float]:
    """Seconds from sending a request to the arrival of each token."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": new_tokens,
        "temperature": 0,
        "logit_bias": {str(token): -100 for token in ends},
        "stream": True,
        # So that every token is an event, also one whose text is held back for its next bytes.
        "logprobs": 0,
    }
    times, start = [], time.perf_counter()
    for _, event in node.events("POST", "/v1/completions", body, timeout=REQUEST_SECONDS):
        if event is None:
            break
        if "error" in event:
            raise SystemExit(f"the request failed: {event['error']['message']}")
        arrived = sum(len((choice["logprobs"] or {}).get("tokens", ())) for choice in event["choices"])
        times += [time.perf_counter() - start] * arrived
    if len(times) != new_tokens:
        raise SystemExit(f"{len(times)} tokens came where {new_tokens} were asked for")
    return times


def batched_rate(node: Node, model: str, batch: list[list[int]], ends: tuple[int, ...]) -> float:
    """Tok/s of streams that run together, while all of them are decoding."""
    runs: list[list[float]] = []

    def run(prompt: list[int]) -> None:
        began = time.perf_counter()
        runs.append([began + t for t in token_times(node, model, prompt, NEW_TOKENS, ends)])

    threads = [threading.Thread(target=run, args=(prompt,)) for prompt in batch]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(runs) != len(batch):
        raise SystemExit("not every stream came to its end; see above")
    begin, end = max(times[0] for times in runs), min(times[-1] for times in runs)
    arrived = sum(1 for times in runs for t in times if begin < t <= end)
    return arrived / (end - begin)


def measure(name: str, node: Node, workload: Workload, model: str) -> Figures:
    """All figures of the swarm behind one node's endpoint, after one request to warm up."""
    token_times(node, model, workload.single[0], NEW_TOKENS, workload.ends)
    figures = Figures(name)
    for prompt in workload.single:
        times = token_times(node, model, prompt, NEW_TOKENS, workload.ends)
        figures.single.append((len(times) - 1) / (times[-1] - times[0]))
    for batch in workload.batches:
        figures.batched.append(batched_rate(node, model, batch, workload.ends))
    for prompt in workload.long:
        figures.ttft += token_times(node, model, prompt, 1, workload.ends)
    return figures


def serve(node: Node, model: Path, stages: int) -> str:
    """Have the model served once the machine is quiet; its name in the swarm."""
    node.until(lambda state: all(d["memory_bandwidth"] for n in state["nodes"] for d in n["devices"]))
    status, answer = node.post("/api/instances", {"model": str(model)})
    if status >= 400:
        raise SystemExit(answer["error"]["message"])
    return node.until_ready(stages)["model"]


def one_node(folder: Path, model: Path, threads: int, workload: Workload) -> Figures:
    """The whole model on one node."""
    with Node(folder / "alone", *NODE_OPTIONS, "--threads", str(threads)) as node:
        return measure(f"one node, {_threads(threads)}", node, workload, serve(node, model, 1))


def two_nodes(folder: Path, model: Path, threads: int, workload: Workload) -> Figures:
    """The model in two stages; the second node fetches its layers from the first."""
    options = (*NODE_OPTIONS, "--threads", str(threads))
    with Node(folder / "first", *options, "--split") as first:
        token, peer = first.token(), f"127.0.0.1:{first.link_port}"
        with join(token, folder / "second", *options, "--peer", peer):
            first.until_members(2)
            name = serve(first, model, 2)
            return measure(f"two nodes, {_threads(threads)} each", first, workload, name)


def baseline(model: Path, threads: int, workload: Workload) -> Figures | str:
    """`transformers` on the same prompts, or why it could not be measured."""
    asked = {
        "model": str(model),
        "threads": threads,
        "new_tokens": NEW_TOKENS,
        "single": workload.single,
        "batches": workload.batches,
        "long": workload.long,
    }
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, str(ROOT / "bench" / "transformers_baseline.py")]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            env=environment,
            timeout=BASELINE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"it took more than {BASELINE_SECONDS:.0f} s"
    if done.returncode != 0:
        return done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"status {done.returncode}"
    found = json.loads(done.stdout)
    return Figures(f"{found['name']}, {_threads(threads)}", found["single"], found["batched"], found["ttft"])


def default_model() -> Path:
    """The default model's file: SWARMD_TEST_MODEL, or the tests' cache, filled when it is empty."""
    if given := os.environ.get("SWARMD_TEST_MODEL"):
        return Path(given)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swarmd-tests"
    return asyncio.run(ModelStore(cache / "models").ensure(DEFAULT_MODEL, lambda progress: None)).path


def report(rows: list[Figures | str]) -> None:
    """The table; the second row is compared with the first, and the first with the third."""
    one, two, other = rows
    print(f"{'':36}{'decode, 1 stream':>24}{f'decode, {STREAMS} streams':>24}{f'TTFT, {LONG_PROMPT} tokens':>24}")
    for row in rows:
        if isinstance(row, Figures):
            cells = (_cell(row.single, "tok/s"), _cell(row.batched, "tok/s"), _cell(row.ttft, "s"))
            print(f"{row.name:36}" + "".join(f"{cell:>24}" for cell in cells))
        else:
            print(f"transformers, fp32: not measured: {row}")
    _ratios("two nodes / one node", two, one)
    _ratios("one node / transformers", one, other)


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def _cell(values: list[float], unit: str) -> str:
    digits = 2 if unit == "s" else 1
    low, high = min(values), max(values)
    return f"{median(values):.{digits}f} {unit} ({low:.{digits}f}-{high:.{digits}f})"


def _ratios(name: str, row: Figures | str, base: Figures | str) -> None:
    if isinstance(row, Figures) and isinstance(base, Figures):
        pairs = ((row.single, base.single), (row.batched, base.batched), (row.ttft, base.ttft))
        print(f"{name:36}" + "".join(f"{median(a) / median(b):>24.2f}" for a, b in pairs))


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a GGUF file (default: the default model)")
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    parser.add_argument("--threads", type=int, default=max(1, cores // 2), help="of each node")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    model = (options.model or default_model()).resolve()
    workload = make_workload(model, options.repeats)
    print(describe_machine())
    print(f"{options.model or DEFAULT_MODEL}, {NEW_TOKENS} new tokens, median (lowest-highest) of {options.repeats}")
    with tempfile.TemporaryDirectory(prefix="swarmd-bench-") as folder:
        rows = [
            one_node(Path(folder), model, options.threads, workload),
            two_nodes(Path(folder), model, options.threads, workload),
            baseline(model, options.threads, workload),
        ]
    report(rows)


if __name__ == "__main__":
    main()
