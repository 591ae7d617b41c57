"""Guessing with a draft model: what it feeds its engine, and that the guesses are the model's own words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.step_costs import cost_of
from support.tiny_gguf import TinyModel, Type, write_tiny_gguf

from swarmd.node.engine.sampling_params import SamplingParams
from swarmd.node.engine.stage_engine import SequenceChunk, StageEngine
from swarmd.node.models.gguf import GGUFFile
from swarmd.node.models.gguf_spec import spec_from_gguf
from swarmd.node.serving import model_drafter
from swarmd.node.serving.messages import Chunk
from swarmd.node.serving.model_drafter import ModelDrafter


def succession(tokens: Sequence[int]) -> int:
    """The draft model of these tests: it counts on."""
    return tokens[-1] + 1


@dataclass
class Drawn:
    token: int


@dataclass
class Result:
    samples: list[Drawn]


class FakeEngine:
    """Keeps the tokens of every sequence as a KV cache would, strictly; what follows is `model`'s word."""

    def __init__(self, kv_tokens: int = 1000, model: Callable[[Sequence[int]], int] = succession) -> None:
        self.kv_tokens = kv_tokens
        self.model = model
        self.cached: dict[int, list[int]] = {}
        self.computed: list[int] = []
        self.time = 0.0

    def open(self, seq: int, sampling: SamplingParams) -> None:
        assert seq not in self.cached
        assert sampling.temperature == 0
        self.cached[seq] = []

    def free(self, seq: int) -> None:
        del self.cached[seq]

    def step(self, chunks: Sequence[Chunk], hidden: None, dtype: str) -> Result:
        [chunk] = chunks
        cached = self.cached[chunk.seq]
        assert chunk.start <= len(cached)
        cached[chunk.start :] = chunk.tokens
        assert sum(-(-len(tokens) // 16) * 16 for tokens in self.cached.values()) <= self.kv_tokens
        self.computed.append(len(chunk.tokens))
        self.time += 0.002
        return Result([Drawn(self.model(cached))] if chunk.sample else [])


def drafter_of(engine: FakeEngine, max_len: int = 500) -> ModelDrafter:
    return ModelDrafter(engine, max_len, clock=lambda: engine.time)


def test_it_guesses_the_draft_models_greedy_continuation():
    engine = FakeEngine()
    drafter = drafter_of(engine)
    guesses = drafter.propose(1, [5, 6, 7], 8)
    assert guesses == [8, 9, 10, 11, 12, 13, 14, 15][: len(guesses)]
    assert len(guesses) >= 2
    assert engine.computed == [3] + [1] * (len(guesses) - 1)


def test_right_guesses_are_not_computed_again():
    engine = FakeEngine()
    drafter = drafter_of(engine)
    tokens = [5, 6, 7]
    guesses = drafter.propose(1, tokens, 2)
    tokens += [*guesses, 10]
    drafter.observe(1, len(guesses), len(guesses))
    engine.computed.clear()
    again = drafter.propose(1, tokens, 2)
    assert again == [11, 12]
    assert engine.computed == [2, 1], "the last guess was never fed, and the token after it is new"
    assert engine.cached[1] == [5, 6, 7, 8, 9, 10, 11]


def test_wrong_guesses_are_taken_back():
    engine = FakeEngine()
    drafter = drafter_of(engine)
    tokens = [5, 6, 7]
    guesses = drafter.propose(1, tokens, 4)
    drafter.observe(1, len(guesses), 1)
    tokens += [8, 50]
    assert drafter.propose(1, tokens, 1) == [51]
    assert engine.cached[1] == [5, 6, 7, 8, 50]


def test_the_same_tokens_again_are_guessed_for_again():
    """A sequence that was put back and began anew."""
    drafter = drafter_of(FakeEngine())
    assert drafter.propose(1, [5, 6, 7], 1) == drafter.propose(1, [5, 6, 7], 1) == [8]
    assert drafter.propose(1, [5, 6], 1) == [7]


def test_a_long_text_is_read_in_portions(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(model_drafter, "TOKENS_PER_CALL", 10)
    engine = FakeEngine()
    drafter = drafter_of(engine)
    text = list(range(25))
    assert [drafter.propose(1, text, 1) for _ in range(3)] == [[], [], [25]]
    assert engine.computed == [10, 10, 5]


def test_who_was_guessed_for_least_recently_makes_room():
    engine = FakeEngine(kv_tokens=32)
    drafter = drafter_of(engine)
    for seq in (1, 2, 1, 3):
        assert drafter.propose(seq, list(range(10)), 2) == [10, 11]
    assert sorted(engine.cached) == [1, 3]
    assert drafter.propose(2, list(range(10)), 1) == [10], "it comes back by reading its text again"


def test_a_sequence_longer_than_the_draft_model_can_take_gets_no_guesses():
    engine = FakeEngine(kv_tokens=47)
    assert drafter_of(engine).propose(1, list(range(32)), 4) == [], "KV goes in whole blocks"
    assert drafter_of(engine, max_len=12).propose(1, list(range(12)), 4) == []
    assert drafter_of(engine, max_len=12).propose(1, list(range(11)), 4) == [11]


def test_an_ended_sequence_frees_its_kv():
    engine = FakeEngine()
    drafter = drafter_of(engine)
    drafter.propose(1, [1, 2], 4)
    drafter.forget(1)
    drafter.forget(2)
    assert engine.cached == {}


def test_a_bad_draft_model_is_soon_asked_rarely():
    engine = FakeEngine()
    drafter = drafter_of(engine)
    tokens, made = [5], 0
    for _ in range(96):
        guesses = drafter.propose(1, tokens, 8)
        drafter.observe(1, len(guesses), 0)
        made += len(guesses)
        tokens.append(0)
    assert made < 12


def test_what_making_a_guess_costs_is_part_of_its_price():
    """The draft model takes 2 ms a token: nothing beside a step of 200 ms, too much beside one of 2 ms."""

    def guesses(step_us: float) -> int:
        drafter = drafter_of(FakeEngine())
        tokens, made = [1], 0
        for _ in range(20):
            drafter.price(cost_of(0.05, step_us))
            guessed = drafter.propose(1, tokens, 8)
            drafter.observe(1, len(guessed), len(guessed))
            tokens += [*guessed, tokens[-1] + len(guessed) + 1]
            made += len(guessed)
        return made

    assert guesses(200_000) > 100
    assert guesses(2000) < 10


def test_a_draft_model_that_fails_is_given_up_and_says_so(caplog: pytest.LogCaptureFixture):
    def broken(tokens: Sequence[int]) -> int:
        raise RuntimeError("the outputs are not finite")

    engine = FakeEngine(model=broken)
    drafter = drafter_of(engine)
    assert [drafter.propose(1, [1, 2], 4) for _ in range(3)] == [[], [], []]
    assert engine.computed == [2]
    [record] = caplog.records
    assert "draft model failed" in record.message


def test_a_real_engine_guesses_what_it_would_generate(tmp_path: Path):
    """Through right guesses, wrong ones and a long prompt: after each, the greedy continuation of the text."""
    path = write_tiny_gguf(tmp_path / "draft.gguf", TinyModel(n_layers=2, type=Type.Q8_0))
    with GGUFFile.open(path) as file:
        spec = spec_from_gguf(file.metadata, file.tensors)

    def load() -> StageEngine:
        return StageEngine.load(path, spec, 0, spec.n_layers, threads=1, kv_tokens=400)

    oracle = load()

    def continued(tokens: list[int], count: int) -> list[int]:
        text = list(tokens)
        oracle.open(1, SamplingParams(temperature=0))
        missing = text
        for _ in range(count):
            chunk = SequenceChunk(1, len(text) - len(missing), tuple(missing), sample=True)
            missing = [oracle.step([chunk], None, "f32").samples[0].token]
            text = text + missing
        oracle.free(1)
        return text[len(tokens) :]

    drafter = ModelDrafter(load(), 400)
    drafter.price(cost_of(0.01, 1e9))
    tokens = [20 + place % 200 for place in range(300)]
    assert drafter.propose(1, tokens, 4) == []
    for right in (0, 3, 1, 2):
        guesses = drafter.propose(1, tokens, 4)
        assert len(guesses) == 4
        assert guesses == continued(tokens, 4)
        drafter.observe(1, 4, 4)
        tokens += [*guesses[:right], 7]
