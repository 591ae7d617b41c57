"""What the CUDA compute does around its arithmetic, on the CPU: sizes that are captured, forks, forms of weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.architectures import FOLDERS, load_torch
from support.cuda_twin import load_twin
from support.gguf_blocks import random_blocks
from support.tiny_gguf import TinyModel, Type, write_tiny_gguf
from torch.utils._python_dispatch import TorchDispatchMode

from swarmd.node.engine.backends import torch_cuda
from swarmd.node.engine.backends.torch_cuda import TorchCudaBackend, kernels_work
from swarmd.node.engine.backends.torch_experts import StackedExperts, stacked
from swarmd.node.engine.backends.torch_packed import packed
from swarmd.node.engine.computes import load_compute
from swarmd.node.engine.cuda_compute import memory_errors
from swarmd.node.engine.cuda_graphs import CudaGraphs, Function
from swarmd.node.engine.gguf_blocks import QUANTIZED_FORMS, from_gguf
from swarmd.node.engine.quantized import DenseWeight, f32_to_bf16
from swarmd.node.engine.stage_compute import KvExhausted, Span
from swarmd.node.engine.weights import Linear, MlpWeights
from swarmd.node.models.checkpoint import open_checkpoint
from swarmd.node.models.gguf_types import GGUFType

MODEL = TinyModel(type=Type.Q4_0, types={"token_embd": Type.Q8_0})


class FirstOfEachKey:
    """As a graph does: what runs for a key is what was given the first time, on the memory that it saw then."""

    def __init__(self) -> None:
        self.functions: dict[tuple[int, ...], Function] = {}

    def run(self, key: tuple[int, ...], function: Function) -> torch.Tensor:
        return self.functions.setdefault(key, function)()


class HostAsked(AssertionError):
    pass


class NoHost(TorchDispatchMode):
    """Raises HostAsked for operations that a capture would refuse: what brings values to the host or from it, and
    what has results of a size that values decide. On the CPU nothing else tells these from others."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "_unique2", "masked_select", "lift_fresh", "is_nonzero", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name == "index" and any(x is not None and x.dtype is torch.bool for x in args[1])
        if masks or name in self.FORBIDDEN:
            raise HostAsked(name)
        return func(*args, **(kwargs or {}))


class NoHostCalls:
    """Calls, and notes how often, where nothing may be asked of the host."""

    def __init__(self) -> None:
        self.calls = 0

    def run(self, key: tuple[int, ...], function: Function) -> torch.Tensor:
        self.calls += 1
        with NoHost():
            return function()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("cuda") / "m.gguf", MODEL)


def logits_of(stage: Any, spans: list[Span]) -> np.ndarray:
    rows = sum(len(span.tokens) for span in spans)
    return stage.forward(spans, None, "f32", range(rows)).logits.copy()


def test_decode_steps_are_filled_up_to_few_sizes_and_change_nothing(path: Path) -> None:
    static = FirstOfEachKey()
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
    assert list(static.functions) == [(4, 4), (4, 8)], "three sequences, of up to 48 and then up to 70 tokens"
    alone = [Span(1, lengths[1], [77])]
    assert np.allclose(logits_of(captured, alone), logits_of(plain, alone))
    assert list(static.functions)[-1] == (1, 4)


@pytest.mark.parametrize("name", ["llama 3", "gemma2", "gpt-oss", "qwen2moe", "deepseek_v2 in groups"])
def test_what_is_captured_asks_nothing_of_the_host(name: str, tmp_path: Path) -> None:
    FOLDERS[name]().save_pretrained(tmp_path)
    watched, plain = NoHostCalls(), load_twin(tmp_path, 0, 4, 100)
    first, last = (load_twin(tmp_path, *layers, 100, replays=watched) for layers in ((0, 2), (2, 4)))
    for stage in (first, last, plain):
        stage.open(1)
    for spans in [Span(1, 0, list(range(20)))], [Span(1, 20, [7])], [Span(1, 21, [8])]:
        between = first.forward(spans, None, "f32", ()).payload
        found = last.forward(spans, between, "f32", [0]).logits
        assert found is not None
        assert np.allclose(found, logits_of(plain, spans)[:1], atol=1e-4)
    assert watched.calls == 4, "two steps of one token, in two stages"


def test_the_watch_over_the_host_sees_what_it_should() -> None:
    x = torch.arange(4)
    for asks in (x.sum().item, x.nonzero, x.unique, lambda: x[x > 1], lambda: torch.tensor([1]), lambda: bool(x[0])):
        with pytest.raises(HostAsked), NoHost():
            asks()


def test_experts_of_different_forms_are_not_stacked() -> None:
    values = np.random.default_rng(0).standard_normal((3, 8, 64)).astype(np.float32)

    def experts(*kinds: str) -> StackedExperts | None:
        device = torch.device("cpu")
        dense = [
            DenseWeight(f32_to_bf16(v), "bf16") if k == "bf16" else DenseWeight(v, "f32")
            for k, v in zip(kinds, values, strict=True)
        ]
        return stacked([MlpWeights(Linear(packed([w], device)), Linear(packed([w], device))) for w in dense])

    assert experts("f32", "bf16", "f32") is None
    alike = experts("f32", "f32", "f32")
    assert alike is not None
    for expert, expected in enumerate(values):
        assert np.array_equal(alike[expert].down.matrix.rows_at(torch.arange(8)).numpy(), expected)


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


def test_running_out_of_memory_is_said_in_words() -> None:
    words = r"layers 0 to 3 do not fit on cuda:0; .*--memory.*tried to allocate"
    with pytest.raises(MemoryError, match=words), memory_errors("layers 0 to 3 do not fit on cuda:0"):
        raise torch.OutOfMemoryError("CUDA out of memory: tried to allocate 2 GiB")


def test_without_triton_products_are_dequantized_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not TorchCudaBackend(torch.device("cpu")).fused
    assert "Triton is not installed" in caplog.text
    assert "slower" in caplog.text


def test_old_gpus_are_computed_on_without_triton(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7, 5))
    assert not kernels_work(torch.device("cuda:0"))
    assert "cuda:0 has compute capability 7.5" in caplog.text


def test_steps_with_prompts_and_single_tokens_equal_those_of_each_alone(path: Path) -> None:
    together, alone = load_twin(path, 0, 4, 300), load_twin(path, 0, 4, 300)
    for stage in (together, alone):
        for seq in range(3):
            stage.open(seq)
            logits_of(stage, [Span(seq, 0, list(range(20, 31 + 9 * seq)))])
        stage.open(3)
    spans = [Span(0, 11, [7]), Span(3, 0, list(range(50, 90))), Span(1, 20, [8]), Span(2, 29, [9, 10, 11])]
    expected = np.concatenate([logits_of(alone, [span]) for span in spans])
    assert np.allclose(logits_of(together, spans), expected, atol=1e-4)


def test_prompts_are_attended_to_in_pieces(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_twin(path, 0, 4, 100)
    whole.open(1)
    span = Span(1, 0, list(range(20, 73)))
    expected = logits_of(whole, [span])
    monkeypatch.setattr(torch_cuda, "SCORES", 2000)
    pieces = load_twin(path, 0, 4, 100)
    pieces.open(1)
    assert np.allclose(logits_of(pieces, [span]), expected, atol=1e-4)


class Recorded(CudaGraphs):
    """Captures as a GPU would: what is replayed does again what was captured, into the same result."""

    def __init__(self, error: RuntimeError | None = None) -> None:
        super().__init__()
        self.error = error
        self.captures = 0

    def _capture(self, function: Function) -> Any:
        self.captures += 1
        if self.error is not None:
            raise self.error
        output = torch.zeros_like(function())
        return SimpleNamespace(output=output, graph=SimpleNamespace(replay=lambda: output.copy_(function())))


def test_each_size_is_captured_once_and_replayed() -> None:
    graphs, state = Recorded(), torch.zeros(2)
    for value in (1.0, 2.0):
        state.fill_(value)
        assert graphs.run((2, 4), lambda: state * 10).tolist() == [value * 10] * 2
    graphs.run((4, 4), lambda: state)
    assert graphs.captures == 2


def test_where_captures_are_refused_steps_are_called_and_the_log_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    graphs = Recorded(RuntimeError("operation not permitted when stream is capturing"))
    for key in ((1, 4), (2, 4), (1, 4)):
        assert graphs.run(key, lambda: torch.ones(1)).item() == 1
    assert graphs.captures == 1
    assert len(caplog.records) == 1
    assert "not permitted" in caplog.text


def test_no_memory_for_a_capture_is_no_refusal() -> None:
    graphs = Recorded(torch.OutOfMemoryError("CUDA out of memory"))
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            graphs.run((1, 4), lambda: torch.ones(1))
    assert graphs.captures == 2


@pytest.mark.slow
def test_the_default_model_says_what_it_says_to_plain_torch(smollm2_path: Path) -> None:
    oracle, exact = load_torch(smollm2_path, 0, 30, 64), load_twin(smollm2_path, 0, 30, 64)
    rounded = load_twin(smollm2_path, 0, 30, 64, kind=torch.bfloat16)
    for stage in (oracle, exact, rounded):
        stage.open(1)
    for spans in [Span(1, 0, list(range(500, 520)))], [Span(1, 20, [28])]:
        expected, found, near = (logits_of(stage, spans) for stage in (oracle, exact, rounded))
        size = expected.max() - expected.min()
        assert np.abs(found - expected).max() < 2e-5 * size
        assert np.abs(near - expected).max() < 3e-2 * size
