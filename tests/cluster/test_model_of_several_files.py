"""A model of several files on one node; the others have none of them, and fetch what their layers are in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.model_folders import write_llama_folder
from support.split_gguf import split_gguf
from support.swarm import Node, join
from support.three_nodes import STORY, split_model, three_nodes
from support.tiny_gguf import TinyModel

from swarmd.node.models.layout import layout_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def shard(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of the four shards of the default model, not the first."""
    return split_gguf(smollm2_path, tmp_path_factory.mktemp("split"), 4)[2]


@pytest.fixture(scope="module")
def nodes(shard: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Node]]:
    with three_nodes(tmp_path_factory.mktemp("three"), shard) as nodes:
        yield nodes


def test_every_node_answers_as_one_with_the_model_in_one_file(nodes: list[Node], solo: Any) -> None:
    alone = solo(STORY, max_tokens=32)
    for node in nodes:
        answer = node.answer(STORY, max_tokens=32, model="Split")
        assert (answer.tokens, answer.text) == (alone.tokens, alone.text)


def test_nodes_without_the_files_have_fetched_those_of_their_layers(nodes: list[Node], shard: Path) -> None:
    whole = layout_of(shard)
    [instance] = nodes[0].get("/api/swarm")["instances"]
    assert instance["model"] == "Split"
    for node in nodes[1:]:
        [fetched] = [path for path in (node.data_dir / "models" / "partial").iterdir() if path.is_dir()]
        files = sorted(fetched.iterdir())
        assert [path.stat().st_size for path in files] == [file.size for file in whole.files]
        taken = sum(path.stat().st_blocks * 512 for path in files)
        [stage] = [stage for stage in instance["stages"] if stage["node"] == node.id]
        share = (stage["end"] - stage["start"]) / 30
        # The last stage has the head too, which is tied to the embedding: 17 of 98 MB.
        assert share / 2 < taken / whole.size < share + 0.4
    assert not list((nodes[0].data_dir / "models" / "partial").glob("*.chunks")), "who has them copies nothing"


FOLDER_OPTIONS = ("--memory", "200MB", "--threads", "1", "--model", "none", "--split")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 10 MB in three files of safetensors."""
    model = TinyModel(n_layers=4, hidden_size=256, ffn_size=512, vocab_size=703)
    return write_llama_folder(tmp_path_factory.mktemp("folder") / "Tiny-Llama", model, shards=3)


def test_a_folder_of_safetensors_is_served_by_a_node_that_has_nothing_of_it(folder: Path, tmp_path: Path) -> None:
    with Node(tmp_path / "alone", *FOLDER_OPTIONS, "--no-mdns") as alone:
        split_model([alone], folder)
        wanted = alone.answer("the then there", max_tokens=24, model="Tiny-Llama")
    assert len(wanted.tokens) > 8
    with Node(tmp_path / "a", *FOLDER_OPTIONS) as first, join(first.token(), tmp_path / "b", *FOLDER_OPTIONS) as second:
        split_model([first, second], folder)
        for node in (first, second):
            assert node.answer("the then there", max_tokens=24, model="Tiny-Llama") == wanted
        [instance] = second.get("/api/swarm")["instances"]
        [stage] = [stage for stage in instance["stages"] if stage["node"] == second.id]
        assert 0 < stage["end"] - stage["start"] < 4
    whole = layout_of(folder)
    [fetched] = [path for path in (tmp_path / "b" / "models" / "partial").iterdir() if path.is_dir()]
    taken = sum(path.stat().st_blocks * 512 for path in fetched.iterdir())
    assert taken < 0.9 * whole.size, "some chunks were never asked for"
    assert (fetched / "config.json").read_bytes() == (folder / "config.json").read_bytes()
