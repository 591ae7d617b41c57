"""MLX against plain torch, operation by operation, and every form of weights against float64 and to the last bit."""

from __future__ import annotations

import resource
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support.mlx_device import MLX_DEVICE
from support.weight_forms import FORMS

LIMIT_BEFORE = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
mx = pytest.importorskip("mlx.core", reason="MLX is not installed (pip install 'swarmd[mlx]')")

from swarmd.node.engine.backends.base import AttentionShape, Backend, CachingBackend, RowSpan  # noqa: E402
from swarmd.node.engine.backends.mlx import MlxBackend  # noqa: E402
from swarmd.node.engine.backends.mlx_experts import SeparateExperts, StackedExperts  # noqa: E402
from swarmd.node.engine.backends.torch_cpu import TorchCpuBackend  # noqa: E402
from swarmd.node.engine.kv_cache import KvCache  # noqa: E402
from swarmd.node.engine.quantized import Weight  # noqa: E402
from swarmd.node.engine.spec import CacheShape, MoeSpec  # noqa: E402
from swarmd.node.engine.weights import AttentionWeights, Linear, MlpWeights, MoeWeights  # noqa: E402

TORCH: CachingBackend = TorchCpuBackend()
MLX = MlxBackend(MLX_DEVICE)
BOTH = (TORCH, MLX)
RELATIVE = 2e-6
"""Of the largest output: some roundings of fp32 in another order."""


def values(*shape: int, seed: int = 0, size: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * size).astype(np.float32)


def given(backend: Backend, x: np.ndarray) -> Any:
    return backend.receive(x.tobytes(), "f32", *x.shape)


def taken(backend: Backend, x: object) -> np.ndarray:
    return np.frombuffer(backend.send(x, "f32"), np.float32)


def assert_equal_on_both(operation: object, *, relative: float = RELATIVE) -> None:
    """`operation(backend)` gives the same on both."""
    assert callable(operation)
    expected, got = (taken(backend, operation(backend)) for backend in BOTH)
    assert np.abs(expected).max() > 1e-3, "the example must say something"
    np.testing.assert_allclose(got, expected, rtol=0, atol=relative * np.abs(expected).max())


def weight(form: str, rows: int, columns: int, seed: int = 0) -> Weight:
    return FORMS[form](rows, columns, np.random.default_rng(seed))


@pytest.mark.parametrize("form", FORMS)
def test_linear_against_float64(form: str):
    parts = [weight(form, 40, 256), weight(form, 24, 256, seed=1)]
    prepared = MLX.prepare(parts)
    assert len(prepared.parts) == 1
    exact = np.concatenate([part.dequantize() for part in parts]).astype(np.float64)
    for rows in (1, 7):
        x = values(rows, 256, seed=2)
        got = taken(MLX, MLX.linear(given(MLX, x), prepared)).reshape(rows, 64)
        # Half a rounding per term and sum, as for any order of 256 fp32 products; a group's bias comes on top.
        bound = 4 * 2**-24 * np.sqrt(256) * (np.abs(x).astype(np.float64) @ _sizes(parts).T)
        assert (np.abs(got - x.astype(np.float64) @ exact.T) <= bound).all()


def _sizes(parts: list[Weight]) -> np.ndarray:
    """How large the terms of a weight are: |level*scale| + |bias|."""
    sizes = []
    for part in parts:
        size = np.abs(part.dequantize()).astype(np.float64)
        if not hasattr(part, "levels"):
            sizes.append(size)
            continue
        bias = np.repeat(np.abs(part.expanded_bias()), part.group_size, axis=1)  # pyright: ignore
        sizes.append(size + 2 * bias)
    return np.concatenate(sizes)


@pytest.mark.parametrize("form", FORMS)
def test_embed_gives_exact_rows_and_a_unit_vector_exact_columns(form: str):
    table = weight(form, 50, 256)
    prepared, rows = MLX.prepare([table]), [49, 0, 5, 5, 31]
    exact = table.dequantize()
    assert np.array_equal(taken(MLX, MLX.embed(prepared, rows)).reshape(5, 256), exact[rows])
    product = taken(MLX, MLX.linear(given(MLX, np.eye(256, dtype=np.float32)), prepared)).reshape(256, 50)
    assert np.array_equal(product.T, exact)


@pytest.mark.parametrize(
    ("form", "bits_per_weight"),
    [("Q4_1", 6), ("Q4_K", 6), ("Q6_K", 10), ("Q2_K", 6), ("IQ4_NL", 10), ("MXFP4", 4.25), ("Q8_0", 10), ("BF16", 16)],
)
def test_the_memory_that_weights_take(form: str, bits_per_weight: float):
    assert MLX.prepare([weight(form, 64, 256)]).nbytes * 8 == bits_per_weight * 64 * 256


def test_bf16_scales_stay_bf16_where_the_working_type_is():
    table = weight("MLX 4 bits, groups of 64", 64, 256)
    assert MlxBackend(MLX_DEVICE, "bf16").prepare([table]).nbytes * 8 == 4.5 * 64 * 256
    assert MLX.prepare([table]).nbytes * 8 == 5 * 64 * 256


def test_parts_of_different_forms_can_be_stacked():
    parts = [weight("Q4_K", 32, 256), weight("Q6_K", 16, 256), weight("F16", 8, 256), weight("F16", 8, 256, seed=3)]
    prepared = MLX.prepare(parts)
    assert [part.rows for part in prepared.parts] == [32, 16, 16]
    exact = np.concatenate([part.dequantize() for part in parts])
    rows = [63, 40, 0, 33, 31, 47, 48]
    assert np.array_equal(taken(MLX, MLX.embed(prepared, rows)).reshape(7, 256), exact[rows])
    x = values(3, 256)
    got = taken(MLX, MLX.linear(given(MLX, x), prepared)).reshape(3, 64)
    np.testing.assert_allclose(got, x.astype(np.float64) @ exact.T.astype(np.float64), rtol=0, atol=2e-5)


def test_a_large_dense_matrix_is_converted_tile_by_tile():
    columns = 4096
    table = weight("BF16", 700, columns)
    x = values(2, columns)
    assert_equal_on_both(lambda b: b.linear(given(b, x), b.prepare([table])))


@pytest.mark.parametrize(
    "name",
    ["rms_norm", "add", "add scaled", "scale", "softcap", "weigh", "silu", "gelu_tanh", "clamped_swiglu", "select"],
)
def test_operations_on_rows(name: str):
    x, y = values(5, 64, size=6), values(5, 64, seed=1)
    operations = {
        "rms_norm": lambda b: b.rms_norm(given(b, x), b.prepare_vector(y[0]), 1e-5),
        "add": lambda b: b.add(given(b, x), given(b, y), 1.0),
        "add scaled": lambda b: b.add(given(b, x), given(b, y), 0.22),
        "scale": lambda b: b.scale(given(b, x), 12.5),
        "softcap": lambda b: b.softcap(given(b, x), 5.0),
        "weigh": lambda b: b.weigh(given(b, x), given(b, y[:, :1])),
        "silu": lambda b: b.gate(given(b, x), "silu"),
        "gelu_tanh": lambda b: b.gate(given(b, x), "gelu_tanh"),
        "clamped_swiglu": lambda b: b.gate(given(b, x), "clamped_swiglu"),
        "select": lambda b: b.select(given(b, x), [4, 0, 4]),
    }
    assert_equal_on_both(operations[name])


SHAPE = AttentionShape(4, 2, 16, 0.2, None, None, 0, "none", 1e-6)
ATTENTIONS = {
    "plain": (SHAPE, False),
    "no positions": (replace(SHAPE, rope=None), False),
    "every head its own keys": (replace(SHAPE, kv_heads=4), False),
    "one key head": (replace(SHAPE, kv_heads=1), False),
    "window": (replace(SHAPE, window=5), False),
    "softcap": (replace(SHAPE, softcap=3.0), False),
    "softcap and window": (replace(SHAPE, softcap=3.0, window=3), False),
    "sinks": (SHAPE, True),
    "sinks and window": (replace(SHAPE, window=4), True),
    "sinks and softcap": (replace(SHAPE, softcap=2.0), True),
    "norm of each head": (replace(SHAPE, qk_norm="head"), False),
    "norm of all heads": (replace(SHAPE, qk_norm="full"), False),
}


@pytest.mark.parametrize("rotated", [16, 8])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_of_two_sequences_over_several_steps(name: str, rotated: int):
    shape, sinks = ATTENTIONS[name]
    width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim

    def norms(heads: int) -> int:
        return heads * shape.head_dim if shape.qk_norm == "full" else shape.head_dim

    def steps(backend: CachingBackend) -> np.ndarray:
        cache = KvCache(backend, 1, CacheShape(shape.kv_heads, shape.head_dim, shape.head_dim), 256)
        cache.open(0)
        cache.open(1)
        none = Linear(None)
        weights = AttentionWeights(
            norm=None,
            qkv=none,
            q_norm=backend.prepare_vector(values(norms(shape.heads), seed=5)),
            k_norm=backend.prepare_vector(values(norms(shape.kv_heads), seed=6)),
            sinks=backend.prepare_vector(values(shape.heads, seed=7)) if sinks else None,
            output=none,
            post_norm=None,
        )
        frequencies = backend.prepare_vector((1 / 100 ** (np.arange(0, rotated, 2) / rotated)).astype(np.float32))
        outputs = []
        # 70 tokens outgrow the first piece of memory.
        for step, lengths in enumerate([(7, 3), (1, 1), (60, 1), (2, 4), (1, 9)]):
            ends = {seq: cache.length(seq) + count for seq, count in enumerate(lengths)}
            cache.reserve(ends)
            spans = [
                RowSpan(0, lengths[0], cache.length(0)),
                RowSpan(lengths[0], sum(lengths), cache.length(1)),
            ]
            positions = [s.start + i for s in spans for i in range(s.end - s.begin)]
            turned = None if shape.rope is None else backend.rotation(positions, frequencies, 1.25)
            qkv = given(backend, values(sum(lengths), width, seed=10 + step))
            layers = [cache.layers(seq)[0] for seq in (0, 1)]
            outputs.append(taken(backend, backend.attention(qkv, shape, weights, turned, spans, layers)))
            for seq, end in ends.items():
                cache.commit(seq, end)
        return np.concatenate(outputs)

    expected, got = steps(TORCH), steps(MLX)
    np.testing.assert_allclose(got, expected, rtol=0, atol=4e-6 * np.abs(expected).max())


MOES = {
    "softmax": MoeSpec(8, 3, 64),
    "not normalized": MoeSpec(8, 2, 64, normalize=False, scale=1.5),
    "sigmoid, groups, bias": MoeSpec(
        8, 3, 64, score="sigmoid", n_groups=4, top_groups=2, selection_bias=True, scale=2.5
    ),
    "biases": MoeSpec(8, 4, 64, expert_bias=True),
    "one": MoeSpec(8, 1, 64),
}


@pytest.mark.parametrize("form", ["F32", "BF16", "Q4_K", "Q6_K", "MXFP4", "mixed"])
@pytest.mark.parametrize("name", MOES)
def test_a_mixture_of_experts(name: str, form: str):
    moe, hidden = MOES[name], 128

    def linear(backend: Backend, seed: int, *shapes: tuple[int, int]) -> Linear:
        forms = ["Q4_K" if seed % 4 else "Q8_0"] if form == "mixed" else [form]
        parts = [weight(forms[0], *shape, seed=seed + i) for i, shape in enumerate(shapes)]
        rows = sum(part.rows for part in parts)
        bias = backend.prepare_vector(values(rows, seed=seed)) if moe.expert_bias else None
        return Linear(backend.prepare(parts), bias)

    def prepared(backend: Backend) -> object:
        return backend.prepare_experts(
            [
                MlpWeights(
                    linear(backend, 10 * e, (128, hidden), (128, hidden)), linear(backend, 10 * e + 5, (hidden, 128))
                )
                for e in range(moe.n_experts)
            ]
        )

    experts = {backend.name: prepared(backend) for backend in BOTH}
    stacked = form not in ("BF16", "mixed")
    assert isinstance(experts[MLX_DEVICE], StackedExperts if stacked else SeparateExperts)

    for rows in (1, 5, 40):  # 40 rows are sorted by expert

        def mixed(backend: Backend, rows: int = rows) -> object:
            bias = backend.prepare_vector(values(8, seed=9, size=0.3)) if moe.selection_bias else None
            weights = MoeWeights(Linear(None), bias, experts[backend.name], None, None)
            x, scores = values(rows, hidden, seed=rows), values(rows, 8, seed=rows + 1)
            return backend.mixture(given(backend, x), given(backend, scores), moe, weights, "silu")

        assert_equal_on_both(mixed, relative=5e-6)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_both_say_the_same_on_the_wire(dtype: str):
    x = values(9, 33, size=300)
    x[0, :3] = [1.00390625, 1.01171875, -0.0]  # ties go to even
    sent = [bytes(backend.send(given(backend, x), dtype)) for backend in BOTH]  # pyright: ignore
    assert sent[0] == sent[1]
    back = [taken(b, b.receive(sent[0], dtype, 9, 33)) for b in BOTH]  # pyright: ignore
    assert np.array_equal(back[0], back[1])
    assert MLX.receive(b"", dtype, 0, 33).shape == (0, 33)  # pyright: ignore


def test_angles_are_right_at_large_positions():
    position = 131_071
    frequencies = np.array([1.0, 0.123], np.float32)
    cos, sin = MLX.rotation([position], MLX.prepare_vector(frequencies), 1.0)
    angles = np.float32(position) * frequencies
    np.testing.assert_allclose(np.array(cos)[0, 0], np.cos(angles.astype(np.float64)), atol=2e-7)
    np.testing.assert_allclose(np.array(sin)[0, 0], np.sin(angles.astype(np.float64)), atol=2e-7)


def test_logits_are_on_the_host():
    x = values(3, 64)
    got = MLX.logits(given(MLX, x))
    assert got.dtype == np.float32
    assert np.array_equal(got, x)


def test_a_cache_can_be_used_by_another_thread_than_the_one_that_wrote_it():
    cache = KvCache(MLX, 1, CacheShape(2, 16, 16), 256)
    cache.open(0)
    cache.reserve({0: 5})
    layer = cache.layers(0)[0]
    layer.keys[:, :5] = mx.array(values(2, 5, 16)) + 1
    MLX.settle([layer])
    cache.commit(0, 5)
    seen: list[np.ndarray] = []

    def elsewhere() -> None:
        cache.fork(1, 0, 5)
        cache.reserve({1: 100})
        seen.append(np.array(cache.layers(1)[0].keys[:, :5]))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert np.array_equal(seen[0], values(2, 5, 16) + 1)


def test_the_limit_of_open_files_is_let_be():
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == LIMIT_BEFORE


def test_metal_is_refused_where_it_is_not():
    if mx.metal.is_available():
        pytest.skip("this machine has Metal")
    with pytest.raises(ValueError, match="Apple silicon"):
        MlxBackend("metal")
