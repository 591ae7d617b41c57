"""The draft model of a node: what it takes in memory, and what is said of one that cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.bad_models import BAD_MODELS, write_bad_model
from support.tiny_gguf import TinyModel, Type, write_tiny_gguf
from typer.testing import CliRunner

from swarmd.node.cli.app import app
from swarmd.node.devices import MemoryCaps
from swarmd.node.engine.spec import ArchSpec
from swarmd.node.hardware import Hardware
from swarmd.node.models.draft import DRAFT_KV_TOKENS, bring_draft, require_same_vocabulary
from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.gguf import GGUFFile
from swarmd.node.models.gguf_spec import spec_from_gguf
from swarmd.node.models.store import ModelStore


def started(data_dir: Path, *words: str | Path) -> tuple[int, str]:
    """The exit code of a node that ends at once, and all that it said, on one line."""
    options = ["--model", "none", "--no-mdns", "--listen", "127.0.0.1:0", "--port", "0", *map(str, words)]
    result = CliRunner().invoke(app, ["--data-dir", str(data_dir / "node"), *options])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.output.split())


def spec_of(path: Path) -> ArchSpec:
    with GGUFFile.open(path) as file:
        return spec_from_gguf(file.metadata, file.tensors)


async def test_it_takes_its_weights_and_its_kv(tmp_path: Path):
    short = TinyModel(context_length=64, type=Type.Q8_0)
    long = TinyModel(context_length=2 * DRAFT_KV_TOKENS, type=Type.Q8_0)
    store = ModelStore(tmp_path / "models")
    drafts = []
    for name, model in (("short", short), ("long", long)):
        path = write_tiny_gguf(tmp_path / f"{name}.gguf", model)
        drafts.append(await bring_draft(store, str(path), lambda progress: None))
        assert drafts[-1].path == path
        assert drafts[-1].bytes > path.stat().st_size / 2
    per_token = short.n_layers * 2 * short.n_kv_heads * short.head_dim
    more = drafts[1].bytes - drafts[0].bytes
    assert more >= (DRAFT_KV_TOKENS - 64) * per_token * 2, (
        "two bytes per value at the least, for as many as it may hold"
    )
    assert more <= (2 * DRAFT_KV_TOKENS - 64) * per_token * 4


async def test_its_memory_is_not_offered_to_others():
    hardware = Hardware(memory=MemoryCaps(1_000_000), threads=1, kernels="auto")
    await hardware.find(("cpu",))
    hardware.take(400_000, "it")
    assert [device.memory_limit for device in hardware.devices] == [600_000]
    with pytest.raises(MemoryError, match=r"it needs .*600.*--memory"):
        hardware.take(600_001, "it")
    assert [device.memory_limit for device in hardware.devices] == [600_000]


def test_it_must_have_the_vocabulary_of_the_model(tmp_path: Path):
    draft = write_tiny_gguf(tmp_path / "draft.gguf")
    target = write_tiny_gguf(tmp_path / "target.gguf", TinyModel(n_layers=6))
    require_same_vocabulary(draft, spec_of(draft), spec_of(target))
    other = write_tiny_gguf(tmp_path / "other.gguf", TinyModel(vocab_size=300))
    with pytest.raises(ModelFileError, match=rf"{draft}.*--draft-model"):
        require_same_vocabulary(draft, spec_of(draft), spec_of(other))


@pytest.mark.parametrize("kind", BAD_MODELS)
def test_a_node_does_not_start_with_a_draft_model_that_it_cannot_load(kind: str, tmp_path: Path):
    path, words = write_bad_model(kind, tmp_path)
    code, said = started(tmp_path, "--draft-model", path)
    assert code == 2
    assert f"--draft-model {path}: " in said
    for word in words:
        assert word in said


def test_a_node_does_not_start_with_a_draft_model_that_nobody_knows_or_that_is_too_large(tmp_path: Path):
    code, said = started(tmp_path, "--draft-model", "gremlin:1b")
    assert code == 2
    assert "--draft-model gremlin:1b: no model is called" in said
    path = write_tiny_gguf(tmp_path / "draft.gguf")
    code, said = started(tmp_path, "--draft-model", path, "--memory", "100KB")
    assert code == 2
    assert "models may take" in said
