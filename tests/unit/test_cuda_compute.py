"""What the CUDA compute does around its arithmetic, on the CPU: sizes that are captured, forks, forms of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.cuda_twin import load_twin
from support.gguf_blocks import random_blocks
from support.tiny_gguf import TinyModel, Type, write_tiny_gguf

from swarmd.node.engine.backends.torch_packed import packed
from swarmd.node.engine.computes import load_compute
from swarmd.node.engine.cuda_graphs import Function, Tensors
from swarmd.node.engine.gguf_blocks import QUANTIZED_FORMS, from_gguf
from swarmd.node.engine.quantized import DenseWeight, f32_to_bf16
from swarmd.node.engine.stage_compute import KvExhausted, Span
from swarmd.node.models.checkpoint import open_checkpoint
from swarmd.node.models.gguf_types import GGUFType

MODEL = TinyModel(type=Type.Q4_0, types={"token_embd": Type.Q8_0})


class StaticBuffers:
    """As a graph does: the function sees only buffers of its own, one set for each size, and is made once for each."""

    def __init__(self) -> None:
        self.sizes: list[tuple[int, int]] = []
        self._buffers: dict[tuple[Any, ...], Tensors] = {}

    def run(self, function: Function, inputs: Tensors) -> torch.Tensor:
        key = tuple(tensor.shape for tensor in inputs)
        if key not in self._buffers:
            self._buffers[key] = tuple(tensor.clone() for tensor in inputs)
            self.sizes.append((len(inputs[0]), inputs[3].shape[1]))
        for static, given in zip(self._buffers[key], inputs, strict=True):
            static.copy_(given)
        return function(*self._buffers[key])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("cuda") / "m.gguf", MODEL)


def logits_of(stage: Any, spans: list[Span]) -> np.ndarray:
    rows = sum(len(span.tokens) for span in spans)
    return stage.forward(spans, None, "f32", range(rows)).logits.copy()


def test_decode_steps_are_filled_up_to_few_sizes_and_change_nothing(path: Path) -> None:
    static = StaticBuffers()
    captured, plain = load_twin(path, 0, 4, 200, replays=static), load_twin(path, 0, 4, 200)
    lengths = {}
    for seq, prompt in enumerate((5, 18, 40)):
        for stage in (captured, plain):
            stage.open(seq)
            logits_of(stage, [Span(seq, 0, list(range(20, 20 + prompt)))])
        lengths[seq] = prompt
    for step in range(30):
        spans = [Span(seq, lengths[seq], [30 + step]) for seq in lengths]
        assert np.array_equal(logits_of(captured, spans), logits_of(plain, spans))
        lengths = {seq: length + 1 for seq, length in lengths.items()}
    assert static.sizes == [(4, 4), (4, 8)], "three sequences, up to 48 and then up to 70 tokens in blocks of 16"
    alone = [Span(1, lengths[1], [77])]
    assert np.allclose(logits_of(captured, alone), logits_of(plain, alone))
    assert static.sizes[-1] == (1, 4)


def test_forks_share_what_they_have_in_common_and_no_more(path: Path) -> None:
    stage, fresh = load_twin(path, 0, 4, 200), load_twin(path, 0, 4, 200)
    stage.open(1)
    logits_of(stage, [Span(1, 0, list(range(20, 43)))])
    stage.fork(2, 1, 21)
    continued = logits_of(stage, [Span(1, 23, [7]), Span(2, 21, [9])])
    for row, (seq, tokens) in zip(continued, ((1, [*range(20, 43), 7]), (2, [*range(20, 41), 9])), strict=True):
        fresh.open(seq)
        assert np.allclose(logits_of(fresh, [Span(seq, 0, tokens)])[-1], row, atol=1e-4)


def test_a_full_cache_is_said_and_changes_nothing(path: Path) -> None:
    stage = load_twin(path, 0, 4, 8)
    stage.open(1)
    with pytest.raises(KvExhausted):
        logits_of(stage, [Span(1, 0, [5] * 200)])
    assert stage.length(1) == 0
    assert logits_of(stage, [Span(1, 0, [5])]).shape == (1, MODEL.vocab_size)


def test_products_in_bf16_stay_close(path: Path) -> None:
    exact, rounded = load_twin(path, 0, 4, 100), load_twin(path, 0, 4, 100, kind=torch.bfloat16)
    for stage in (exact, rounded):
        stage.open(1)
    spans = [Span(1, 0, list(range(20, 50)))]
    expected, found = logits_of(exact, spans), logits_of(rounded, spans)
    assert 0 < np.abs(found - expected).max() < 0.05 * (expected.max() - expected.min())


@pytest.mark.parametrize("kind", QUANTIZED_FORMS, ids=lambda kind: kind.name)
def test_values_are_those_of_the_canonical_form(kind: GGUFType) -> None:
    weight = from_gguf("w", kind, random_blocks(kind, 10, 512), (10, 512))
    matrix = packed([weight], torch.device("cpu"))
    expected = weight.dequantize()
    assert np.array_equal(matrix.parts[0].values(slice(0, None)).numpy(), expected, equal_nan=True)
    assert np.array_equal(matrix.rows_at(torch.tensor([9, 0, 3])).numpy(), expected[[9, 0, 3]], equal_nan=True)
    assert matrix.nbytes == weight.nbytes


def test_rows_of_parts_of_different_forms() -> None:
    values = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)
    parts = [DenseWeight(values, "f32"), DenseWeight(f32_to_bf16(values), "bf16")]
    found = packed(parts, torch.device("cpu")).rows_at(torch.tensor([7, 5, 0, 11]))
    expected = np.concatenate([part.dequantize() for part in parts])[[7, 5, 0, 11]]
    assert np.array_equal(found.numpy(), expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA GPU")
def test_without_a_gpu_the_error_says_what_to_do(path: Path) -> None:
    options: Any = {"kernels": "auto", "threads": 1, "kv_tokens": 64}
    with open_checkpoint(path) as checkpoint, pytest.raises(ValueError, match=r"finds no CUDA GPU.*--device cpu"):
        load_compute(checkpoint, 0, 4, device="cuda:0", **options)
