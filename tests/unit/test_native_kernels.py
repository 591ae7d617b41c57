"""The native kernels, on every code path that this machine has, against float64: errors stay within stated bounds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from support.native_kernels import (
    BITS,
    DENSE,
    FORMS,
    Form,
    dense_weight,
    exceeds,
    machine_isas,
    product_of_codes,
    product_of_values,
    quantized_weight,
    weight_of,
)

from swarmd.node.engine.cpu import bindings as library
from swarmd.node.engine.cpu.matrices import NativeMatrix, linear
from swarmd.node.engine.quantized import QuantizedWeight, Scales, pack

FOUND = machine_isas()
pytestmark = pytest.mark.skipif(not FOUND, reason="the native kernels are not built here (make native)")

# (rows of x, outputs, inputs): one row, few, many, odd numbers of each, a tail in every tile, the shortest input.
SHAPES = [(1, 16, 32), (1, 1, 32), (1, 37, 96), (2, 48, 64), (3, 17, 32), (7, 100, 160), (16, 33, 96), (45, 81, 224)]
# Dense inputs may have any number of columns.
ODD = [(1, 5, 1), (3, 19, 7), (6, 16, 33), (33, 50, 101)]


@pytest.fixture(params=FOUND or ["none"], autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    best = library.isa()
    assert library.select(request.param)
    yield request.param
    library.select(best)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def activations(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Of very different sizes: hidden states have channels hundreds of times larger than the rest."""
    sizes = np.exp(rng.normal(0, 2, (1, columns)))
    return (rng.normal(0, 1, (rows, columns)) * sizes).astype(np.float32)


def test_a_path_that_is_not_there_is_not_taken(isa: str):
    assert not library.select("mmx")
    assert library.isa() == isa


class TestProducts:
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("biased", [True, False], ids=["biased", "symmetric"])
    @pytest.mark.parametrize("bits", BITS)
    def test_quantized(self, rng: np.random.Generator, bits: int, biased: bool, shape: tuple[int, int, int]):
        m, n, k = shape
        weight, x = quantized_weight(rng, bits, n, k, biased=biased), activations(rng, m, k)
        y = linear(NativeMatrix([weight]), x)
        assert exceeds(y, product_of_codes(x, weight)) <= 1
        assert exceeds(y, product_of_values(x, weight)) <= 1

    @pytest.mark.parametrize("shape", [*SHAPES, *ODD], ids=str)
    @pytest.mark.parametrize("kind", DENSE, ids=str)
    def test_dense(self, rng: np.random.Generator, kind, shape: tuple[int, int, int]):
        m, n, k = shape
        weight, x = dense_weight(rng, kind, n, k), activations(rng, m, k)
        assert exceeds(linear(NativeMatrix([weight]), x), product_of_values(x, weight)) <= 1

    @pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
    def test_every_form(self, rng: np.random.Generator, form: Form):
        """One row and several, an odd number of groups of activations where the form allows it."""
        for m, n, units in [(1, 37, 1), (2, 16, 2), (11, 50, 3)]:
            weight, x = weight_of(rng, form, n, units * form.unit), activations(rng, m, units * form.unit)
            y = linear(NativeMatrix([weight]), x)
            assert exceeds(y, product_of_codes(x, weight)) <= 1
            assert exceeds(y, product_of_values(x, weight)) <= 1

    @pytest.mark.parametrize("group_size", [16, 32])
    @pytest.mark.parametrize("bits", [*BITS, "levels"])
    def test_the_largest_codes_and_activations_do_not_overflow(self, bits: int | str, group_size: int):
        """Every product at its limit, with equal and with alternating signs: sixteen bits would not hold the sums."""
        table = np.arange(240, 256, dtype=np.uint8) if bits == "levels" else None
        bits = 4 if isinstance(bits, str) else bits
        codes = np.full((16, 64), (1 << bits) - 1, np.uint8)
        ones = np.ones((16, 64 // group_size), np.float16)
        weight = QuantizedWeight(bits, group_size, pack(codes, bits), Scales(ones), Scales(-ones), table)
        x = np.stack([np.full(64, 3.0), np.full(64, -3.0), np.tile([3.0, -3.0], 32)]).astype(np.float32)
        assert exceeds(linear(NativeMatrix([weight]), x), product_of_codes(x, weight)) <= 1

    def test_super_scales_at_their_limits(self):
        """The largest fp16 times the largest and the least small integers."""
        small = np.array([[127, -128, 0, -1]] * 16, np.int8)
        weight = QuantizedWeight(
            6, 16, pack(np.full((16, 64), 63, np.uint8), 6), Scales(small, np.full((16, 2), 65504, np.float16)), None
        )
        x = np.stack([np.ones(64), np.repeat([1, -1, 1, 1], 16)]).astype(np.float32)
        y = linear(NativeMatrix([weight]), x)
        assert exceeds(y, product_of_codes(x, weight)) <= 1
        assert (np.abs(y) > 1e6).all()

    def test_activations_of_nothing_give_nothing(self, rng: np.random.Generator):
        weight = quantized_weight(rng, 4, 20, 64, biased=True)
        x = np.zeros((3, 64), np.float32)
        x[1, 40] = 2.0
        y = linear(NativeMatrix([weight]), x)
        assert (y[[0, 2]] == 0).all()
        assert exceeds(y[1:2], product_of_codes(x[1:2], weight)) <= 1

    @pytest.mark.parametrize("name", [*FORMS, *DENSE])
    def test_a_row_does_not_depend_on_its_company_or_on_the_threads(self, rng: np.random.Generator, name):
        n, k = 83, FORMS[name].unit if name in FORMS else 96
        weight = weight_of(rng, FORMS[name], n, k) if name in FORMS else dense_weight(rng, name, n, k)
        matrix, x = NativeMatrix([weight]), activations(rng, 41, k)
        alone = np.concatenate([linear(matrix, row[None]) for row in x])
        for rows in (2, 3, 5, 8, 12, 16, 23, 41):
            for threads in (1, 2, 3):
                assert (linear(matrix, x[:rows], threads) == alone[:rows]).all()
        assert (linear(matrix, x[::-1]) == alone[::-1]).all()

    def test_stacked_parts_are_as_each_by_itself(self, rng: np.random.Generator):
        """Parts of different forms and of rows that fill no tile, as a gate and an up matrix may be."""
        parts = [
            quantized_weight(rng, 4, 21, 256, biased=True),
            weight_of(rng, FORMS["Q6_K"], 5, 256),
            weight_of(rng, FORMS["MXFP4"], 33, 256),
            dense_weight(rng, DENSE[1], 18, 256),
        ]
        x = activations(rng, 9, 256)
        together = linear(NativeMatrix(parts), x, threads=2)
        assert (together == np.concatenate([linear(NativeMatrix([part]), x) for part in parts], axis=1)).all()


class TestPacking:
    @pytest.mark.parametrize("biased", [True, False], ids=["biased", "symmetric"])
    @pytest.mark.parametrize("bits", BITS)
    def test_rows_come_back_as_the_canonical_form_defines_them(self, rng: np.random.Generator, bits: int, biased: bool):
        weight = quantized_weight(rng, bits, 39, 160, biased=biased)
        ids = [38, 0, 15, 16, 38, 7]
        assert (NativeMatrix([weight]).rows_at(ids) == weight.dequantize()[ids]).all()

    @pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
    def test_rows_of_every_form_come_back(self, rng: np.random.Generator, form: Form):
        weight = weight_of(rng, form, 39, 3 * form.unit)
        assert (NativeMatrix([weight]).rows_at(range(39)) == weight.dequantize()).all()

    @pytest.mark.parametrize("kind", DENSE, ids=str)
    def test_dense_rows_come_back_exactly(self, rng: np.random.Generator, kind):
        weight = dense_weight(rng, kind, 21, 13)
        assert (NativeMatrix([weight]).rows_at(range(21)) == weight.dequantize()).all()

    def test_rows_of_stacked_parts(self, rng: np.random.Generator):
        parts = [quantized_weight(rng, 3, 17, 32, biased=True), dense_weight(rng, DENSE[0], 4, 32)]
        rows = NativeMatrix(parts).rows_at([20, 0, 16, 17])
        assert (rows == np.concatenate([part.dequantize() for part in parts])[[20, 0, 16, 17]]).all()

    def test_every_fp16_scale_is_read_right(self):
        """All finite halves, subnormal ones among them, as biases of a code that is 0."""
        halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
        halves = halves[np.isfinite(halves)].reshape(-1, 1)
        codes = np.zeros((len(halves), 32), np.uint8)
        weight = QuantizedWeight(2, 32, pack(codes, 2), Scales(np.zeros_like(halves)), Scales(halves))
        rows = NativeMatrix([weight]).rows_at(range(len(halves)))
        assert (rows == halves.astype(np.float32)).all()

    @pytest.mark.parametrize("name", [name for name in FORMS if name not in ("2 bits, levels", "6 bits, levels")])
    def test_nothing_is_kept_twice_or_larger(self, rng: np.random.Generator, name: str):
        """Small scales stay small. (Levels of other codes than 4-bit ones, which no format has, are kept as bytes.)"""
        weight = weight_of(rng, FORMS[name], 64, 2 * FORMS[name].unit)
        assert NativeMatrix([weight]).nbytes == weight.nbytes

    def test_columns_that_fill_no_group_of_activations_are_refused(self, rng: np.random.Generator):
        weight = weight_of(rng, FORMS["5 bits, halves"], 16, 32)
        odd = QuantizedWeight(5, 16, weight.q[:, :3], Scales(weight.scale.values[:, :1]), None)
        with pytest.raises(ValueError, match="multiple of 32, not 16"):
            NativeMatrix([odd])

    def test_parts_that_do_not_fit_each_other_are_refused(self, rng: np.random.Generator):
        """Native code would read past them."""
        good = weight_of(rng, FORMS["Q4_K"], 16, 256)
        assert good.bias is not None
        assert good.bias.supers is not None
        bad = [
            replace(good, q=good.q[:, :-1]),
            replace(good, bits=7),
            replace(good, codebook=np.zeros(15, np.uint8)),
            replace(good, bias=Scales(good.bias.values[:15], good.bias.supers)),
            replace(good, bias=Scales(good.bias.values, good.bias.supers[:15])),
            replace(good, bias=Scales(good.bias.values, np.ones((16, 3), np.float16))),
            replace(good, bias=Scales(good.bias.values)),
        ]
        for weight in bad:
            with pytest.raises(ValueError, match=r"kernels take|do not fit|does not fit"):
                NativeMatrix([weight])
