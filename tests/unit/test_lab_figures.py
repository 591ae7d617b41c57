"""The pure parts of the lab: what its tables say follows from the measured values and from nothing else."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
from figures import Bar, Metric, markdown_table, percentile, ratio
from hypothesis import given
from hypothesis import strategies as st
from load import PromptSource, Server, Trace, request_body, whole_run_rate
from machine import Machine
from measure import gaps_between
from processes import Place
from relay import Line
from report import bandwidth_limit
from support.tiny_gguf import TinyModel, write_tiny_gguf
from synthetic_model import Shape, write_model
from workloads import BenchModel, decode_bytes

SPEED = Metric("decode", "tok/s", higher_is_better=True)
TIME = Metric("TTFT", "s", higher_is_better=False)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.floats(0, 1))
def test_a_percentile_is_the_smallest_value_that_enough_others_do_not_exceed(values: list[float], share: float) -> None:
    found = percentile(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values) * (1 - 1e-12)
    assert all(sum(other <= value for other in values) < share * len(values) for value in values if value < found)


def test_p99_of_eight_values_is_the_largest() -> None:
    assert percentile([3, 8, 1, 7, 2, 6, 4, 5], 0.99) == 8


@pytest.mark.parametrize(("values", "share"), [([], 0.5), ([1.0], 1.1), ([1.0], -0.1)])
def test_a_percentile_that_makes_no_sense_is_refused(values: list[float], share: float) -> None:
    with pytest.raises(ValueError):
        percentile(values, share)


def test_a_cell_shows_the_median_and_the_spread() -> None:
    assert SPEED.cell([45.04, 101.2, 44.0]) == "45.0 tok/s (44.0-101)"
    assert TIME.cell([0.123]) == "0.12 s (0.12-0.12)"
    assert SPEED.cell([]) == "–"


def test_the_best_baseline_is_the_fastest_or_the_shortest() -> None:
    candidates = {"a": [10.0, 30.0, 11.0], "b": [12.0, 12.0, 12.0], "absent": []}
    assert SPEED.best(candidates) == "b"
    assert TIME.best(candidates) == "a"
    assert SPEED.best({"absent": []}) is None


def test_a_bar_is_a_least_ratio_for_speeds_and_a_greatest_for_times() -> None:
    bar = Bar("decode", 2.0)
    assert bar.met(2.0, SPEED)
    assert not bar.met(1.99, SPEED)
    assert bar.met(2.0, TIME)
    assert not bar.met(2.01, TIME)
    assert (bar.show(SPEED), bar.show(TIME)) == ("≥ 2 ×", "≤ 2 ×")


def test_a_ratio_is_of_medians_and_needs_both_sides() -> None:
    assert ratio([2.0, 8.0, 4.0], [1.0, 2.0, 9.0]) == 2.0
    assert ratio([], [1.0]) is None
    assert ratio([1.0], []) is None


def test_a_table_keeps_its_shape_whatever_its_cells_hold() -> None:
    assert markdown_table(["", "a|b"], [["x", "1"]]).splitlines() == ["|  | a\\|b |", "| --- | --- |", "| x | 1 |"]
    with pytest.raises(ValueError, match="as many cells"):
        markdown_table(["one", "two"], [["only one"]])


def test_rates_count_tokens_against_the_time_that_they_took() -> None:
    first = Trace(sent=10.0, arrivals=(10.5, 11.0, 12.5), tokens=5)
    second = Trace(sent=10.2, arrivals=(11.0, 14.0), tokens=5)
    assert first.ttft == 0.5
    assert first.decode_rate == 4 / 2.0  # five tokens in three events: all but the first count
    assert whole_run_rate([first, second]) == 10 / 4.0


def test_a_stream_that_stands_still_has_the_gap_that_contains_the_window() -> None:
    stalled = Trace(0.0, (1.0, 2.0, 9.0, 9.5), 4)
    assert gaps_between([stalled], 3.0, 8.0) == [7.0]
    assert gaps_between([stalled], 0.0, 9.2) == [1.0, 7.0, 0.5]
    assert gaps_between([stalled], 0.0, 9.2, skip=1) == [7.0, 0.5]
    assert gaps_between([stalled], 10.0, 11.0) == []


def test_prompts_are_the_same_at_every_run_and_hold_no_end() -> None:
    ends = (0, 3)
    first, again = (PromptSource(6, ends, seed=7) for _ in range(2))
    prompts = first.prompts(3, 20)
    assert prompts == again.prompts(3, 20)
    assert prompts != first.prompts(3, 20)
    assert {token for prompt in prompts for token in prompt} == {1, 2, 4, 5}


def test_every_server_is_asked_for_the_same_in_its_own_words() -> None:
    ours = request_body(Server("http://here", "swarmd", "m", ends=(2, 5)), [7, 8], 16)
    theirs = request_body(Server("http://here", "llama", "m", ends=(2, 5)), [7, 8], 16)
    assert ours["logit_bias"] == {"2": -100, "5": -100}
    assert theirs["ignore_eos"]
    assert not theirs["cache_prompt"]
    shared = {"model", "prompt", "max_tokens", "temperature", "stream", "stream_options"}
    assert {key: ours[key] for key in shared} == {key: theirs[key] for key in shared}


def test_packets_leave_one_after_the_other_and_arrive_after_the_delay() -> None:
    line = Line(ports=3, delay=0.010, rate=1000.0)
    assert line.arrival(0, 1, 100, now=5.0) == pytest.approx(5.110)
    assert line.arrival(0, 2, 100, now=5.0) == pytest.approx(5.210)  # the sender's port was busy
    assert line.arrival(2, 1, 100, now=5.0) == pytest.approx(5.210)  # the receiver's port was busy
    assert line.arrival(1, 0, 100, now=5.0) == pytest.approx(5.110)  # both directions at once
    assert Line(2, 0.5, rate=0).arrival(0, 1, 10**9, now=1.0) == 1.5  # without a rate there is only the delay


def test_the_limit_is_what_the_cores_that_read_at_once_can_read() -> None:
    machine = Machine("cpu", (), 2, 1 << 30, "Linux", {}, 0.0, bandwidth=10e9, bandwidth_all=16e9)
    assert bandwidth_limit(Place((0,)), machine, 10**8) == 100
    assert bandwidth_limit(Place((0, 1), threads=2), machine, 10**8) == 160
    assert bandwidth_limit(Place(quota=0.5), machine, 10**8) == 50


def test_a_tied_embedding_is_read_for_every_token_and_another_is_not(tmp_path: Path) -> None:
    for tied in (True, False):
        model = TinyModel(tied=tied, n_layers=1)
        write_tiny_gguf(tmp_path / "model.gguf", model)
        sizes = {name: values.nbytes for name, values in model.tensors().items()}
        unread = 0 if tied else sizes["token_embd"]
        assert decode_bytes(tmp_path / "model.gguf") == sum(sizes.values()) - unread


def test_a_synthetic_model_is_the_same_every_time_and_has_a_tokenizer(tmp_path: Path) -> None:
    donor = tmp_path / "donor.gguf"
    write_tiny_gguf(donor, TinyModel(n_layers=1))
    vocabulary = BenchModel.open("donor", donor).vocabulary
    shape = Shape("tiny", 2, hidden_size=64, n_heads=4, n_kv_heads=2, ffn_size=96, vocab_size=vocabulary)
    first, again, other = (tmp_path / name for name in ("first.gguf", "again.gguf", "other.gguf"))
    write_model(first, donor, shape, seed=1)
    write_model(again, donor, shape, seed=1)
    write_model(other, donor, shape, seed=2)
    assert first.read_bytes() == again.read_bytes()
    assert first.read_bytes() != other.read_bytes()
    assert BenchModel.open("tiny", first).ends == BenchModel.open("donor", donor).ends
    reader = gguf.GGUFReader(first)
    assert {tensor.name: tuple(reversed(tensor.shape.tolist())) for tensor in reader.tensors} == dict(shape.tensors())
    assert {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) == 2} == {"Q4_0"}
