"""A stage process holds its own layers' bytes, never the file's, and little more while it loads them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support.kernels import needs_kernels
from support.stage_memory import measure, write_bf16_folder, write_q8_gguf

START, END = 4, 8
LARGEST_MATRIX = 2 * 1024 * 2816
"""Weights of gate and up, which are read, converted and packed together."""
BYTES_AT_WORK = 12
"""Per weight of these: several forms of it are there for a moment."""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from Linux's /proc")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("large")
    return {
        "safetensors": write_bf16_folder(folder / "model", 10),
        "gguf": write_q8_gguf(folder / "model.gguf", 16),
    }


@pytest.mark.parametrize("form", ["safetensors", "gguf"])
@pytest.mark.parametrize("kernels", [pytest.param("native", marks=needs_kernels), "torch"])
def test_loading_some_layers_takes_the_memory_of_these_layers(form: str, kernels: str, models: dict[str, Path]) -> None:
    found = measure(models[form], kernels, START, END)
    assert abs(found["weights"] - found["stored"]) < 0.02 * found["stored"]
    assert abs(found["resident"] - found["weights"]) < 0.1 * found["weights"], found
    assert found["peak"] < 1.1 * found["weights"] + BYTES_AT_WORK * LARGEST_MATRIX, found
