"""GGUF blocks become the canonical form exactly."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmd.node.engine.gguf_blocks import QUANTIZED_FORMS, form_of_type, from_gguf
from swarmd.node.engine.quantized import DenseWeight, QuantizedWeight, form_of, llama_row_order, pack, unpack
from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.gguf import GGUF_BLOCK, GGUFType

QUANTIZED = tuple(QUANTIZED_FORMS)
DENSE = (GGUFType.F32, GGUFType.F16, GGUFType.BF16)


def random_blocks(kind: GGUFType, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Random bytes, so that every code occurs, with finite fp16 scales of all magnitudes and both signs."""
    random = np.random.default_rng(seed)
    elements, nbytes = GGUF_BLOCK[kind]
    blocks = random.integers(0, 256, (rows, columns // elements, nbytes), dtype=np.uint8)
    floats = 1 if QUANTIZED_FORMS[kind].bias == "" else 2
    numbers = random.integers(0, 0x7C00, (*blocks.shape[:2], floats), dtype=np.uint16)
    numbers |= random.integers(0, 2, numbers.shape, dtype=np.uint16) << 15
    blocks[..., : 2 * floats] = numbers.view(np.uint8).reshape(*blocks.shape[:2], 2 * floats)
    return blocks.reshape(-1)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_values_equal_the_reference_bit_for_bit(kind: GGUFType) -> None:
    data = random_blocks(kind, 48, 256)
    weight = from_gguf("w", kind, data, (48, 256))
    expected = gguf.dequantize(data.reshape(48, -1), gguf.GGMLQuantizationType(int(kind)))
    assert isinstance(weight, QuantizedWeight)
    assert (weight.rows, weight.columns) == (48, 256)
    # `==` and not the bytes: a zero's sign may differ.
    assert np.array_equal(weight.dequantize(), expected)


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
    columns, rows = 96, 10
    block, block_bytes = GGUF_BLOCK[kind]
    data = np.zeros(rows * columns // block * block_bytes, np.uint8)
    weight, form = from_gguf("w", kind, data, (rows, columns)), form_of_type("w", kind, (rows, columns))
    assert form_of(weight) == form
    assert weight.nbytes == form.nbytes(rows, columns)


@pytest.mark.parametrize("kind", [GGUFType.Q4_K, GGUFType.Q6_K, GGUFType.IQ4_NL, GGUFType.MXFP4, GGUFType.I8])
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
