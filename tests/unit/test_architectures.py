"""Every architecture gives the logits of `transformers`, unsplit, split at every cut, and in company."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from support.architectures import FOLDERS, Oracle, check_batch, check_model, load_torch, prompt_of
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Saved:
    model: PreTrainedModel
    folder: Path
    oracle: Oracle

    @classmethod
    def make(cls, name: str, folder: Path, prompt: int) -> Saved:
        model = FOLDERS[name]()
        model.save_pretrained(folder)
        return cls(model, folder, Oracle.of(model, prompt))

    @property
    def n_layers(self) -> int:
        return self.model.config.num_hidden_layers


@pytest.fixture(scope="module", params=FOLDERS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("architecture") / "model"
    return Saved.make(request.param, folder, prompt_of(request.param))


def test_prefill_and_cached_decode(saved: Saved) -> None:
    check_model(saved.oracle, saved.folder, [0, saved.n_layers], load_torch)


def test_split_at_every_cut(saved: Saved) -> None:
    for cut in range(1, saved.n_layers):
        check_model(saved.oracle, saved.folder, [0, cut, saved.n_layers], load_torch)


def test_two_sequences_in_one_step_through_single_layers(saved: Saved) -> None:
    other = Oracle.of(saved.model, saved.oracle.prompt - 7, seed=5)
    check_batch(saved.oracle, other, saved.folder, range(saved.n_layers + 1), load_torch)


@pytest.mark.parametrize("name", ["phi3 long", "phi4-mini"])
def test_long_rope_keeps_its_short_factors_while_no_sequence_is_long(name: str, tmp_path: Path) -> None:
    saved = Saved.make(name, tmp_path / "model", 60)
    check_model(saved.oracle, saved.folder, [0, 2, saved.n_layers], load_torch)
