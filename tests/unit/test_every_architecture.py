"""Every architecture, as a folder and as a GGUF file, on every kind of device: the logits of `transformers`.

The broad view, by the way that a stage process takes, of which docs/models.md is made. Splits, batches and what else
may go wrong are looked at where each part is tested.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from support.architectures import FOLDERS, Oracle, prompt_of
from support.backends import BACKENDS, Backend, differences, found, loader_of
from support.gguf_from_hf import write_gguf_of
from support.tiny_hf import CASES

from swarmd.node.engine.cpu.native_compute import why_not
from swarmd.node.models.checkpoint import open_checkpoint

TOLERANCE = {"native": 2e-3, "torch": 2e-4, "mlx": 2e-4, "cuda": 3e-2}
"""Of the logits' whole range. The kernels keep keys and values in fp16; CUDA computes in bf16."""


CASES_OF_FORMS = [
    *(pytest.param((case, "folder", ""), id=f"{case}, folder") for case in FOLDERS),
    *(pytest.param((case, "gguf", ""), id=f"{case}, GGUF") for case in CASES),
    pytest.param(("mistral", "gguf", "mistral3"), id="mistral3, GGUF"),
]
"""The case, the form, and what the file calls it if not by the converter's usual name. What only FOLDERS has, GGUF
files do not say, or it is the same there."""


@dataclass(frozen=True)
class Saved:
    case: str
    form: str
    oracle: Oracle
    path: Path


@pytest.fixture(scope="module", params=CASES_OF_FORMS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    case, form, name = request.param
    model, path = FOLDERS[case](), tmp_path_factory.mktemp("model") / f"model.{form}"
    if form == "folder":
        model.save_pretrained(path)
    else:
        write_gguf_of(model, path, architecture=name)
    return Saved(case, form, Oracle.of(model, prompt_of(case)), path)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_are_those_of_transformers(saved: Saved, backend: Backend, proves: Callable[..., None]) -> None:
    with open_checkpoint(saved.path) as checkpoint:
        spec = checkpoint.spec
        reason = why_not(checkpoint, 0, spec.n_layers) if backend == "native" else ""
    if missing := found(backend)[1] or reason:
        proves(saved.form, spec.architecture, backend, "torch instead" if reason else "not run", words=missing)
        pytest.skip(missing)
    errors = differences(saved.oracle, saved.path, spec.n_layers, loader_of(backend))
    # Rounding keys may tip a near tie between two experts, after which a row is far off: the common row counts.
    worst = float(np.median(errors) if spec.moe and backend in ("native", "cuda") else errors.max())
    assert worst < TOLERANCE[backend]
    proves(saved.form, spec.architecture, backend, "works", case=saved.case, delta=worst, device=found(backend)[0])
