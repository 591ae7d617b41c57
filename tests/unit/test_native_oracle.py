"""Our own kernels on the models of `transformers`, one of every architecture, with dense fp32 weights.

Then keys and values in fp16 are the only numbers that are rounded otherwise. The plain decoder, which the same models
prove right, is given such a cache too: it must agree closely. `transformers`, which has none, must agree as far as
that rounding goes, 2^-11 of each key and value through a few layers; but in a mixture of experts it may tip a near tie
between two experts, after which a few rows are far off, so there it is the common row that is looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from support.architectures import FOLDERS, STEPS, LoadStage, Oracle, Stages, prompt_of
from support.half_cache import HalfCacheBackend
from support.kernels import needs_kernels

from swarmd.node.engine.cpu.native_compute import NativeCompute, why_not
from swarmd.node.engine.decoder_compute import DecoderCompute
from swarmd.node.models.checkpoint import open_checkpoint
from swarmd.node.models.hf_config import FAMILIES

pytestmark = needs_kernels

OF_HALF_CACHE = 3e-4
OF_TRANSFORMERS = 2e-3
"""What logits may differ by, of their whole range."""


@dataclass(frozen=True)
class Saved:
    folder: Path
    first: Oracle
    second: Oracle
    n_layers: int
    experts: bool


@pytest.fixture(scope="module", params=FOLDERS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    model, folder = FOLDERS[request.param](), tmp_path_factory.mktemp("native") / "model"
    if model.config.model_type not in FAMILIES:
        pytest.skip(f"folders of {model.config.model_type} are not read")
    model.save_pretrained(folder)
    first = Oracle.of(model, prompt_of(request.param))
    with open_checkpoint(folder) as checkpoint:
        spec = checkpoint.spec
    if spec.latent is not None:
        pytest.skip("the kernels leave latent attention to plain torch")
    return Saved(folder, first, Oracle.of(model, first.prompt - 7, seed=5), spec.n_layers, spec.moe is not None)


def load_native(path: Path, start: int, end: int, context: int) -> NativeCompute:
    with open_checkpoint(path) as checkpoint:
        assert why_not(checkpoint, start, end) == ""
        return NativeCompute.load(checkpoint, start, end, threads=2, kv_tokens=3 * context, context=context)


def load_plain(path: Path, start: int, end: int, context: int) -> DecoderCompute:
    torch.set_grad_enabled(False)
    with open_checkpoint(path) as checkpoint:
        backend = HalfCacheBackend()
        return DecoderCompute.load(checkpoint, start, end, backend, kv_tokens=3 * context, context=context)


def logits_of(saved: Saved, cuts: Sequence[int], load: LoadStage) -> list[np.ndarray]:
    """Of all tokens of both sequences: a prompt, the other's beside the first's rest, then token by token together."""
    stages = Stages(saved.folder, cuts, load, len(saved.first.tokens))
    half, first, second = saved.first.prompt // 2, saved.first, saved.second
    steps = [{0: first.tokens[:half]}, {0: first.tokens[half : first.prompt], 1: second.tokens[: second.prompt]}]
    for i in range(STEPS):
        a, b = first.prompt + i, second.prompt + i
        steps.append({1: second.tokens[b : b + 1], 0: first.tokens[a : a + 1]})
    found: list[list[np.ndarray]] = [[], []]
    for step in steps:
        for seq, logits in stages.step(step).items():
            found[seq].append(logits)
    return [np.concatenate(parts) for parts in found]


def errors_of_rows(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Each row's worst, of the whole range."""
    return np.abs(found - expected).max(-1) / (expected.max() - expected.min())


def test_logits_whole_and_through_single_layers(saved: Saved) -> None:
    whole = logits_of(saved, [0, saved.n_layers], load_native)
    layers = logits_of(saved, range(saved.n_layers + 1), load_native)
    plain = logits_of(saved, [0, saved.n_layers], load_plain)
    for native, split, half_cache, oracle in zip(whole, layers, plain, (saved.first, saved.second), strict=True):
        assert (split == native).all()
        assert errors_of_rows(native, half_cache).max() < OF_HALF_CACHE
        errors = errors_of_rows(native, oracle.logits)
        assert (np.median(errors) if saved.experts else errors.max()) < OF_TRANSFORMERS
