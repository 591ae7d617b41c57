"""Hidden states on the wire: what each type keeps, and that a step says which one it came in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_gguf import TinyModel, write_tiny_gguf

from swarmd.node.engine.sampling_params import SamplingParams
from swarmd.node.engine.stage_engine import SequenceChunk, StageEngine
from swarmd.node.engine.wire import WIRE_DTYPES, WireDtype, decode, encode, wire_bytes
from swarmd.node.models.checkpoint import open_checkpoint


def states(rows: int, columns: int, largest: float = 20.0, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((rows, columns)) * largest / 4
    return values.astype(np.float32)


def round_trip(x: np.ndarray, dtype: WireDtype) -> np.ndarray:
    used, data = encode(x, dtype)
    assert used == dtype
    assert data.nbytes == wire_bytes(dtype, *x.shape)
    return decode(bytes(data), used, *x.shape)


def test_f32_is_exact() -> None:
    x = states(3, 40)
    assert np.array_equal(round_trip(x, "f32"), x)


def test_bf16_rounds_as_torch_does() -> None:
    bits = np.random.default_rng(1).integers(0, 1 << 32, 4096, dtype=np.uint32).view(np.float32)
    odd = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0], np.float32)
    x = np.concatenate([bits, states(1, 4096)[0], odd])[None]
    expected = torch.from_numpy(x).bfloat16().float().numpy()
    assert np.array_equal(round_trip(x, "bf16"), expected, equal_nan=True)


def test_f16_rounds_once_within_its_range() -> None:
    x = states(4, 96, largest=60000.0)
    assert np.array_equal(round_trip(x, "f16"), x.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("huge", [65505.0, -1e6, np.inf, np.nan])
def test_what_f16_cannot_hold_travels_as_bf16(huge: float) -> None:
    x = states(2, 64)
    x[1, 5] = huge
    used, data = encode(x, "f16")
    assert used == "bf16"
    assert np.array_equal(decode(data, used, 2, 64), torch.from_numpy(x).bfloat16().float().numpy(), equal_nan=True)


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(0, 5), columns=st.integers(1, 100), seed=st.integers(0, 99), power=st.integers(-20, 30))
def test_q8_is_off_by_half_a_step_of_its_block_at_most(rows: int, columns: int, seed: int, power: int) -> None:
    x = states(rows, columns, seed=seed) * np.float32(2.0**power)
    error = np.abs(round_trip(x, "q8") - x)
    for block in range(0, columns, 32):
        part = slice(block, block + 32)
        largest = np.abs(x[:, part]).max(-1, initial=0, keepdims=True)
        assert (error[:, part] <= largest / 254 * (1 + 1e-5)).all()


@pytest.mark.parametrize("odd", [np.inf, np.nan])
def test_q8_keeps_it_visible_that_a_value_is_not_finite(odd: float) -> None:
    x = states(2, 64)
    x[0, 40] = odd
    back = round_trip(x, "q8")
    assert np.isnan(back[0, 32:]).all()
    assert np.isfinite(back[0, :32]).all()
    assert np.isfinite(back[1]).all()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("wire") / "m.gguf", TinyModel())


def pipeline_logits(path: Path, first: WireDtype, second: WireDtype) -> np.ndarray:
    """Three stages with a link type each; the logits' stand-in is the log-probability of the token drawn."""
    with open_checkpoint(path) as checkpoint:
        spec = checkpoint.spec
    cuts = [(0, 1), (1, 3), (3, 4)]
    engines = [StageEngine.load(path, spec, start, end, threads=1, kv_tokens=64) for start, end in cuts]
    found = []
    for engine in engines:
        engine.open(1, SamplingParams(temperature=0.0, seed=1, prompt_tokens=9))
    for start in range(0, 9, 3):
        chunk = SequenceChunk(1, start, tuple(range(20 + start, 23 + start)), sample=1)
        one = engines[0].step([chunk], None, "f32", first)
        two = engines[1].step([chunk], one.payload, one.dtype, second)
        assert (one.dtype, two.dtype) == (first, second)
        result = engines[2].step([chunk], two.payload, two.dtype, "f32")
        found += [(sample.token, sample.logprob) for sample in result.samples]
    return np.array(found)


@pytest.mark.parametrize("first", WIRE_DTYPES)
@pytest.mark.parametrize("second", WIRE_DTYPES)
def test_every_link_of_a_pipeline_may_have_a_type_of_its_own(model: Path, first: WireDtype, second: WireDtype) -> None:
    exact = pipeline_logits(model, "f32", "f32")
    found = pipeline_logits(model, first, second)
    allowed = {"f32": 0.0, "f16": 0.005, "bf16": 0.05, "q8": 0.05}
    assert (np.abs(found[:, 1] - exact[:, 1]) <= allowed[first] + allowed[second]).all()
