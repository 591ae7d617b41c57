"""A model is the same as a GGUF file and as a folder of safetensors: tensors, layers, rotary angles and numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from support.gguf_from_hf import write_gguf_of
from support.tiny_hf import CASES

from swarmd.node.engine.rope import rope_table
from swarmd.node.engine.spec import ArchSpec, FactorsScaling
from swarmd.node.engine.tensors import ROPE_FACTORS, tensor_shapes
from swarmd.node.models.checkpoint import Checkpoint, open_checkpoint

CONTEXTS = (100, 512)
"""Below and above the original context of scaled rotary embeddings."""
NOT_AS_FOLDERS = ("seed_oss",)
"""Architectures that are read from GGUF files only."""


@pytest.fixture(scope="module", params=[name for name in CASES if name not in NOT_AS_FOLDERS])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Checkpoint, Checkpoint]]:
    model, place = CASES[request.param](), tmp_path_factory.mktemp("pair")
    path = write_gguf_of(model, place / "model.gguf")
    model.save_pretrained(place / "folder")
    with open_checkpoint(path) as file, open_checkpoint(place / "folder") as folder:
        yield file, folder


def test_the_same_tensors(pair: tuple[Checkpoint, Checkpoint]) -> None:
    file, folder = pair
    names = set(tensor_shapes(folder.spec, 0, folder.spec.n_layers))
    assert names == set(tensor_shapes(file.spec, 0, file.spec.n_layers)) - {ROPE_FACTORS}
    for name in names:
        assert np.array_equal(file.read(name).dequantize(), folder.read(name).dequantize()), name


def test_the_same_architecture(pair: tuple[Checkpoint, Checkpoint]) -> None:
    """Numbers are fp32 in GGUF files, and rotary embeddings may be said in other words."""
    file, folder = pair
    assert _words(file.spec) == _words(folder.spec)
    for name in ("rms_eps", "attention_scale", "embedding_multiplier", "residual_multiplier", "logit_multiplier"):
        assert getattr(file.spec, name) == pytest.approx(getattr(folder.spec, name), rel=1e-6), name


@pytest.mark.parametrize("context", CONTEXTS)
def test_the_same_angles(pair: tuple[Checkpoint, Checkpoint], context: int) -> None:
    file, folder = pair
    for ours, theirs in zip(_angles(file, context), _angles(folder, context), strict=True):
        np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6)
        assert ours[1] == pytest.approx(theirs[1], rel=1e-6)


def _words(spec: ArchSpec) -> ArchSpec:
    """Without what is compared otherwise."""
    return replace(
        spec,
        architecture="",
        ropes=(),
        layers=tuple(replace(layer, rope=None if layer.rope is None else 0) for layer in spec.layers),
        rms_eps=0.0,
        attention_scale=1.0,
        embedding_multiplier=1.0,
        residual_multiplier=1.0,
        logit_multiplier=1.0,
    )


def _angles(checkpoint: Checkpoint, context: int) -> list[tuple[np.ndarray, float]]:
    """Of each layer that has positions."""
    found: list[tuple[np.ndarray, float]] = []
    for layer in checkpoint.spec.layers:
        if layer.rope is not None:
            rope = checkpoint.spec.ropes[layer.rope]
            needs = isinstance(rope.scaling, FactorsScaling)
            factors = checkpoint.read(ROPE_FACTORS).dequantize() if needs else None
            found.append(rope_table(rope, context, factors))
    return found
