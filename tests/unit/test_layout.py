"""Which files make up the model at a path, and what is refused with words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.model_folders import safetensors_bytes, write_folder, write_split_gguf
from support.package_index import write_tiny_gguf

from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.heads import head_sizes
from swarmd.node.models.layout import TEMPLATE_FOLDER, is_layout, layout_of, model_name, placed

SHARDS = {"model-00001-of-00002.safetensors": 5000, "model-00002-of-00002.safetensors": 3000}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "Tiny-Folder", SHARDS)


def names(path: Path) -> list[str]:
    return [file.name for file in layout_of(path).files]


def test_a_gguf_file_is_a_model_of_one_file(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "Any Name.gguf")
    layout = layout_of(path)
    assert (layout.path, [file.path for file in layout.files]) == (path, [path])
    assert (names(path), layout.size) == (["model.gguf"], path.stat().st_size)


def test_any_shard_names_the_whole_split_model(tmp_path: Path) -> None:
    paths = write_split_gguf(tmp_path, 3)
    assert {layout_of(path) for path in paths} == {layout_of(paths[0])}
    layout = layout_of(paths[2])
    assert layout.path == paths[0]
    assert [file.path for file in layout.files] == paths
    assert [file.name for file in layout.files] == [f"model-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    assert all(0 < head < 4096 for head in head_sizes(layout))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    paths = write_split_gguf(tmp_path, 3)
    paths[1].unlink()
    with pytest.raises(ModelFileError, match=r"Tiny Model-00002-of-00003\.gguf .*missing"):
        layout_of(paths[0])


def test_shards_under_names_that_are_not_theirs_are_found_out(tmp_path: Path) -> None:
    first, second = write_split_gguf(tmp_path, 2)
    shutil.copy(first, second)
    with pytest.raises(ModelFileError, match=r"00002-of-00002\.gguf says that it is shard 0 of 2"):
        head_sizes(layout_of(first))
    alone = first.rename(tmp_path / "alone.gguf")
    with pytest.raises(ModelFileError, match=r"alone\.gguf says that it is shard 0 of 2"):
        head_sizes(layout_of(alone))


def test_a_folder_has_its_metadata_first_and_then_what_the_index_names(folder: Path) -> None:
    (folder / "README.md").write_text("not a part of the model")
    (folder / "consolidated.safetensors").write_bytes(safetensors_bytes(10))
    (folder / TEMPLATE_FOLDER).mkdir()
    (folder / TEMPLATE_FOLDER / "tool_use.jinja").write_text("{{ messages }}")
    layout = layout_of(folder)
    assert layout.path == folder
    assert names(folder) == [
        "config.json",
        "tokenizer.json",
        "model.safetensors.index.json",
        f"{TEMPLATE_FOLDER}/tool_use.jinja",
        *SHARDS,
    ]
    sizes = [file.size for file in layout.files]
    heads = head_sizes(layout)
    assert heads[:4] == tuple(sizes[:4]), "files without tensors are read whole"
    assert [size - head for size, head in zip(sizes, heads, strict=True)][4:] == list(SHARDS.values())


def test_without_an_index_one_file_is_the_model_and_else_all_are(tmp_path: Path) -> None:
    several = write_folder(tmp_path / "b", {"weights.01.safetensors": 1, "weights.00.safetensors": 1}, indexed=False)
    assert names(several)[-2:] == ["weights.00.safetensors", "weights.01.safetensors"]
    (several / "weights.01.safetensors").rename(several / "weights-00001-of-00002.safetensors")
    with pytest.raises(ModelFileError, match=r"weights-00002-of-00002\.safetensors .*missing"):
        layout_of(several)
    one = write_folder(tmp_path / "a", {"model.safetensors": 1, "adapter.safetensors": 1}, indexed=False)
    assert names(one) == ["config.json", "tokenizer.json", "model.safetensors"]


def test_symbolic_links_into_a_hubs_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--Someone--Tiny-1B" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for file in layout_of(folder).files:
        (snapshot / file.name).symlink_to(file.path)
    assert [(file.name, file.size) for file in layout_of(snapshot).files] == [
        (file.name, file.size) for file in layout_of(folder).files
    ]
    assert model_name(snapshot) == "Tiny-1B"


@pytest.mark.parametrize(
    "name", ["../config.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "model.bin", "a b.safetensors", ""]
)
def test_an_index_can_name_plain_safetensors_files_only(folder: Path, name: str) -> None:
    index = {"weight_map": {"weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelFileError, match="name"):
        layout_of(folder)


@pytest.mark.parametrize("content", [b"", b"{", b'{"weight_map": 3}', b'{"weight_map": {}}', b"\xff"])
def test_a_damaged_index_is_refused(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(ModelFileError, match=r"model\.safetensors\.index\.json"):
        layout_of(folder)


def test_what_a_folder_lacks_is_said(folder: Path, tmp_path: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelFileError, match=r"model-00002-of-00002\.safetensors .*missing"):
        layout_of(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelFileError, match=r"no config\.json"):
        layout_of(folder)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ModelFileError, match=r"no \*\.safetensors"):
        layout_of(empty)
    (empty / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ModelFileError, match="pickled"):
        layout_of(empty)
    (empty / "pytorch_model.bin").unlink()
    write_tiny_gguf(empty / "x.gguf")
    with pytest.raises(ModelFileError, match=r"for example x\.gguf"):
        layout_of(empty)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"", "not a safetensors file"),
        (b"\xff" * 100, "not a safetensors file"),
        ((1 << 40).to_bytes(8, "little") + b'{"a":1}', "not a safetensors file"),
    ],
)
def test_a_file_that_is_no_safetensors_is_refused(folder: Path, content: bytes, words: str) -> None:
    (folder / "model-00001-of-00002.safetensors").write_bytes(content)
    with pytest.raises(ModelFileError, match=words):
        head_sizes(layout_of(folder))


@pytest.mark.parametrize(
    "hostile",
    [
        [],
        ["x.gguf"],
        ["model-00001-of-00002.gguf"],
        ["model-00002-of-00002.gguf", "model-00001-of-00002.gguf"],
        ["config.json"],
        ["model.safetensors"],
        ["model.safetensors", "config.json"],
        ["config.json", "../model.safetensors"],
        ["config.json", "/model.safetensors"],
        ["config.json", "a/model.safetensors"],
        ["config.json", "a\\model.safetensors"],
        ["config.json", ".model.safetensors"],
        ["config.json", "model\n.safetensors"],
        ["config.json", "model\0.safetensors"],
        ["config.json", "mod\u00e9l.safetensors"],
        ["config.json", "MODEL.safetensors", "model.safetensors"],
        ["config.json", "model.safetensors", "model.safetensors"],
        ["config.json", "b.safetensors", "a.safetensors"],
        ["config.json", "x.py", "model.safetensors"],
        ["tokenizer.json", "config.json", "model.safetensors"],
        ["config.json", f"{TEMPLATE_FOLDER}/../x.jinja", "model.safetensors"],
        ["config.json", f"{TEMPLATE_FOLDER}/a/x.jinja", "model.safetensors"],
        ["config.json", f"{TEMPLATE_FOLDER}/.jinja", "model.safetensors"],
        ["config.json", f"{TEMPLATE_FOLDER}/x.sh", "model.safetensors"],
        ["config.json", f"{TEMPLATE_FOLDER.upper()}/x.jinja", "model.safetensors"],
        ["config.json", "a" * 200 + ".safetensors"],
        ["config.json", *(f"{number:04}.safetensors" for number in range(1024))],
    ],
)
def test_names_that_a_peer_could_make_up_are_no_layout(hostile: list[str]) -> None:
    assert not is_layout(hostile)


def test_names_of_real_models_are_a_layout(folder: Path, tmp_path: Path) -> None:
    for path in (folder, write_split_gguf(tmp_path / "s", 2)[0], write_tiny_gguf(tmp_path / "x.gguf")):
        layout = layout_of(path)
        assert is_layout([file.name for file in layout.files])
        other = placed(tmp_path / "other", [(file.name, file.size) for file in layout.files])
        assert [file.size for file in other.files] == [file.size for file in layout.files]
        assert all(file.path == tmp_path / "other" or file.path.is_relative_to(tmp_path) for file in other.files)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("a/Qwen3-0.6B", "Qwen3-0.6B"),
        ("a/Qwen3-0.6B/", "Qwen3-0.6B"),
        ("a/b/..", "a"),
        ("a/x.Q4_K_M.gguf", "x.Q4_K_M"),
        ("a/x-00002-of-00003.gguf", "x"),
        ("models--o--Llama-3/snapshots/abc", "Llama-3"),
        ("Tiny Model (1).gguf", "Tiny-Model-1"),
        ("\u6a21\u578b", "model"),
        ("/", "model"),
        ("a/x-00003-of-00002.gguf", "x-00003-of-00002"),
    ],
)
def test_a_model_is_called_after_its_file_or_folder(path: str, name: str) -> None:
    assert model_name(Path(path)) == name
