"""The native kernels hold their bounds for whatever shapes, values, block tables and cuts of a prompt come along."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.native_kernels import (
    BITS,
    DENSE,
    Form,
    Product,
    U,
    dense_weight,
    exceeds,
    machine_isas,
    product_of_codes,
    product_of_values,
    weight_of,
)
from support.native_reference import attended, signs, sixty_fourths
from support.native_stage import LayerParts, NativeStage, Part, Shape, dense

from swarmd.node.engine.block_table import BLOCK
from swarmd.node.engine.cpu import bindings as library
from swarmd.node.engine.cpu.matrices import NativeMatrix, linear
from swarmd.node.engine.quantized import FloatType

FOUND = machine_isas()
pytestmark = pytest.mark.skipif(not FOUND, reason="the native kernels are not built here (make native)")

some = settings(max_examples=60, deadline=None)


@pytest.fixture(params=FOUND or ["none"], autouse=True, scope="module")
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    best = library.isa()
    assert library.select(request.param)
    yield request.param
    library.select(best)


seeds = st.integers(0, 2**32 - 1)


scale_kinds = st.sampled_from(["f32", "f16", "bf16", "i8*f16", "u8*f16"])
forms = st.builds(
    Form,
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from([16, 32, 64, 128]),
    scale=scale_kinds,
    bias=st.just("") | scale_kinds,
    per_super=st.integers(1, 5),
    offset=st.integers(-1, 255),
    table=st.booleans(),
)


@some
@given(
    seed=seeds,
    form=forms,
    m=st.integers(1, 40),
    n=st.integers(1, 90),
    units=st.integers(1, 3),
    size=st.floats(1e-15, 1e15),
    threads=st.integers(1, 3),
)
def test_quantized_products(seed: int, form: Form, m: int, n: int, units: int, size: float, threads: int) -> None:
    rng = np.random.default_rng(seed)
    k = units * form.unit
    weight = weight_of(rng, form, n, k)
    x = (rng.normal(0, 1, (m, k)) * rng.choice([0, 1e-6, 1], (m, k)) * size).astype(np.float32)
    y = linear(NativeMatrix([weight]), x, threads)
    assert exceeds(y, product_of_codes(x, weight)) <= 1
    assert exceeds(y, product_of_values(x, weight)) <= 1
    chosen = int(rng.integers(m))
    assert (linear(NativeMatrix([weight]), x[chosen : chosen + 1]) == y[chosen]).all()


@some
@given(
    seed=seeds,
    kind=st.sampled_from(DENSE),
    m=st.integers(1, 40),
    n=st.integers(1, 90),
    k=st.integers(1, 150),
    threads=st.integers(1, 3),
)
def test_dense_products(seed: int, kind, m: int, n: int, k: int, threads: int) -> None:
    rng = np.random.default_rng(seed)
    weight, x = dense_weight(rng, kind, n, k), rng.normal(0, 1, (m, k)).astype(np.float32)
    y = linear(NativeMatrix([weight]), x, threads)
    assert exceeds(y, product_of_values(x, weight)) <= 1
    chosen = int(rng.integers(m))
    assert (linear(NativeMatrix([weight]), x[chosen : chosen + 1]) == y[chosen]).all()


@some
@given(seed=seeds, form=forms | st.sampled_from(DENSE), rows=st.integers(1, 60), units=st.integers(1, 3))
def test_packing_loses_nothing(seed: int, form: Form | FloatType, rows: int, units: int) -> None:
    rng = np.random.default_rng(seed)
    weight = (
        weight_of(rng, form, rows, units * form.unit)
        if isinstance(form, Form)
        else dense_weight(rng, form, rows, int(rng.integers(1, 100)))
    )
    assert (NativeMatrix([weight]).rows_at(range(rows)) == weight.dequantize()).all()


@st.composite
def cuts(draw: st.DrawFn) -> list[list[int]]:
    """Up to four sequences, each as the lengths of its consecutive parts (a part may be empty)."""
    steps = draw(st.integers(1, 4))
    parts = st.lists(st.integers(0, 20), min_size=steps, max_size=steps)
    return draw(st.lists(parts, min_size=1, max_size=4).filter(lambda cut: any(map(any, cut))))


@some
@given(
    seed=seeds,
    cut=cuts(),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 5),
    head_dim=st.integers(1, 40).map(lambda half: 2 * half),
    threads=st.integers(1, 3),
)
def test_attention_over_any_ragged_batches(
    seed: int, cut: list[list[int]], kv_heads: int, group: int, head_dim: int, threads: int
) -> None:
    """Sequences advance together, each by its own parts, on shuffled blocks of a pool full of what is not a number; no
    rotation, so that queries are exact. Against float64 over keys and values rounded to fp16."""
    rng = np.random.default_rng(seed)
    heads = kv_heads * group
    shape = Shape(heads * head_dim, heads, kv_heads, head_dim)
    weights = sixty_fourths(rng, shape.qkv, shape.hidden, 6 / shape.hidden**0.5)
    needed = [-(-sum(parts) // BLOCK) for parts in cut]
    blocks = iter(rng.permutation(sum(needed) + 1))
    tables = {seq: [int(next(blocks)) for _ in range(count)] for seq, count in enumerate(needed)}
    layer = LayerParts(shape, qkv=dense(weights), attention_output=dense(np.eye(shape.hidden)))
    stage = NativeStage(shape, layer, None, tables, sum(needed) + 1, threads)
    xs = [signs(rng, sum(parts), shape.hidden) for parts in cut]
    found: list[list[np.ndarray]] = [[] for _ in cut]
    for step in range(len(cut[0])):
        begins = [sum(parts[:step]) for parts in cut]
        chosen = [seq for seq in rng.permutation(len(cut)) if cut[seq][step]]
        parts = [Part(seq, begins[seq], xs[seq][begins[seq] : begins[seq] + cut[seq][step]]) for seq in chosen]
        rows = stage.step(parts) if parts else np.empty((0, shape.hidden))
        for part in parts:
            found[part.seq].append(rows[: len(part.x)])
            rows = rows[len(part.x) :]
    for seq, x in enumerate(xs):
        if len(x):
            assert exceeds(np.concatenate(found[seq]), expected_attention(shape, weights, x)) <= 1


def expected_attention(shape: Shape, weights: np.ndarray, x: np.ndarray) -> Product:
    qkv = (x.astype(np.float64) @ weights.astype(np.float64).T).reshape(len(x), -1, shape.head_dim)
    cached = qkv[:, shape.heads :].astype(np.float16).reshape(len(x), 2, shape.kv_heads, shape.head_dim)
    value, bound = (np.empty((len(x), shape.heads, shape.head_dim)) for _ in range(2))
    for row in range(len(x)):
        for head in range(shape.heads):
            kv = head // (shape.heads // shape.kv_heads)
            query = Product(qkv[row, head], np.zeros(shape.head_dim))
            one = attended(query, cached[: row + 1, 0, kv], cached[: row + 1, 1, kv])
            value[row, head], bound[row, head] = one.value, one.bound
    flat = value.reshape(len(x), -1)
    return Product(x + flat, bound.reshape(len(x), -1) + U * (np.abs(flat) + 1))
