"""StageEngine: any split, any batching, the same results; and a state that errors leave as it was."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from support.kernels import why_missing
from support.tiny_gguf import TinyModel, Type, write_tiny_gguf

from swarmd.node.engine.sampling_params import NO_TOKEN, NOT_YET, SamplingParams
from swarmd.node.engine.stage_engine import Kernels, KvExhausted, Sample, SequenceChunk, StageEngine, StepError
from swarmd.node.engine.wire import WireDtype
from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.gguf import GGUFFile
from swarmd.node.models.gguf_spec import spec_from_gguf
from swarmd.node.models.tokenizer import Tokenizer

GREEDY = SamplingParams(temperature=0, top_logprobs=3)
MODEL = TinyModel(type=Type.Q4_1, types={"token_embd": Type.Q8_0}, context_length=96)


CHOSEN: dict[str, Kernels] = {}


def plain(samples: Sequence[Sample]) -> list[tuple[int, int, int, float]]:
    """What must be equal in every arithmetic: torch's attention rounds by the shape of a step, ours does not."""
    digits = 3 if CHOSEN["kernels"] == "torch" else 12
    return [(s.seq, s.position, s.token, round(s.logprob, digits)) for s in samples]


@pytest.fixture(autouse=True, params=["native", "torch"])
def kernels(request: pytest.FixtureRequest) -> None:
    """Every promise of this file is kept by both: our own kernels, and plain torch."""
    if request.param == "native" and (why := why_missing()):
        pytest.skip(why)
    CHOSEN["kernels"] = request.param


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("engine") / "tiny.gguf", MODEL)


def load(path: Path, start: int = 0, end: int = MODEL.n_layers, *, kv_tokens: int = 400, **options: Any) -> StageEngine:
    with GGUFFile.open(path) as file:
        spec = spec_from_gguf(file.metadata, file.tensors)
    return StageEngine.load(path, spec, start, end, threads=1, kv_tokens=kv_tokens, **CHOSEN, **options)


class Pipeline:
    """The stages of one model, one after another."""

    def __init__(self, path: Path, *cuts: int, dtype: WireDtype = "f32") -> None:
        edges = [0, *cuts, MODEL.n_layers]
        self.stages = [load(path, start, end) for start, end in pairwise(edges)]
        self.dtype: WireDtype = dtype

    def open(self, seq: int, sampling: SamplingParams = GREEDY) -> None:
        for stage in self.stages:
            stage.open(seq, sampling)

    def free(self, seq: int) -> None:
        for stage in self.stages:
            stage.free(seq)

    def step(self, *chunks: SequenceChunk) -> tuple[Sample, ...]:
        result = self.stages[0].step(chunks, None, self.dtype)
        for stage in self.stages[1:]:
            result = stage.step(chunks, result.payload, self.dtype)
        return result.samples

    def generate(self, seq: int, prompt: Sequence[int], count: int, sampling: SamplingParams = GREEDY) -> list[Sample]:
        self.open(seq, sampling)
        samples = [*self.step(SequenceChunk(seq, 0, tuple(prompt), sample=True))]
        while len(samples) < count:
            samples += self.step(SequenceChunk(seq, samples[-1].position, (samples[-1].token,), sample=True))
        self.free(seq)
        return samples


def test_every_split_gives_the_same_samples(path: Path) -> None:
    whole = Pipeline(path).generate(1, range(10, 30), 12)
    for cuts in ((1,), (2,), (3,), (1, 2, 3)):
        assert Pipeline(path, *cuts).generate(1, range(10, 30), 12) == whole


def test_seeded_sampling_is_the_same_for_every_split(path: Path) -> None:
    params = SamplingParams(temperature=0.9, top_p=0.95, seed=5, repetition_penalty=1.1, prompt_tokens=20)
    whole = Pipeline(path).generate(1, range(10, 30), 12, params)
    assert Pipeline(path, 2).generate(9, range(10, 30), 12, params) == [
        Sample(9, s.position, s.token, s.logprob, s.top) for s in whole
    ]
    assert len({s.token for s in whole}) > 4


def test_the_wire_in_bf16_halves_the_payload_and_stays_near(path: Path) -> None:
    chunk = [SequenceChunk(1, 0, tuple(range(10, 20)))]
    payloads = {}
    for dtype in ("f32", "bf16"):
        stage = load(path, 0, 2)
        stage.open(1, GREEDY)
        payload = stage.step(chunk, None, dtype).payload
        assert payload is not None
        payloads[dtype] = payload
    assert payloads["f32"].nbytes == 2 * payloads["bf16"].nbytes == 10 * MODEL.hidden_size * 4
    full = torch.frombuffer(payloads["f32"], dtype=torch.float32)
    assert torch.equal(torch.frombuffer(payloads["bf16"], dtype=torch.bfloat16), full.bfloat16())
    # The stage behind takes it: its first choice has about the same probability.
    exact = Pipeline(path, 2).generate(1, range(10, 30), 1)[0]
    rounded = Pipeline(path, 2, dtype="bf16").generate(1, range(10, 30), 1)[0]
    assert dict(exact.top).keys() & dict(rounded.top).keys()
    assert rounded.logprob == pytest.approx(exact.logprob, abs=0.5)


def test_ragged_batches_equal_solo_bit_for_bit(path: Path) -> None:
    """Three sequences in shared steps, prefill chunks beside decode, against each of them alone in the same chunks."""
    prompts = {1: list(range(5, 25)), 2: list(range(40, 47)), 3: list(range(100, 133))}
    schedule = [{1: 20, 2: 3}, {1: 1, 2: 4}, {3: 16, 2: 1, 1: 1}, {2: 1, 3: 17, 1: 1}, {3: 1, 1: 1, 2: 1}]

    def run(sequences: tuple[int, ...]) -> dict[int, list[Sample]]:
        pipeline = Pipeline(path, 2)
        tokens = {seq: list(prompts[seq]) for seq in sequences}
        done = dict.fromkeys(sequences, 0)
        out: dict[int, list[Sample]] = {seq: [] for seq in sequences}
        for seq in sequences:
            pipeline.open(seq)
        for counts in schedule:
            chunks = []
            for seq, count in counts.items():
                if seq in tokens:
                    part = tuple(tokens[seq][done[seq] : done[seq] + count])
                    chunks.append(SequenceChunk(seq, done[seq], part, done[seq] + count >= len(prompts[seq])))
                    done[seq] += count
            for sample in pipeline.step(*chunks):
                out[sample.seq].append(sample)
                tokens[sample.seq].append(sample.token)
        return out

    together = run((1, 2, 3))
    assert [len(samples) for samples in together.values()] == [5, 4, 2]
    for seq in prompts:
        assert run((seq,))[seq] == together[seq]


CHOOSY = SamplingParams(temperature=0.8, top_p=0.95, seed=5, repetition_penalty=1.2, prompt_tokens=10)

SCHEMA = '{"type": "object", "properties": {"a": {"type": "string", "minLength": 30}}, "required": ["a"]}'
HELD = SamplingParams(temperature=0.9, seed=6, json_schema=SCHEMA, prompt_tokens=10)


@pytest.mark.parametrize("sampling", [GREEDY, CHOOSY, HELD], ids=["greedy", "sampled with penalties", "held to JSON"])
@pytest.mark.parametrize("right", [0, 1, 3])
def test_drafts_change_nothing_but_the_number_of_steps(path: Path, sampling: SamplingParams, right: int) -> None:
    """Three drafts per step, the first `right` of them true: those and one more token come at once, the rest goes."""
    prompt, straight = range(10, 20), Pipeline(path, 2).generate(1, range(10, 20), 12, sampling)
    tokens = [*prompt, *(sample.token for sample in straight)]
    pipeline = Pipeline(path, 2)
    pipeline.open(1, sampling)
    samples = [*pipeline.step(SequenceChunk(1, 0, tuple(prompt), sample=1))]
    while len(samples) < 8:
        end = samples[-1].position
        drafts = [t if i < right else (t + 1) % MODEL.vocab_size for i, t in enumerate(tokens[end + 1 : end + 4])]
        came = pipeline.step(SequenceChunk(1, end, (samples[-1].token, *drafts), sample=4))
        assert len(came) == right + 1
        samples += came
    assert plain(samples) == plain(straight[: len(samples)])


@pytest.mark.parametrize("schema", ['{"type": "objec"}', '{"type": "object", "minProperties": 9}'])
def test_an_answer_that_cannot_go_on_under_its_schema_gets_no_token_and_disturbs_nobody(
    path: Path, schema: str
) -> None:
    engine = load(path, kv_tokens=4000)
    straight = Pipeline(path).generate(1, range(10, 20), 1)
    engine.open(1, GREEDY)
    # What follows a prompt that is counted as its answer never fits.
    engine.open(2, SamplingParams(json_schema=schema, prompt_tokens=9))
    chunks = [SequenceChunk(seq, 0, tuple(range(10, 20)), True) for seq in (1, 2)]
    one, other = engine.step(chunks, None, "f32").samples
    assert (one.token, other.token) == (straight[0].token, NO_TOKEN)
    engine.free(2)
    assert engine.held == (1, 10)


def test_nobody_waits_until_the_tokenizer_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = Pipeline(path).generate(1, range(10, 20), 2, HELD)
    others = Pipeline(path).generate(1, range(10, 20), 2)
    read, of_model = threading.Event(), Tokenizer.of_model

    def slow(where: Path) -> Tokenizer:
        assert read.wait(20)
        return of_model(where)

    monkeypatch.setattr(Tokenizer, "of_model", slow)
    engine = load(path, defer=True)
    for seq, sampling in ((1, HELD), (2, GREEDY)):
        engine.open(seq, sampling)
    chunks = [SequenceChunk(seq, 0, tuple(range(10, 20)), True) for seq in (1, 2)]
    held, other = engine.step(chunks, None, "f32").samples
    assert (held.token, other.token) == (NOT_YET, others[0].token)
    read.set()
    again, deadline = SequenceChunk(1, 9, (19,), True), time.monotonic() + 20
    while held.token == NOT_YET and time.monotonic() < deadline:
        [held] = engine.step([again], None, "f32").samples
    assert held.token == straight[0].token
    [held] = engine.step([SequenceChunk(1, 10, (held.token,), True)], None, "f32").samples
    assert held.token == straight[1].token


def test_constraints_that_nobody_used_for_long_are_made_anew(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = Pipeline(path).generate(1, range(10, 20), 8, HELD)
    monkeypatch.setattr("swarmd.node.engine.sampler.MOST_CONSTRAINTS", 1)
    engine = load(path)
    tokens = {seq: list(range(10, 20)) for seq in (1, 2, 3)}
    for seq in tokens:
        engine.open(seq, HELD)
    for number in range(8):
        for seq, so_far in tokens.items():
            start = 0 if number == 0 else len(so_far) - 1
            [sample] = engine.step([SequenceChunk(seq, start, tuple(so_far[start:]), True)], None, "f32").samples
            so_far.append(sample.token)
    assert [so_far[10:] for so_far in tokens.values()] == [[sample.token for sample in straight]] * 3


def test_a_chunk_replaces_what_stands_behind_its_beginning(path: Path) -> None:
    straight = Pipeline(path, 2).generate(1, range(10, 30), 4)
    pipeline = Pipeline(path, 2)
    pipeline.open(1)
    pipeline.step(SequenceChunk(1, 0, (*range(10, 27), 3, 4, 5, 6)))
    assert plain(pipeline.step(SequenceChunk(1, 17, (27, 28, 29), sample=1))) == plain(straight[:1])
    assert [stage.length(1) for stage in pipeline.stages] == [20, 20]


@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 33])
def test_a_fork_goes_on_as_if_it_had_computed_its_prefix(path: Path, length: int) -> None:
    """Source, fork and a fork of the fork write behind a prefix that they share; none sees what another wrote."""
    prefix = tuple(range(10, 10 + length))
    tails = {1: (3, 4, 5), 2: (70, 71), 3: (90,)}
    alone = {}
    for seq, tail in tails.items():
        pipeline = Pipeline(path, 2)
        pipeline.open(seq)
        alone[seq] = pipeline.step(SequenceChunk(seq, 0, (*prefix, *tail), sample=1))
    pipeline = Pipeline(path, 2)
    pipeline.open(1)
    pipeline.step(SequenceChunk(1, 0, prefix))
    for seq in (2, 3):
        for stage in pipeline.stages:
            stage.open(seq, GREEDY, source=seq - 1, length=length)
    together = pipeline.step(*(SequenceChunk(seq, length, tail, sample=1) for seq, tail in tails.items()))
    assert plain(together) == [each for samples in alone.values() for each in plain(samples)]
    pipeline.free(1)
    again = pipeline.step(SequenceChunk(2, length, tails[2], sample=1))
    assert plain(again) == plain(alone[2]), "the source is gone, what it shared is not"


def test_truncate_and_go_on(path: Path) -> None:
    straight = Pipeline(path, 2).generate(1, range(10, 20), 6)
    pipeline = Pipeline(path, 2)
    pipeline.open(1)
    pipeline.step(SequenceChunk(1, 0, tuple(range(10, 20))))
    pipeline.step(SequenceChunk(1, 10, (3, 4, 5)))
    for stage in pipeline.stages:
        stage.truncate(1, 9)
        assert stage.length(1) == 9
    sample = pipeline.step(SequenceChunk(1, 9, (19,), sample=True))[0]
    assert (sample.token, sample.position) == (straight[0].token, 10)
    assert sample.logprob == pytest.approx(straight[0].logprob, abs=1e-4)


def test_truncation_also_forgets_for_the_penalties(path: Path) -> None:
    engine = load(path)
    logprobs = []
    for detour in (False, True):
        engine.open(1, SamplingParams(temperature=0, repetition_penalty=5.0))
        engine.step([SequenceChunk(1, 0, (10, 11, 12))], None, "f32")
        best = engine.step([SequenceChunk(1, 3, (13,), True)], None, "f32").samples[0]
        if detour:
            engine.step([SequenceChunk(1, 4, (best.token,))], None, "f32")
            engine.truncate(1, 4)
        engine.truncate(1, 3)
        logprobs.append(engine.step([SequenceChunk(1, 3, (13,), True)], None, "f32").samples[0])
        engine.free(1)
    assert logprobs[0] == logprobs[1]


def test_errors_change_nothing(path: Path) -> None:
    engine = load(path, kv_tokens=32)
    engine.open(1, GREEDY)
    engine.open(2, GREEDY)
    engine.step([SequenceChunk(1, 0, tuple(range(10, 30)))], None, "f32")
    bad: list[tuple[list[SequenceChunk], str]] = [
        ([SequenceChunk(1, -1, (1,))], "does not fit"),
        ([SequenceChunk(1, 20, (1,), 2)], "2 samples"),
        ([SequenceChunk(1, 21, (1,))], "does not fit"),
        ([SequenceChunk(1, 20, ())], "0 tokens"),
        ([SequenceChunk(1, 20, (MODEL.vocab_size,))], "outside the vocabulary"),
        ([SequenceChunk(1, 20, (-1,))], "outside the vocabulary"),
        ([SequenceChunk(2, 0, tuple(range(97)))], "context of 96"),
        ([SequenceChunk(2, 0, (1,)), SequenceChunk(2, 0, (1,))], "twice"),
        ([SequenceChunk(7, 0, (1,))], "not open"),
    ]
    for chunks, says in bad:
        with pytest.raises(StepError, match=says):
            engine.step(chunks, None, "f32")
    with pytest.raises(StepError, match="'f8'"):
        engine.step([SequenceChunk(2, 0, (1,))], None, cast(Any, "f8"))
    with pytest.raises(KvExhausted, match="needed and the stage has"):
        engine.step([SequenceChunk(1, 20, (1,)), SequenceChunk(2, 0, tuple(range(12)))], None, "f32")
    assert (engine.length(1), engine.length(2)) == (20, 0)
    assert engine.step([SequenceChunk(1, 20, (30,), 1)], None, "f32").samples
    with pytest.raises(StepError, match="open already"):
        engine.open(1, GREEDY)
    with pytest.raises(StepError, match="cannot be copied"):
        engine.open(4, GREEDY, source=1, length=22)
    with pytest.raises(StepError, match="not open"):
        engine.open(4, GREEDY, source=9, length=1)
    with pytest.raises(StepError, match="logit_bias"):
        engine.open(3, SamplingParams(logit_bias={MODEL.vocab_size: 1.0}))


@pytest.mark.parametrize("hidden", [None, b"", b"\0" * 100, b"\0" * (4 * MODEL.hidden_size + 4)])
def test_hidden_states_of_the_wrong_size_are_refused(path: Path, hidden: bytes | None) -> None:
    stage = load(path, 2, 4)
    stage.open(1, GREEDY)
    with pytest.raises(StepError, match=f"{4 * MODEL.hidden_size} are needed"):
        stage.step([SequenceChunk(1, 0, (1,))], hidden, "f32")


def test_hidden_states_that_are_not_finite_end_in_an_error(path: Path) -> None:
    stage = load(path, 2, 4)
    stage.open(1, GREEDY)
    hidden = torch.full((MODEL.hidden_size,), float("nan")).numpy().tobytes()
    with pytest.raises(StepError, match="not finite"):
        stage.step([SequenceChunk(1, 0, (1,), True)], hidden, "f32")
    assert stage.length(1) == 0


def test_a_step_without_chunks(path: Path) -> None:
    first, last = load(path, 0, 2), load(path, 2, 4)
    payload = first.step([], None, "f32").payload
    assert payload is not None
    assert payload.nbytes == 0
    assert last.step([], payload, "f32").samples == ()


def test_the_callers_buffer_is_left_alone(path: Path) -> None:
    first, last = load(path, 0, 2), load(path, 2, 4)
    chunks = [SequenceChunk(1, 0, (1, 2, 3), True)]
    for stage in (first, last):
        stage.open(1, GREEDY)
    payload = first.step(chunks, None, "f32").payload
    assert payload is not None
    received = bytearray(payload)
    last.step(chunks, received, "f32")
    assert received == payload


def test_progress_ends_at_the_bytes_of_the_stages_tensors(path: Path) -> None:
    seen: list[tuple[int, int]] = []
    load(path, 0, 1, progress=lambda done, total: seen.append((done, total)))
    with GGUFFile.open(path) as file:
        total = sum(i.nbytes for name, i in file.tensors.items() if name.startswith(("blk.0.", "token_embd")))
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


def test_a_stage_loads_from_a_file_that_holds_only_its_own_bytes(path: Path, tmp_path: Path) -> None:
    with GGUFFile.open(path) as file:
        wanted = [i for name, i in file.tensors.items() if name.startswith(("blk.2.", "blk.3.", "token", "output"))]
        header = file.header_bytes
    content = path.read_bytes()
    partial = tmp_path / "partial.gguf"
    with partial.open("wb") as out:
        out.write(content[:header])
        for info in wanted:
            out.seek(info.offset)
            out.write(content[info.offset : info.offset + info.nbytes])
        out.truncate(len(content))
    hidden = torch.linspace(-1, 1, MODEL.hidden_size).numpy().tobytes()
    samples = []
    for source in (path, partial):
        stage = load(source, 2, 4, sparse=True)
        stage.open(1, GREEDY)
        samples.append(stage.step([SequenceChunk(1, 0, (1,), True)], hidden, "f32").samples)
    assert samples[0] == samples[1]


def test_a_truncated_file_is_refused(path: Path, tmp_path: Path) -> None:
    with GGUFFile.open(path) as file:
        spec = spec_from_gguf(file.metadata, file.tensors)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ModelFileError, match="truncated"):
        StageEngine.load(cut, spec, 0, 1, threads=1, kv_tokens=8)
