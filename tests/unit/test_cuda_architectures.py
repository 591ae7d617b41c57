"""The CUDA compute's code, run on the CPU in fp32: every architecture, through its paged cache and filled-up steps."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.architectures import FOLDERS, Oracle, check_batch, check_model, prompt_of
from support.cuda_twin import load_twin

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=FOLDERS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Oracle, Path, int]:
    model = FOLDERS[request.param]()
    folder = tmp_path_factory.mktemp("cuda") / "model"
    model.save_pretrained(folder)
    return Oracle.of(model, prompt_of(request.param)), folder, model.config.num_hidden_layers


def test_prefill_and_cached_decode(saved: tuple[Oracle, Path, int]) -> None:
    oracle, folder, n_layers = saved
    check_model(oracle, folder, [0, n_layers], load_twin)


def test_split_in_the_middle(saved: tuple[Oracle, Path, int]) -> None:
    oracle, folder, n_layers = saved
    check_model(oracle, folder, [0, n_layers // 2, n_layers], load_twin)


def test_two_sequences_in_one_step(saved: tuple[Oracle, Path, int]) -> None:
    oracle, folder, n_layers = saved
    other = Oracle.of(oracle.model, oracle.prompt - 7, seed=5)
    check_batch(oracle, other, folder, [0, n_layers], load_twin)
