"""The parts of a native step, on every code path of this machine, each against float64 within a stated bound."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from support.native_kernels import BITS, Product, U, dense_weight, exceeds, machine_isas, quantized_weight
from support.native_reference import HALF, attended, gated, rotated, signs, sixty_fourths
from support.native_stage import LayerParts, NativeStage, Part, Shape, dense

from swarmd.node.engine.block_table import BLOCK
from swarmd.node.engine.cpu import bindings as library
from swarmd.node.engine.cpu.bindings import Summary

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
    return np.random.default_rng(11)


def bits_of(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32).view(np.uint32)


class TestNorm:
    @pytest.mark.parametrize("hidden", [1, 2, 15, 16, 17, 64, 100, 577])
    def test_rms_norm(self, rng: np.random.Generator, hidden: int):
        """With an identity for a head the logits are the normed rows. A sum of n squares: n/2 u; then six roundings."""
        x = (rng.normal(0, 1, (5, hidden)) * np.array([[1e-6], [1], [300], [1e5], [1e-3]])).astype(np.float32)
        weight, eps = rng.normal(1, 0.5, hidden).astype(np.float32), 1e-5
        stage = NativeStage(Shape(hidden), head=dense(np.eye(hidden)), output_norm=weight, eps=eps)
        found = stage.logits([Part(0, 0, x)], range(5))
        exact = x.astype(np.float64)
        value = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + np.float64(np.float32(eps))) * weight
        assert exceeds(found, Product(value, (hidden / 2 + 6) * U * np.abs(value))) <= 1

    def test_only_wanted_rows_have_logits_in_the_order_asked(self, rng: np.random.Generator):
        x = signs(rng, 7, 32)
        stage = NativeStage(Shape(32), head=quantized_weight(rng, 8, 50, 32, biased=False), threads=2)
        every = stage.logits([Part(0, 0, x)], range(7))
        assert (stage.logits([Part(0, 0, x)], [5, 0, 6]) == every[[5, 0, 6]]).all()
        assert (stage.logits([Part(0, 0, x)], [3]) == every[[3]]).all()


class TestWire:
    def test_bf16_comes_and_goes_unchanged(self):
        """Every bf16, infinities and what is not a number among them (whose payload may change)."""
        every = np.arange(1 << 16, dtype=np.uint16).reshape(-1, 64)
        found = NativeStage(Shape(64)).step([Part(0, 0, every)], wire="bf16")
        number = (every & 0x7FFF) <= 0x7F80
        assert (found == every)[number].all()
        assert ((found & 0x7FFF) > 0x7F80)[~number].all()

    def test_fp32_comes_and_goes_unchanged(self, rng: np.random.Generator):
        x = rng.normal(0, 1e10, (9, 33)).astype(np.float32)
        assert (NativeStage(Shape(33), threads=3).step([Part(0, 0, x)]) == x).all()

    def test_to_bf16_the_nearest_is_taken_and_of_two_the_even_one(self, rng: np.random.Generator):
        x = rng.normal(0, 1, (8, 32)).astype(np.float32)
        ties = (rng.integers(0, 1 << 15, (8, 32), dtype=np.uint32) << 16 | 0x8000).view(np.float32)
        table = np.concatenate([x, np.where(np.isfinite(ties), ties, 1)]).astype(np.float32)
        found = NativeStage(Shape(32), embedding=dense(table)).embed(range(16), "bf16")
        bits = table.view(np.uint32).astype(np.uint64)
        assert (found == ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)).all()


class TestEmbedding:
    @pytest.mark.parametrize("bits", BITS)
    def test_quantized(self, rng: np.random.Generator, bits: int):
        table = quantized_weight(rng, bits, 70, 64, biased=True)
        tokens = [69, 0, 16, 16, 31]
        found = NativeStage(Shape(64), embedding=table, threads=2).embed(tokens, "f32")
        assert (found == table.dequantize()[tokens]).all()

    def test_dense(self, rng: np.random.Generator):
        table = dense_weight(rng, "f16", 9, 40)
        assert (NativeStage(Shape(40), embedding=table).embed([8, 3], "f32") == table.dequantize()[[8, 3]]).all()


HEADS = [(1, 1, 2), (2, 1, 6), (3, 3, 10), (6, 2, 16), (5, 1, 24), (4, 2, 40), (9, 3, 64), (2, 2, 80), (1, 1, 128)]


class TestAttention:
    def stage(
        self,
        rng: np.random.Generator,
        sizes: tuple[int, int, int],
        lengths: list[int],
        *,
        qkv: np.ndarray | None = None,
        rotating: bool = True,
        threads: int = 1,
    ) -> NativeStage:
        """Attention added to the input, sequences of these lengths on shuffled blocks."""
        heads, _, head_dim = sizes
        shape = Shape(heads * head_dim, *sizes)
        needed = [-(-length // BLOCK) for length in lengths]
        blocks = rng.permutation(sum(needed) + 2)
        ends = np.cumsum(needed)
        tables = {seq: blocks[end - count : end] for seq, (end, count) in enumerate(zip(ends, needed, strict=True))}
        if qkv is None:
            qkv = sixty_fourths(rng, shape.qkv, shape.hidden, 8 / shape.hidden**0.5)
        parts = LayerParts(shape, qkv=dense(qkv), attention_output=dense(np.eye(shape.hidden)))
        frequencies = 10000.0 ** -(np.arange(head_dim // 2) / (head_dim // 2)) * rotating
        return NativeStage(shape, parts, frequencies, tables, len(blocks), threads)

    def qkv(self, stage: NativeStage, x: np.ndarray) -> np.ndarray:
        """Exact: [rows, heads + 2 kv heads, head_dim]."""
        assert stage.parts is not None
        assert stage.parts.qkv is not None
        weight = stage.parts.qkv.dequantize().astype(np.float64)
        return (x.astype(np.float64) @ weight.T).reshape(len(x), -1, stage.shape.head_dim)

    def cached(self, stage: NativeStage, seq: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values [length, kv heads, head_dim] of a sequence, out of the pools."""
        table, s = np.asarray(stage.tables[seq]), stage.shape
        keys = stage.keys[:, table].transpose(1, 3, 0, 2).reshape(-1, s.kv_heads, s.head_dim)
        values = stage.values[:, table].transpose(1, 2, 0, 3).reshape(-1, s.kv_heads, stage.values.shape[-1])
        return keys[:length], values[:length, :, : s.head_dim]

    def check_cache(self, stage: NativeStage, seq: int, x: np.ndarray) -> None:
        """Keys are rotated, both are rounded to fp16, and each token is in its place."""
        s, qkv = stage.shape, self.qkv(stage, x)
        assert stage.frequencies is not None
        keys, values = self.cached(stage, seq, len(x))
        expected = rotated(qkv[:, s.heads : s.heads + s.kv_heads], np.arange(len(x)), stage.frequencies)
        # Below the normal halves the distance to the nearest is absolute.
        bound = expected.bound + HALF * np.abs(expected.value) + 2.0**-25
        assert exceeds(keys, Product(expected.value, bound)) <= 1
        assert (values == qkv[:, s.heads + s.kv_heads :].astype(np.float16)).all()

    def expected(self, stage: NativeStage, seq: int, x: np.ndarray) -> Product:
        """The whole sequence's output rows, given what is in the cache."""
        s = stage.shape
        assert stage.frequencies is not None
        queries = rotated(self.qkv(stage, x)[:, : s.heads], np.arange(len(x)), stage.frequencies)
        keys, values = self.cached(stage, seq, len(x))
        rows = []
        for row in range(len(x)):
            for head in range(s.heads):
                kv = head // (s.heads // s.kv_heads)
                query = Product(queries.value[row, head], queries.bound[row, head])
                rows.append(attended(query, keys[: row + 1, kv], values[: row + 1, kv]))
        value = np.array([row.value for row in rows]).reshape(len(x), -1)
        bound = np.array([row.bound for row in rows]).reshape(len(x), -1)
        return Product(x + value, bound + U * (np.abs(value) + 1))

    @pytest.mark.parametrize("sizes", HEADS, ids=str)
    def test_a_ragged_step_of_prompts_and_single_tokens(self, rng: np.random.Generator, sizes: tuple[int, int, int]):
        """Three sequences, none ending on a block's edge: prompts first, then a mixed step, by two threads."""
        lengths, cuts = [37, 18, 3], [20, 17, 0]
        stage = self.stage(rng, sizes, lengths, threads=2)
        xs = [signs(rng, length, stage.shape.hidden) for length in lengths]
        first = [Part(seq, 0, x[:cut]) for seq, (x, cut) in enumerate(zip(xs, cuts, strict=True)) if cut]
        second = [Part(seq, cut, x[cut:]) for seq, (x, cut) in enumerate(zip(xs, cuts, strict=True))]
        found = [stage.step(first), stage.step(second)]
        at = [0, 0]
        for seq, x in enumerate(xs):
            rows = []
            for i, length in enumerate((cuts[seq], len(x) - cuts[seq])):
                rows.append(found[i][at[i] : at[i] + length])
                at[i] += length
            self.check_cache(stage, seq, x)
            assert exceeds(np.concatenate(rows), self.expected(stage, seq, x)) <= 1

    def test_a_long_context(self, rng: np.random.Generator):
        stage = self.stage(rng, (3, 1, 32), [700])
        x = signs(rng, 700, stage.shape.hidden)
        found = np.concatenate([stage.step([Part(0, 0, x[:690])]), stage.step([Part(0, 690, x[690:])])])
        self.check_cache(stage, 0, x)
        assert exceeds(found, self.expected(stage, 0, x)) <= 1

    def test_large_scores_do_not_overflow(self, rng: np.random.Generator):
        """Scores of hundreds, whose exponentials fp32 does not hold: all weight goes to the best keys."""
        stage = self.stage(rng, (1, 1, 16), [20], qkv=sixty_fourths(rng, 48, 16, 8.0), rotating=False)
        x = signs(rng, 20, 16)
        found = stage.step([Part(0, 0, x)])
        assert exceeds(found, self.expected(stage, 0, x)) <= 1

    def test_what_fp16_cannot_hold_is_cut_to_the_largest_it_can(self, rng: np.random.Generator):
        """Values of 131072 and -131072 behind equal scores."""
        qkv = np.repeat([[0.0], [1.0], [8192.0]], 16, axis=0) * np.ones((48, 16))
        stage = self.stage(rng, (1, 1, 16), [2], qkv=qkv, rotating=False)
        found = stage.step([Part(0, 0, np.array([[1.0], [-1.0]]).repeat(16, axis=1).astype(np.float32))])
        assert (found == np.array([[65505.0], [-1.0]])).all()


class TestGate:
    @pytest.mark.parametrize("ffn", [1, 16, 17, 37, 64, 100])
    def test_silu_of_gate_times_up(self, rng: np.random.Generator, ffn: int):
        """Through an identity, added to inputs of 1: the sum rounds once more."""
        shape = Shape(ffn, ffn=ffn)
        weights = np.concatenate([sixty_fourths(rng, ffn, ffn, 64 / ffn), sixty_fourths(rng, ffn, ffn)])
        parts = LayerParts(shape, gate_up=dense(weights), down=dense(np.eye(ffn)))
        stage = NativeStage(shape, parts, tables={0: [0]}, threads=2)
        x = signs(rng, 9, ffn)
        gate, up = np.split(x.astype(np.float64) @ weights.astype(np.float64).T, 2, axis=1)
        expected = gated(gate, up)
        total = Product(x + expected.value, expected.bound + U * (np.abs(expected.value) + 1))
        assert exceeds(stage.step([Part(0, 0, x)]), total) <= 1

    def test_far_from_zero(self):
        """A gate of thousands passes as it is or shuts, without overflow."""
        shape = Shape(2, ffn=2)
        weights = np.array([[4096.0, 0], [-4096.0, 0], [1, 0], [1, 0]])
        stage = NativeStage(shape, LayerParts(shape, gate_up=dense(weights), down=dense(np.eye(2))), tables={0: [0]})
        found = stage.step([Part(0, 0, np.ones((1, 2), np.float32))])
        assert found.tolist() == [[4097.0, 1.0]]


class TestWholeLayer:
    """Quantized matrices everywhere: what a step computes for a row is the same bits in any company."""

    shape = Shape(64, 4, 2, 16, 96)

    def stage(self, threads: int, tables: dict[int, list[int]]) -> NativeStage:
        rng = np.random.default_rng(3)
        s = self.shape
        parts = LayerParts(
            s,
            quantized_weight(rng, 4, s.qkv, s.hidden, biased=True),
            quantized_weight(rng, 4, s.hidden, s.attended, biased=False),
            quantized_weight(rng, 5, 2 * s.ffn, s.hidden, biased=True),
            quantized_weight(rng, 8, s.hidden, s.ffn, biased=False),
        )
        blocks = 1 + max(block for table in tables.values() for block in table)
        return NativeStage(s, parts, np.array([1.0, 0.3] * 4), tables, blocks, threads, eps=1e-5)

    @pytest.mark.parametrize("threads", [1, 2, 3])
    def test_the_same_bits_however_a_prompt_is_cut_and_whoever_is_there(self, rng: np.random.Generator, threads: int):
        x, others = (rng.normal(0, 1, (n, 64)).astype(np.float32) for n in (50, 70))
        token_by_token = self.stage(1, {0: [2, 0, 3, 1]})
        alone = np.concatenate([token_by_token.step([Part(0, i, x[i : i + 1])]) for i in range(len(x))])
        stage = self.stage(threads, {0: [5, 1, 8, 2], 1: [0, 3, 7, 4, 6]})
        cuts, rows = [0, 1, 14, 16, 19, 48, 50], []
        for i, (begin, end) in enumerate(itertools.pairwise(cuts)):
            step = [Part(1, 11 * i, others[11 * i : 11 * (i + 1)]), Part(0, begin, x[begin:end])]
            rows.append(stage.step(step)[11:])
        assert (bits_of(np.concatenate(rows)) == bits_of(alone)).all()

    def test_a_token_written_again_replaces_what_was_there(self, rng: np.random.Generator):
        """How rejected drafts go away."""
        x, drafts = (rng.normal(0, 1, (20, 64)).astype(np.float32) for _ in range(2))
        straight, drafted = self.stage(1, {0: [0, 1]}), self.stage(1, {0: [1, 0]})
        straight.step([Part(0, 0, x[:15])])
        drafted.step([Part(0, 0, x[:15])])
        drafted.step([Part(0, 15, drafts[:5])])
        found = drafted.step([Part(0, 15, x[15:17])])
        assert (found == straight.step([Part(0, 15, x[15:17])])).all()


class TestSummary:
    def summarize(self, logits: np.ndarray) -> list[Summary]:
        logits = np.ascontiguousarray(logits, np.float32)
        found = (Summary * len(logits))()
        library.load().swarmd_summarize(logits.ctypes.data, *logits.shape, ctypes.cast(found, ctypes.POINTER(Summary)))
        return list(found)

    @pytest.mark.parametrize("vocab", [1, 7, 16, 33, 1000, 49152])
    @pytest.mark.parametrize("spread", [0.1, 3.0, 40.0])
    def test_the_largest_and_the_logarithm_of_the_sum(self, rng: np.random.Generator, vocab: int, spread: float):
        """Exponentials within 4 u and a rounding of their argument, runs of 64 added up in fp32: 1e-5 of the sum."""
        logits = rng.normal(0, spread, (3, vocab)).astype(np.float32)
        for row, found in zip(logits.astype(np.float64), self.summarize(logits), strict=True):
            assert found.finite
            assert found.best == row.argmax()
            assert found.largest == row.max()
            expected = row.max() + np.log(np.exp(row - row.max()).sum())
            assert abs(found.log_normalizer - expected) <= 1e-5 + 1e-12 * abs(expected)

    def test_of_equal_ones_the_first_is_the_best(self):
        logits = np.full((2, 100), -5.0)
        logits[0, [40, 41, 99]] = 2.0
        assert [found.best for found in self.summarize(logits)] == [40, 0]

    @pytest.mark.parametrize("place", [0, 15, 16, 98, 99])
    @pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
    def test_what_is_no_number_is_told(self, place: int, odd: float):
        logits = np.zeros((2, 100))
        logits[0, place] = odd
        assert [bool(found.finite) for found in self.summarize(logits)] == [False, True]
