"""The lab against servers that the test makes up: what it counts, what it refuses, what it says of those that fail."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from figures import Bar
from lab import run_scenario, write_results
from load import LoadError, Server, Trace, complete_together
from machine import Machine
from measure import interference, many_streams, single_stream
from processes import Contender, Needs, Place, Unavailable
from scenarios import MODELS, SCENARIOS, SMOLLM2, Comparison, Scenario
from starts import Lab, Start
from support.tiny_gguf import write_tiny_gguf
from workloads import BenchModel

Events = Callable[[dict[str, Any]], Iterator[dict[str, Any]]]

MACHINE = Machine("a processor", ("avx2",), 2, 8 << 30, "Linux", {"swarmd": "1"}, 0.5, 10e9, 16e9)


def usage(asked: dict[str, Any], missing: int = 0) -> dict[str, Any]:
    counts = {"prompt_tokens": len(asked["prompt"]), "completion_tokens": asked["max_tokens"] - missing}
    return {"choices": [], "usage": counts}


def well(asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A token an event, one of them without text, as when a character is not complete yet."""
    for number in range(asked["max_tokens"]):
        yield {"choices": [{"text": "" if number == 1 else "x"}]}
    yield usage(asked)


def early(asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield {"choices": [{"text": "x"}]}
    yield {"choices": [{"text": "x"}]}
    yield usage(asked, missing=1)


def failing(asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield {"choices": [{"text": "x"}]}
    yield {"error": {"message": "a node was lost"}}


def at_once(asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield {"choices": [{"text": "x" * asked["max_tokens"]}]}
    yield usage(asked)


@contextmanager
def serving(events: Events) -> Iterator[Server]:
    """A server that streams made-up events, each flushed."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()
            for event in events(asked):
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            self.wfile.write(b"data: [DONE]\n\n")

        def log_message(self, format: str, *args: Any) -> None:
            """The test's output is not for access logs."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield Server(f"http://127.0.0.1:{server.server_port}", "swarmd", "m", ends=(2,))
        finally:
            server.shutdown()
            thread.join()


def started(events: Events) -> Start:
    @contextmanager
    def start(needs: Needs) -> Iterator[Contender]:
        with serving(events) as server:
            yield Contender(needs.name, server, "made up", [], Place((0,)))

    return start


def absent(needs: Needs) -> Any:
    raise Unavailable("it is not installed: install it")


def traces(events: Events, streams: int = 1) -> list[Trace]:
    with serving(events) as server:
        return asyncio.run(complete_together(server, [[5, 6, 7]] * streams, 4))


def test_tokens_are_counted_by_the_server_and_timed_by_events_with_text() -> None:
    for trace in traces(well, streams=3):
        assert trace.tokens == 4
        assert len(trace.arrivals) == 3
        assert trace.sent < trace.arrivals[0] <= trace.arrivals[-1]


@pytest.mark.parametrize(
    ("events", "words"), [(early, r"\(3, 3\).*\(3, 4\)"), (failing, "a node was lost"), (at_once, "1 events")]
)
def test_an_answer_that_is_not_what_was_asked_for_is_no_figure(events: Events, words: str) -> None:
    with pytest.raises(LoadError, match=words):
        traces(events)


def test_a_server_that_is_not_there_is_an_error_that_names_it() -> None:
    server = Server("http://127.0.0.1:9", "swarmd", "m")
    with pytest.raises(LoadError, match=r"127\.0\.0\.1:9"):
        asyncio.run(complete_together(server, [[1]], 2))


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BenchModel:
    model = BenchModel.open("tiny", write_tiny_gguf(tmp_path / "tiny.gguf"))
    monkeypatch.setitem(MODELS, SMOLLM2, lambda: model)
    return model


@pytest.mark.usefixtures("tiny")
def test_a_table_has_every_contender_or_the_reason_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scenario = Scenario(
        "made-up",
        "A made-up scenario",
        SMOLLM2,
        {"ours": started(well), "theirs": started(well), "gone": absent, "broken": started(early)},
        (single_stream(16, 4), many_streams(2, 16, 4)),
        (Comparison("ours / theirs", "ours", ("theirs", "gone"), (Bar("decode, 1 stream", 1e-9),)),),
    )
    write_results(run_scenario(scenario, Lab((0, 1)), MACHINE, repeats=2), tmp_path)
    table = (tmp_path / "made-up.md").read_text()
    assert table in capsys.readouterr().out
    assert "|  | ours | theirs | ours / theirs |" in table
    assert "(bar ≥ 1e-09 ×: met)" in table
    assert "gone: not measured: it is not installed: install it" in table
    assert "broken: not measured:" in table
    assert "of the bandwidth limit" in table
    kept = json.loads((tmp_path / "made-up.json").read_text())["contenders"]
    assert {len(values) for name in ("ours", "theirs") for values in kept[name]["values"].values()} == {2}
    assert len(kept["ours"]["others"]) == 4
    assert kept["gone"]["values"] == {}


@pytest.mark.usefixtures("tiny")
def test_a_contender_that_breaks_in_a_later_repeat_keeps_what_it_had(tmp_path: Path) -> None:
    requests = 0

    def breaking(asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
        nonlocal requests
        requests += 1
        return well(asked) if requests <= 2 else failing(asked)

    scenario = Scenario("s", "S", SMOLLM2, {"ours": started(breaking), "theirs": started(well)}, (single_stream(8, 4),))
    columns = run_scenario(scenario, Lab((0, 1)), MACHINE, repeats=3).columns
    assert [len(columns[name].values["decode, 1 stream"]) for name in ("ours", "theirs")] == [1, 3]
    assert "a node was lost" in columns["ours"].missing


def test_the_long_prompt_comes_once_every_stream_is_talking(tiny: BenchModel) -> None:
    seen: list[int] = []
    long_came = threading.Event()

    def events(asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
        is_long = len(asked["prompt"]) == 200
        seen.append(len(asked["prompt"]))
        if is_long:
            long_came.set()
        for number in range(asked["max_tokens"]):
            yield {"choices": [{"text": "x"}]}
            if not is_long and number == 60:
                assert long_came.wait(30)
        yield usage(asked)

    with serving(events) as server:
        found = asyncio.run(interference(200, 4).run(server, tiny.prompt_source()))
    assert seen[-1] == 200
    assert len(seen) == 5
    assert all(value > 0 for value in found.values())


def test_every_scenario_compares_what_it_measures_and_has_bars_for_what_it_reports(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("starts.swarmd_has", lambda option: True)
    for make in SCENARIOS.values():
        for scenario in make(Lab((0, 1))):
            measured = {metric.name for load in scenario.loads for metric in load.metrics}
            assert scenario.model in MODELS
            for comparison in scenario.comparisons:
                assert {comparison.subject, *comparison.baselines} <= set(scenario.contenders)
                assert {bar.metric for bar in comparison.bars} <= measured
