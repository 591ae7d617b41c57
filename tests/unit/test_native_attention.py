"""What a layer's attention may be asked for beyond Llama's, on every code path of this machine, against float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import pytest
from support.native_kernels import Product, U, exceeds, machine_isas
from support.native_reference import HALF, Scoring, attended, normed, rotated, signs, sixty_fourths
from support.native_stage import LayerParts, NativeStage, Part, Shape, dense, vector

from swarmd.node.engine.cpu import bindings as library
from swarmd.node.engine.spec import LayerSpec
from swarmd.node.engine.weights import Rotation

FOUND = machine_isas()
pytestmark = pytest.mark.skipif(not FOUND, reason="the native kernels are not built here (make native)")


@pytest.fixture(params=FOUND or ["none"], autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    best = library.isa()
    assert library.select(request.param)
    yield request.param
    library.select(best)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(12)


@dataclass(frozen=True)
class Asked:
    """What a layer's attention is asked for."""

    window: int | None = None
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    bias: bool = False
    pairs: int | None = None
    magnitude: float = 1.0
    sizes: tuple[int, int, int] = (4, 2, 24)


ASKED = {
    "a window of one": Asked(window=1),
    "a window within a block": Asked(window=5),
    "a window of two blocks": Asked(window=32),
    "a scale": Asked(scale=0.07),
    "a soft cap": Asked(softcap=1.5),
    "a soft cap that cuts hard": Asked(softcap=0.1, scale=1.0),
    "sinks": Asked(sinks=True),
    "a window, a soft cap and sinks": Asked(window=9, softcap=2.0, sinks=True),
    "norms of heads": Asked(qk_norm="head"),
    "norms of all heads": Asked(qk_norm="full", sizes=(3, 1, 10)),
    "biases": Asked(bias=True),
    "no rotation": Asked(pairs=0),
    "a partial rotation": Asked(pairs=5),
    "a partial rotation of whole vectors": Asked(pairs=16, sizes=(2, 2, 64)),
    "a magnitude": Asked(magnitude=1.3),
    "all of it": Asked(11, 0.2, 3.0, True, "head", True, 6, 1.2, (6, 3, 20)),
}


class TestAttention:
    """One sequence of 75 tokens in pieces of one and many rows, between another's; outputs are added to +1 and -1."""

    length = 75
    cuts = (0, 40, 41, 57, 75)

    def stage(self, rng: np.random.Generator, asked: Asked) -> NativeStage:
        heads, kv_heads, head_dim = asked.sizes
        shape = Shape(heads * head_dim, *asked.sizes)
        qkv = sixty_fourths(rng, shape.qkv, shape.hidden, 8 / shape.hidden**0.5)
        vectors: dict[str, np.ndarray] = {}
        if asked.bias:
            vectors["qkv_bias"] = sixty_fourths(rng, 1, shape.qkv)[0]
        if asked.sinks:
            vectors["sinks"] = rng.normal(1, 2, heads)
        if asked.qk_norm != "none":
            full = asked.qk_norm == "full"
            vectors["q_norm"] = rng.normal(1, 0.3, heads * head_dim if full else head_dim)
            vectors["k_norm"] = rng.normal(1, 0.3, kv_heads * head_dim if full else head_dim)
        parts = LayerParts(shape, qkv=dense(qkv), attention_output=dense(np.eye(shape.hidden)), vectors=vectors)
        pairs = head_dim // 2 if asked.pairs is None else asked.pairs
        other, own = (vector(1000.0 ** -(np.arange(n) / max(n, 1))) for n in (2, pairs))
        described = LayerSpec(window=asked.window, rope=1 if pairs else None)
        spec = {
            "attention_scale": asked.scale or 0.0,
            "attention_softcap": asked.softcap,
            "qk_norm": asked.qk_norm,
        }
        rotations = (Rotation(other, 3.0), Rotation(own, asked.magnitude))
        tables = {0: [7, 1, 4, 0, 3], 1: [5, 2, 6, 8, 9]}
        return NativeStage(shape, parts, None, tables, 10, 2, layer=described, spec=spec, rotations=rotations)

    def heads(self, stage: NativeStage, asked: Asked, x: np.ndarray) -> tuple[Product, np.ndarray]:
        """Queries and keys [rows, heads + kv heads, head_dim] as rotated; values [rows, kv heads, head_dim], exact."""
        s, parts = stage.shape, stage.parts
        assert parts is not None
        assert parts.qkv is not None
        flat = x.astype(np.float64) @ parts.qkv.dequantize().astype(np.float64).T + parts.vectors.get("qkv_bias", 0)
        qkv = flat.reshape(len(x), -1, s.head_dim)
        turned = Product(qkv[:, : s.heads + s.kv_heads], np.zeros_like(qkv[:, : s.heads + s.kv_heads]))
        if asked.qk_norm != "none":
            norms = []
            for part, name in ((qkv[:, : s.heads], "q_norm"), (qkv[:, s.heads : s.heads + s.kv_heads], "k_norm")):
                joined = part if asked.qk_norm == "head" else part.reshape(len(x), 1, -1)
                one = normed(joined, np.zeros_like(joined), vector(parts.vectors[name]).astype(np.float64), 0.0)
                norms.append(Product(one.value.reshape(part.shape), one.bound.reshape(part.shape)))
            turned = Product(np.concatenate([n.value for n in norms], 1), np.concatenate([n.bound for n in norms], 1))
        if asked.pairs != 0:
            rotation = stage.rotations[1]
            positions = np.arange(len(x))
            turned = rotated(turned.value, positions, rotation.frequencies, rotation.magnitude, turned.bound)
        return turned, qkv[:, s.heads + s.kv_heads :]

    @pytest.mark.parametrize("asked", ASKED.values(), ids=list(ASKED))
    def test_each_feature(self, rng: np.random.Generator, asked: Asked):
        stage = self.stage(rng, asked)
        s = stage.shape
        x, others = signs(rng, self.length, s.hidden), signs(rng, self.length, s.hidden)
        found = []
        for begin, end in pairwise(self.cuts):
            both = stage.step([Part(1, begin, others[begin:end]), Part(0, begin, x[begin:end])])
            found.append(both[end - begin :])
        turned, fresh = self.heads(stage, asked, x)
        keys, values = self.cached(stage)
        self.check_cache(s, turned, fresh, keys, values)
        value, bound = self.expected(stage, asked, turned, keys, values)
        assert exceeds(np.concatenate(found), Product(x + value, bound + U * (np.abs(value) + 1))) <= 1

    def cached(self, stage: NativeStage) -> tuple[np.ndarray, np.ndarray]:
        s, table = stage.shape, list(stage.tables[0])
        keys = stage.keys[:, table].transpose(1, 3, 0, 2).reshape(-1, s.kv_heads, s.head_dim)[: self.length]
        values = stage.values[:, table].transpose(1, 2, 0, 3).reshape(-1, s.kv_heads, stage.values.shape[-1])
        return keys, values[: self.length, :, : s.head_dim]

    def check_cache(self, s: Shape, turned: Product, fresh: np.ndarray, keys: np.ndarray, values: np.ndarray) -> None:
        expected = turned.value[:, s.heads :]
        bound = turned.bound[:, s.heads :] + HALF * np.abs(expected) + 2.0**-25
        assert exceeds(keys, Product(expected, bound)) <= 1
        assert (values == fresh.astype(np.float16)).all()

    def expected(
        self, stage: NativeStage, asked: Asked, turned: Product, keys: np.ndarray, values: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        s, rows = stage.shape, []
        assert stage.parts is not None
        sinks = stage.parts.vectors.get("sinks")
        for row in range(self.length):
            first = 0 if asked.window is None else max(0, row - asked.window + 1)
            for head in range(s.heads):
                sink = None if sinks is None else float(np.float32(sinks[head]))
                kv = head // (s.heads // s.kv_heads)
                query = Product(turned.value[row, head], turned.bound[row, head])
                seen = slice(first, row + 1)
                how = Scoring(asked.scale, asked.softcap, sink)
                rows.append(attended(query, keys[seen, kv], values[seen, kv], how))
        shape = (self.length, -1)
        return np.array([row.value for row in rows]).reshape(shape), np.array([row.bound for row in rows]).reshape(
            shape
        )

    def test_blocks_before_the_window_are_not_read(self, rng: np.random.Generator):
        """They may be spoilt: a token's result is the same."""
        stage = self.stage(rng, Asked(window=20))
        x = signs(rng, self.length, stage.shape.hidden)
        stage.step([Part(0, 0, x[:70])])
        expected = stage.step([Part(0, 70, x[70:71])])
        for pool in (stage.keys, stage.values):
            pool[:, list(stage.tables[0])[:3]] = np.nan
        assert (stage.step([Part(0, 70, x[70:71])]) == expected).all()
