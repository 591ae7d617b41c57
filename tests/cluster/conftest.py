"""What the cluster tests compare with: one node alone."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

import pytest
from support.answers import Answer
from support.solo import Reference, alone, expecting
from support.stream_load import Outcome, Question
from support.swarm import Node

GAPS = pytest.StashKey[list[str]]()
Reporting = Generator[None, pytest.TestReport, pytest.TestReport]


@pytest.fixture(scope="session")
def solo(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    """`solo(prompt, **options)`: what a node alone answers, with nothing else to do; asked once per question."""
    with alone(tmp_path_factory.mktemp("solo") / "alone", smollm2_path) as reference:
        yield reference


@pytest.fixture
def expected(solo: Reference) -> Callable[[Question], Answer]:
    """The same, asked by question."""
    return expecting(solo)


@pytest.fixture
def note_gaps(request: pytest.FixtureRequest) -> Callable[[str, Sequence[Outcome]], None]:
    """`note_gaps(case, outcomes)`: how long clients waited, for the summary at the end of the run."""
    lines = request.config.stash.setdefault(GAPS, [])

    def note(case: str, outcomes: Sequence[Outcome]) -> None:
        wait, gap = max(o.wait for o in outcomes), max(o.gap for o in outcomes)
        lines.append(f"{gap:6.2f} s between tokens, {wait:6.2f} s to the first: {case}")

    return note


def pytest_configure() -> None:
    """Who ends the run from outside ends it as Ctrl-C does: nodes, namespaces, rules and mounts are undone."""
    signal.signal(signal.SIGTERM, lambda number, frame: pytest.exit(f"signal {number}", 128 + number))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The longest waits of clients while something happened to their swarm."""
    if lines := config.stash.get(GAPS, []):
        terminalreporter.section("longest waits under faults")
        terminalreporter.write_line("\n".join(lines))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Reporting:
    """A failure in a swarm is seldom understood from one side: show what every node has said."""
    report = yield
    if report.failed:
        report.sections += [(f"log of node {node.name}", node.log[-8000:]) for node in Node.living]
    return report
