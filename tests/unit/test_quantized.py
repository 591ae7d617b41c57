"""GGUF blocks become the canonical form exactly."""

from __future__ import annotations

import tracemalloc

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gguf_blocks import random_blocks

from swarmd.node.engine import gguf_blocks
from swarmd.node.engine.gguf_blocks import MXFP4_NAN, QUANTIZED_FORMS, form_of_type, from_gguf
from swarmd.node.engine.quantized import DenseWeight, QuantizedWeight, form_of, llama_row_order, pack, unpack
from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.gguf import GGUF_BLOCK, GGUFType

QUANTIZED = tuple(QUANTIZED_FORMS)
DENSE = (GGUFType.F32, GGUFType.F16, GGUFType.BF16)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_values_equal_the_reference_bit_for_bit(kind: GGUFType) -> None:
    data = random_blocks(kind, 48, 2048)
    weight = from_gguf("w", kind, data, (48, 2048))
    assert isinstance(weight, QuantizedWeight)
    assert (weight.rows, weight.columns) == (48, 2048)
    with np.errstate(over="ignore"):  # the largest scales of MXFP4 overflow, in the reference as well
        values = weight.dequantize()
        expected = gguf.dequantize(data.reshape(48, -1), gguf.GGMLQuantizationType(int(kind)))
    # `==` and not the bytes: a zero's sign may differ.
    assert np.array_equal(values, expected)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_slices_of_rows_join_to_the_whole(kind: GGUFType, monkeypatch: pytest.MonkeyPatch) -> None:
    data = random_blocks(kind, 7, 512)
    whole = from_gguf("w", kind, data, (7, 512))
    monkeypatch.setattr(gguf_blocks, "SLICE_ELEMENTS", 1024)
    sliced = from_gguf("w", kind, data, (7, 512))
    assert isinstance(whole, QuantizedWeight)
    assert isinstance(sliced, QuantizedWeight)
    assert np.array_equal(sliced.q, whole.q)
    assert np.array_equal(sliced.scale.expand(), whole.scale.expand())
    assert (sliced.bias is None) == (whole.bias is None)
    if sliced.bias is not None and whole.bias is not None:
        assert np.array_equal(sliced.bias.expand(), whole.bias.expand())


@pytest.mark.parametrize("kind", [GGUFType.Q5_K, GGUFType.Q6_K, GGUFType.MXFP4])
def test_conversion_takes_little_memory_beside_the_result(kind: GGUFType) -> None:
    rows, columns = 4096, 2048
    data = random_blocks(kind, rows, columns)
    tracemalloc.start()
    try:
        weight = from_gguf("w", kind, data, (rows, columns))
        assert tracemalloc.get_traced_memory()[1] - weight.nbytes < 16 << 20
    finally:
        tracemalloc.stop()


def test_every_scale_of_mxfp4_is_kept() -> None:
    """All 255 powers of two, down to bf16's subnormal numbers, against the reference's formula."""
    blocks = np.zeros((255, 17), np.uint8)
    blocks[:, 0] = np.arange(255)
    weight = from_gguf("w", GGUFType.MXFP4, blocks.reshape(-1), (255, 32))
    assert isinstance(weight, QuantizedWeight)
    assert weight.scale.expand()[:, 0].tolist() == [2.0 ** (exponent - 128) for exponent in range(255)]


def test_a_scale_that_is_no_number_is_refused() -> None:
    blocks = np.full(17, MXFP4_NAN, np.uint8)
    with pytest.raises(ModelFileError, match=r"'w' of type MXFP4.*not a number"):
        from_gguf("w", GGUFType.MXFP4, blocks, (1, 32))


@pytest.mark.parametrize("kind", DENSE)
def test_dense_values_are_kept_as_they_are(kind: GGUFType) -> None:
    values = np.random.default_rng(1).standard_normal((6, 10)).astype(np.float32)
    data = gguf.quantize(values, gguf.GGMLQuantizationType(int(kind))).view(np.uint8).reshape(-1)
    weight = from_gguf("w", kind, data, (6, 10))
    assert isinstance(weight, DenseWeight)
    reference = gguf.dequantize(data.reshape(6, -1), gguf.GGMLQuantizationType(int(kind)))
    assert np.array_equal(weight.dequantize(), reference)


@pytest.mark.parametrize("kind", [*QUANTIZED, *DENSE])
def test_held_bytes_is_what_is_held(kind: GGUFType) -> None:
    columns, rows = 768, 10
    block, block_bytes = GGUF_BLOCK[kind]
    data = np.zeros(rows * columns // block * block_bytes, np.uint8)
    weight, form = from_gguf("w", kind, data, (rows, columns)), form_of_type("w", kind, (rows, columns))
    assert form_of(weight) == form
    assert weight.nbytes == form.nbytes(rows, columns)


@pytest.mark.parametrize("kind", [GGUFType.IQ2_XS, GGUFType.IQ3_S, GGUFType.TQ1_0, GGUFType.NVFP4, GGUFType.I8])
def test_other_types_are_refused_by_name(kind: GGUFType) -> None:
    block, block_bytes = GGUF_BLOCK[kind]
    with pytest.raises(ModelFileError, match=rf"blk\.3\.x.*{kind.name}.*not supported yet"):
        from_gguf("blk.3.x", kind, np.zeros(block_bytes, np.uint8), (1, block))
    with pytest.raises(ModelFileError, match="not supported yet"):
        form_of_type("blk.3.x", kind, (1, block))


def test_a_quantized_vector_is_refused() -> None:
    with pytest.raises(ModelFileError, match="norm"):
        from_gguf("norm", GGUFType.Q8_0, np.zeros(34, np.uint8), (32,))


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from((2, 3, 4, 5, 6, 8)), groups=st.integers(1, 5), rows=st.integers(1, 4), seed=st.integers(0, 99)
)
def test_packing_is_lsb_first_little_endian(bits: int, groups: int, rows: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, groups * 32), dtype=np.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == np.uint32
    assert packed.shape == (rows, groups * bits)
    # By the definition: element i of a row is bits [i*bits, (i+1)*bits) of the row read as one little-endian number.
    for row, words in zip(codes, packed, strict=True):
        number = int.from_bytes(words.tobytes(), "little")
        assert [number >> (i * bits) & ((1 << bits) - 1) for i in range(len(row))] == row.tolist()
    assert np.array_equal(unpack(packed, bits), codes)


def test_llama_row_order_undoes_the_converters_permutation() -> None:
    heads, head_dim = 3, 8
    original = np.arange(heads * head_dim)
    # `permute` of convert_hf_to_gguf.py
    in_file = original.reshape(heads, 2, head_dim // 2).swapaxes(1, 2).reshape(-1)
    assert np.array_equal(in_file[llama_row_order(heads, head_dim)], original)


def test_take_reorders_rows_losslessly() -> None:
    weight = from_gguf("w", GGUFType.Q5_1, random_blocks(GGUFType.Q5_1, 8, 64), (8, 64))
    order = np.array([7, 0, 3, 3])
    assert np.array_equal(weight.take(order).dequantize(), weight.dequantize()[order])
