"""The plain torch backend's products: right, and the same for a row whatever its company."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from swarmd.node.engine.backends.base import TILE_ELEMENTS, tile_rows
from swarmd.node.engine.backends.torch_cpu import TorchCpuBackend
from swarmd.node.engine.quantized import DenseWeight, QuantizedWeight, Scales, Weight, pack

FORMS = ("4", "4 symmetric", "5", "5 symmetric", "2", "3 symmetric", "6", "8", "8 symmetric", "F32", "F16", "BF16")


def weight(form: str, rows: int, columns: int, seed: int = 0) -> Weight:
    random = np.random.default_rng(seed)
    values = (random.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)
    if form == "F32":
        return DenseWeight(values, "f32")
    if form == "F16":
        return DenseWeight(values.astype(np.float16), "f16")
    if form == "BF16":
        return DenseWeight((values.view(np.uint32) >> 16).astype(np.uint16), "bf16")
    bits = int(form[0])
    codes = random.integers(0, 1 << bits, (rows, columns), dtype=np.uint8)
    scale = (random.standard_normal((rows, columns // 32)) / (1 << bits)).astype(np.float16)
    bias = None if "symmetric" in form else Scales(random.standard_normal(scale.shape).astype(np.float16))
    return QuantizedWeight(bits, 32, pack(codes, bits), Scales(scale), bias)


def stacked(parts: list[Weight]) -> np.ndarray:
    return np.concatenate([part.dequantize() for part in parts])


@pytest.mark.parametrize("form", FORMS)
def test_linear_against_float64(form: str) -> None:
    parts: list[Weight] = [weight(form, 96, 224), weight(form, 40, 224, seed=1)]
    backend = TorchCpuBackend()
    prepared = backend.prepare(parts)
    assert prepared.nbytes == sum(part.nbytes for part in parts)
    x = torch.randn(7, 224, generator=torch.Generator().manual_seed(1))
    exact = x.double().numpy() @ stacked(parts).astype(np.float64).T
    # fp32 products of 224 terms: the error is a few roundings of the sum of the terms' sizes.
    bound = 4 * 2**-24 * (x.abs().double().numpy() @ np.abs(stacked(parts)).astype(np.float64).T) + 1e-30
    assert (np.abs(backend.linear(x, prepared).double().numpy() - exact) <= bound * np.sqrt(224)).all()


@pytest.mark.parametrize("form", FORMS)
def test_a_unit_vector_gives_back_the_exact_weights(form: str) -> None:
    # Multiplying by 1 and adding zeros rounds nothing, so what the tiles hold shows through bit for bit.
    backend = TorchCpuBackend()
    part = weight(form, 72, 96)
    product = backend.linear(torch.eye(96), backend.prepare([part]))
    assert np.array_equal(product.numpy().T, part.dequantize())


@pytest.mark.parametrize("form", FORMS)
def test_embed_gives_exact_rows(form: str) -> None:
    backend = TorchCpuBackend()
    table = weight(form, 90, 64)
    rows = [89, 0, 5, 5, 63, 64]
    assert np.array_equal(backend.embed(backend.prepare([table]), rows).numpy(), table.dequantize()[rows])


def test_a_matrix_of_many_tiles_equals_one_of_few() -> None:
    columns = 8192
    height = tile_rows(columns)
    part = weight("4", 2 * height + 17, columns)
    backend = TorchCpuBackend()
    prepared = backend.prepare([part])
    assert [tile.outputs for tile in prepared.tiles] == [height, height, 17]
    assert prepared.nbytes == part.nbytes
    assert height * columns <= TILE_ELEMENTS
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(2))
    exact = x.double().numpy() @ part.dequantize().astype(np.float64).T
    np.testing.assert_allclose(backend.linear(x, prepared).numpy(), exact, rtol=1e-4, atol=1e-3)
    rows = [2 * height + 16, 1, height]
    assert np.array_equal(backend.embed(prepared, rows).numpy(), part.dequantize()[rows])


def test_parts_of_different_forms_can_be_stacked() -> None:
    parts = [weight("4", 32, 64), weight("8 symmetric", 16, 64), weight("F16", 8, 64), weight("F16", 8, 64, seed=3)]
    backend = TorchCpuBackend()
    product = backend.linear(torch.eye(64), backend.prepare(parts))
    assert np.array_equal(product.numpy().T, stacked(parts))


@pytest.mark.parametrize(("rows", "columns"), [(1536, 576), (576, 1536), (192, 576), (100, 96)])
def test_a_row_does_not_depend_on_its_company(rows: int, columns: int) -> None:
    backend = TorchCpuBackend()
    prepared = backend.prepare([weight("4", rows, columns)])
    x = torch.randn(64, columns, generator=torch.Generator().manual_seed(3))
    together = backend.linear(x, prepared)
    norm = backend.rms_norm(x, torch.ones(columns), 1e-5)
    for count in (1, 2, 3, 5, 8, 17):
        assert torch.equal(backend.linear(x[:count], prepared), together[:count])
        assert torch.equal(backend.linear(x[64 - count :], prepared), together[64 - count :])
        assert torch.equal(backend.rms_norm(x[:count], torch.ones(columns), 1e-5), norm[:count])


@pytest.mark.parametrize(("dtype", "rounded"), [("f32", 1.00390625 + 2**-20), ("bf16", 1.0)])
def test_wire_types(dtype: str, rounded: float) -> None:
    backend = TorchCpuBackend()
    x = torch.full((2, 3), 1.00390625 + 2**-20 if dtype == "f32" else 1.00390625)
    sent = backend.send(x, dtype)  # pyright: ignore[reportArgumentType]
    assert sent.nbytes == 6 * (4 if dtype == "f32" else 2)
    back = backend.receive(bytes(sent), dtype, 2, 3)  # pyright: ignore[reportArgumentType]
    assert torch.equal(back, torch.full((2, 3), rounded))


def test_products_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = TorchCpuBackend()
    prepared = backend.prepare([weight("4", 48, 64)])
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(7))
    expected = backend.linear(x, prepared)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    for rows in (1, 3, 5):
        torch.testing.assert_close(backend.linear(x[:rows], prepared), expected[:rows], rtol=1e-5, atol=1e-5)
