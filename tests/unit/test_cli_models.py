"""Models on the command line without a node: what cannot be served is refused at once, and says why."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.bad_models import BAD_MODELS, write_bad_model
from support.model_folders import write_folder
from support.tiny_gguf import write_tiny_gguf
from typer.testing import CliRunner

from swarmd.node.cli.app import app
from swarmd.node.cli.models import check_servable
from swarmd.node.config import ConfigError
from swarmd.node.data_dir import DataDir


def swarmd(data_dir: Path, *words: str | Path) -> tuple[int, str]:
    """The exit code of a command, and all that it said, on one line."""
    result = CliRunner().invoke(app, ["--data-dir", str(data_dir / "node"), *map(str, words)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.output.split())


@pytest.mark.parametrize("kind", BAD_MODELS)
def test_a_node_does_not_start_with_a_model_that_it_could_never_serve(kind: str, tmp_path: Path):
    path, words = write_bad_model(kind, tmp_path)
    code, said = swarmd(tmp_path, "--model", path)
    assert code == 2
    assert said.startswith("swarmd: --model: ")
    for word in words:
        assert word in said


@pytest.mark.parametrize("kind", [kind for kind in BAD_MODELS if kind != "unknown architecture"])
def test_a_bad_file_is_not_pulled(kind: str, tmp_path: Path):
    path, words = write_bad_model(kind, tmp_path)
    code, said = swarmd(tmp_path, "pull", path)
    assert code == 1
    for word in words:
        assert word in said


@pytest.mark.parametrize("words", [["--model", "no-such-model"], ["pull", "no-such-model"]])
def test_an_unknown_name_lists_what_is_known(words: list[str], tmp_path: Path):
    code, said = swarmd(tmp_path, *words)
    assert code == (2 if "--model" in words else 1)
    assert "no model is called 'no-such-model'; known here: smollm2:135m" in said
    assert "give the path of its GGUF file" in said


def test_a_file_that_is_pulled_is_listed_and_can_be_served_by_its_name(tmp_path: Path):
    path = write_tiny_gguf(tmp_path / "tiny-llama.gguf")
    code, said = swarmd(tmp_path, "pull", path)
    assert code == 0
    assert "tiny-llama is on this machine" in said
    code, said = swarmd(tmp_path, "models")
    assert code == 0
    assert "tiny-llama" in said
    check_servable(DataDir(tmp_path / "node"), "tiny-llama")
    with pytest.raises(ConfigError, match="known here"):
        check_servable(DataDir(tmp_path / "node"), "tiny-llama-2")
    check_servable(DataDir(tmp_path / "node"), "none")


def test_a_folder_is_pulled_where_it_lies_and_listed_by_its_name(tmp_path: Path):
    folder = write_folder(tmp_path / "My Model", {"model.safetensors": 1000})
    code, said = swarmd(tmp_path, "pull", folder)
    assert code == 0
    assert "My-Model is on this machine" in said
    assert "My-Model" in swarmd(tmp_path, "models")[1]
    (folder / "model.safetensors").unlink()
    code, said = swarmd(tmp_path, "pull", folder)
    assert code == 1
    assert "model.safetensors of the model in" in said
    assert "My-Model" not in swarmd(tmp_path, "models")[1]


def test_a_path_that_is_no_model_says_what_would_be_one(tmp_path: Path):
    for path, words in (("./pytorch_model.bin", "pickled weights"), ("owner/name", "there is no file or folder")):
        code, said = swarmd(tmp_path, "--model", path)
        assert code == 2
        assert words in said
