"""Speculation on and off through the real HTTP endpoint: two nodes on links of several latencies, one stream.

python bench/speculation.py [--delays-ms 0 2 10] [--repeats N] [--model PATH] [--draft-model PATH]

For every latency (one way, so that a token on its way round two stages waits twice) there are two swarms of two
single-core nodes on a network of namespaces, one started with `--no-speculate`; both are up all the time, and asked in
turns. Two texts: `edit`, a greedy answer that rewrites the code of its prompt, and `hostile`, at temperature 1 from a
prompt of a few token ids in random order, where n-grams repeat and go on otherwise. Columns: decode tok/s of one stream
(the tokens after the first, by their arrival at the client), medians with the lowest and the highest; the ratio of the
medians; the guessed tokens per answer, and how many of them were right; and whether both swarms gave the same text, as
they must (activations travel in f32). The bars, at 10 ms: edit at least 1.8, hostile at least 0.95. Needs root.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from contenders import swarm
from load import Server
from machine import CpuWatch, describe_machine
from processes import Contender, Place
from relay import delayed_lan, why_unavailable
from workloads import BenchModel, default_model

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support.netns import inside

from swarmd.node.models.front import ModelFront

CODE = '''class Shelf:
    """Books by their title."""

    def __init__(self):
        self.books = {}

    def add(self, title, author, year):
        if title in self.books:
            raise KeyError(f"{title} is on the shelf already")
        self.books[title] = (author, year)

    def remove(self, title):
        if title not in self.books:
            raise KeyError(f"{title} is not on the shelf")
        del self.books[title]
'''
EDIT = (
    "<|im_start|>user\nRename the class `Shelf` to `Library` in this code and change nothing else:\n\n"
    f"```python\n{CODE}```<|im_end|>\n<|im_start|>assistant\nHere is the code with the class renamed:\n\n```python\n"
)
# As many as the code takes.
EDIT_TOKENS, HOSTILE_TOKENS = 108, 128
HOSTILE_PROMPT, HOSTILE_IDS = 256, 8
KV_TOKENS = 2048
REQUEST_SECONDS = 300.0
BARS = {"edit": 1.8, "hostile": 0.95}
# Drivers tell their counters twice a second, and nodes each other at once.
COUNTERS_SECONDS = 1.5


@dataclass(frozen=True)
class Text:
    """What is asked for, one prompt per repeat."""

    name: str
    prompts: list[list[int]]
    new_tokens: int
    temperature: float


@dataclass
class Row:
    """Both swarms on one text: tok/s per repeat, answers, and (guessed, right) tokens of all answers."""

    off: list[float] = field(default_factory=list)
    on: list[float] = field(default_factory=list)
    same: bool = True
    guessed: tuple[float, float] = (0.0, 0.0)


def make_texts(model: BenchModel, repeats: int) -> list[Text]:
    """The same ones at every run."""
    tokenizer = ModelFront.load(model.path).tokenizer
    draw = random.Random(10)
    plain = [token for token in range(model.vocabulary) if token not in model.ends]
    edit = [tokenizer.encode(EDIT, add_special=False)] * repeats
    hostile = []
    for _ in range(repeats):
        few = draw.choices(plain, k=HOSTILE_IDS)
        hostile.append(draw.choices(few, k=HOSTILE_PROMPT))
    return [Text("edit", edit, EDIT_TOKENS, 0.0), Text("hostile", hostile, HOSTILE_TOKENS, 1.0)]


def ask(server: Server, text: Text, repeat: int) -> tuple[float, str]:
    """(decode tok/s, text) of one answer."""
    body = {
        "model": server.model,
        "prompt": text.prompts[repeat],
        "max_tokens": text.new_tokens,
        "temperature": text.temperature,
        "seed": repeat,
        "logit_bias": {str(token): -100 for token in server.ends},
        "stream": True,
        # So that every token is an event, also one whose text is held back for its next bytes.
        "logprobs": 0,
    }
    times, words = inside(server.namespace, lambda: _stream(f"{server.url}/v1/completions", body))
    if len(times) != text.new_tokens:
        raise SystemExit(f"{len(times)} tokens came where {text.new_tokens} were asked for")
    return (len(times) - 1) / (times[-1] - times[0]), words


def _stream(url: str, body: dict[str, Any]) -> tuple[list[float], str]:
    """When each token arrived, and the text."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    times, words = [], ""
    try:
        with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as response:
            for line in response:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise SystemExit(f"the request failed: {event['error']['message']}")
                for choice in event["choices"]:
                    words += choice["text"]
                    times += [time.perf_counter()] * len((choice["logprobs"] or {}).get("tokens", ()))
    except urllib.error.HTTPError as error:
        raise SystemExit(f"{url} answered {error.code}: {error.read(500)!r}") from None
    return times, words


def counters(server: Server) -> tuple[float, float]:
    """(guessed, right) tokens so far, from /metrics."""
    time.sleep(COUNTERS_SECONDS)
    page = inside(server.namespace, lambda: urllib.request.urlopen(f"{server.url}/metrics", timeout=10).read().decode())
    found = {"draft": 0.0, "accepted": 0.0}
    for line in page.splitlines():
        for kind in found:
            if line.startswith(f"swarmd_spec_decode_num_{kind}_tokens_total"):
                found[kind] = float(line.rpartition(" ")[2])
    return found["draft"], found["accepted"]


def compare(off: Contender, on: Contender, text: Text) -> Row:
    """One row: the swarms in turns, the first one first in every other repeat."""
    row, before = Row(), counters(on.server)
    for repeat in range(len(text.prompts)):
        answers: dict[str, str] = {}
        for contender in (off, on) if repeat % 2 else (on, off):
            rate, answers[contender.name] = ask(contender.server, text, repeat)
            (row.on if contender is on else row.off).append(rate)
        row.same &= answers[off.name] == answers[on.name]
    after = counters(on.server)
    row.guessed = after[0] - before[0], after[1] - before[1]
    return row


def measure(delay_ms: float, model: BenchModel, texts: Sequence[Text], extra: Sequence[str]) -> None:
    """Print the rows of one latency."""
    cores = sorted(os.sched_getaffinity(0))
    places = [Place((cores[0],)), Place((cores[-1],))]
    with ExitStack() as stack:
        pair = []
        for name, options in (("off", ("--no-speculate",)), ("on", extra)):
            network = stack.enter_context(delayed_lan(2, delay_ms))
            options = ("--wire-dtype", "f32", *options)
            pair.append(stack.enter_context(swarm(name, model, places, KV_TOKENS, options, network)))
        off, on = pair
        for contender in pair:
            for text in texts:
                ask(contender.server, text, 0)
        for text in texts:
            watch = CpuWatch([*off.pids, *on.pids])
            row = compare(off, on, text)
            print(line(delay_ms, text, row, watch.read()[0]), flush=True)


def line(delay_ms: float, text: Text, row: Row, others: float) -> str:
    """A row of the table."""

    def cell(rates: Sequence[float]) -> str:
        return f"{median(rates):.1f} ({min(rates):.1f}-{max(rates):.1f})"

    ratio = median(row.on) / median(row.off)
    bar = f" (bar {BARS[text.name]})" if delay_ms == 10 else ""
    guessed, right = (count / len(text.prompts) for count in row.guessed)
    return (
        f"| {delay_ms:g} ms | {text.name} | {cell(row.off)} | {cell(row.on)} | {ratio:.2f}{bar} "
        f"| {guessed:.0f}, {right:.0f} right | {'yes' if row.same else 'NO'} | {others:.1f} |"
    )


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delays-ms", type=float, nargs="+", default=[0.0, 2.0, 10.0], help="one way")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", type=Path, help="a GGUF file (default: the tests' SmolLM2)")
    parser.add_argument(
        "--draft-model", type=Path, help="a GGUF file of the same vocabulary, for the swarm that guesses"
    )
    options = parser.parse_args()
    if reason := why_unavailable():
        sys.exit(reason)
    path = options.model or default_model()
    model = BenchModel.open(path.stem, path)
    texts = make_texts(model, options.repeats)
    extra = ("--draft-model", str(options.draft_model)) if options.draft_model else ()
    print("\n".join(describe_machine().lines()), end="\n\n")
    print(
        "| one way | text | off, tok/s | on, tok/s | on / off | guessed per answer | same text | cores used by others |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for delay_ms in options.delays_ms:
        measure(delay_ms, model, texts, extra)


if __name__ == "__main__":
    main()
