"""The lab: start swarms and baselines as pinned processes, load them through HTTP, write tables.

python bench/lab.py [SCENARIO...] [--llama-cpp FOLDER] [--repeats N] [--results FOLDER]

Without a scenario it runs all but the slowest. Tables go to standard output and, with every single value as JSON, to
bench/results/. How it is measured, what is not, and how to get the baselines: bench/METHOD.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from figures import Metric
from load import LoadError, PromptSource, complete_together
from machine import CpuWatch, Machine, describe_machine
from measure import Load
from processes import Contender, Needs, Unavailable
from report import Column, Outcome
from scenarios import MODELS, SCENARIOS, Scenario
from starts import Lab
from workloads import BenchModel

RESULTS = Path(__file__).resolve().parent / "results"
BY_DEFAULT = ("two-nodes", "one-node", "scaling")
# Enough for every path to have run once, prefill in chunks included.
WARM_UP_PROMPT, WARM_UP_TOKENS = 512, 8


def run_scenario(scenario: Scenario, lab: Lab, machine: Machine, repeats: int) -> Outcome:
    """Start all contenders, measure them in turns, end them."""
    model = MODELS[scenario.model]()
    columns = {name: Column() for name in scenario.contenders}
    source = model.prompt_source()
    with ExitStack() as stack:
        running = dict(_start(scenario, model, columns, source, stack))
        for repeat in range(repeats):
            for load in scenario.loads:
                for name, contender in list(running.items()):
                    _say(f"{scenario.name} {repeat + 1}/{repeats} {name}: ", end="")
                    if not _measure(contender, load, source, columns[name]):
                        del running[name]
    return Outcome(scenario, model, machine, columns, repeats)


def _start(
    scenario: Scenario, model: BenchModel, columns: dict[str, Column], source: PromptSource, stack: ExitStack
) -> Iterator[tuple[str, Contender]]:
    """The contenders that can be had, warmed up; for the others the column says why not."""
    streams = max(load.streams for load in scenario.loads)
    length = max(load.length for load in scenario.loads)
    for name, start in scenario.contenders.items():
        column = columns[name]
        _say(f"{scenario.name}: starting {name}")
        try:
            contender = stack.enter_context(start(Needs(name, model, streams, length)))
            prompt = source.prompts(1, min(WARM_UP_PROMPT, length - WARM_UP_TOKENS))
            asyncio.run(complete_together(contender.server, prompt, WARM_UP_TOKENS))
        except (Unavailable, LoadError) as reason:
            column.missing = str(reason)
            _say(f"{name} is left out: {reason}")
            continue
        column.detail, column.place = contender.detail, contender.place
        yield name, contender


def _measure(contender: Contender, load: Load, source: PromptSource, column: Column) -> bool:
    """One repeat of a load; False when the contender failed, which its column then tells."""
    watch = CpuWatch(contender.pids)
    try:
        found = asyncio.run(load.run(contender.server, source))
    except LoadError as error:
        column.missing = f"it failed in a later repeat: {error}" if column.values else str(error)
        _say(f"failed: {error}")
        return False
    others, own = watch.read()
    column.others.append(others)
    for metric in load.metrics:
        column.values.setdefault(metric.name, []).append(found[metric.name])
    _say(", ".join(_show(metric, found) for metric in load.metrics) + f" ({own:.1f} cores, others {others:.1f})")
    return True


def _show(metric: Metric, found: dict[str, float]) -> str:
    return f"{metric.name} {metric.show(found[metric.name])} {metric.unit}"


def _say(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)


def write_results(outcome: Outcome, folder: Path) -> None:
    """The table on standard output and in a file, and every value beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    table = outcome.markdown()
    print(table, flush=True)
    (folder / f"{outcome.scenario.name}.md").write_text(table)
    (folder / f"{outcome.scenario.name}.json").write_text(json.dumps(outcome.as_json(), indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(SCENARIOS)
    parser.add_argument("scenario", nargs="*", help=f"of {names}; default: {' '.join(BY_DEFAULT)}")
    parser.add_argument("--llama-cpp", type=Path, help="folder with llama-server and ggml-rpc-server")
    parser.add_argument("--repeats", type=int, help="how often each figure is taken (default: the scenario's own)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--cores", default="", help="the cores to use, like 2,3 (default: the first two)")
    options = parser.parse_args()
    if unknown := [name for name in options.scenario if name not in SCENARIOS]:
        parser.error(f"there is no scenario {unknown[0]!r}; there are {names}")
    return options


def main() -> None:
    """Run the scenarios that the command line names."""
    options = _options()
    # Ended from outside, it still ends what it has started.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    here = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    cores = tuple(map(int, options.cores.split(","))) if options.cores else tuple(here[:2])
    lab = Lab(cores, options.llama_cpp)
    for name in options.scenario or BY_DEFAULT:
        try:
            for scenario in SCENARIOS[name](lab):
                outcome = run_scenario(scenario, lab, describe_machine(), options.repeats or scenario.repeats)
                write_results(outcome, options.results)
        except Unavailable as reason:
            print(f"{name} is left out: {reason}")


if __name__ == "__main__":
    main()
