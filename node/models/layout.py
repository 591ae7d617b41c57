"""Which files make up a model, in which order: one GGUF file, the shards of a split one, or a folder of safetensors.

A folder has the shape that Hugging Face's libraries and MLX write: config.json, the tokenizer's files, and either one
model.safetensors or several files that model.safetensors.index.json names. Split GGUF files are named as llama.cpp's
gguf-split does: NAME-00001-of-00003.gguf. Pickled weights (*.bin, *.pt) are never read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from swarmd.node.models.errors import ModelFileError

METADATA_NAMES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "quantize_config.json",
    "model.safetensors.index.json",
)
"""The files beside the weights that belong to a model where they exist, in this order; others do not."""
TEMPLATE_FOLDER = "additional_chat_templates"
INDEX_NAME = "model.safetensors.index.json"
MAX_FILES = 1024
MAX_METADATA_BYTES = 128 << 20
"""The largest file beside the weights; tokenizers of 256,000 tokens take 35 MB."""
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".npz")

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=-]{0,127}")
# Names of devices on Windows, whatever ending follows: what is fetched here may be copied there.
_DEVICE_NAME = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_SAFETENSORS_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)


@dataclass(frozen=True)
class ModelFile:
    """One file of a model: `name` within the model, the same on every machine, `path` on this one, `size` in bytes."""

    name: str
    path: Path
    size: int


@dataclass(frozen=True)
class ModelLayout:
    """A model on this machine: `path` is what to open (the GGUF file, the first shard, or the folder), `files` are in
    the order in which the model's identity and its chunks count them.
    """

    path: Path
    files: tuple[ModelFile, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def layout_of(path: Path) -> ModelLayout:
    """The files of the model at `path`: a GGUF file (of a split model: any of its shards), or a folder.

    Reads file names, sizes and the index of safetensors only, follows symbolic links (a hub's cache is made of them).
    Raises ModelFileError, which names what is missing or not understood. Blocking.
    """
    path = path.absolute()
    try:
        if path.is_dir():
            if path.suffix.lower() == ".gguf":
                raise ModelFileError(f"{path} is a folder, not a GGUF file; check the path")
            return _folder(path)
        if not path.exists():
            raise ModelFileError(f"there is no file or folder {path}; check the path (nothing is fetched from a hub)")
        if path.suffix.lower() != ".gguf":
            raise ModelFileError(f"{path} is not a GGUF file; give one, or the folder of a model in safetensors")
        return _gguf(path)
    except OSError as error:
        raise ModelFileError(f"{path} can't be read ({error.strerror}); check its permissions") from error


def placed(root: Path, sizes: Sequence[tuple[str, int]]) -> ModelLayout:
    """Where files of these names and sizes lie, or are to lie, below `root`: a file if it is one, else a folder.

    The names must be a layout (`is_layout`).
    """
    if len(sizes) == 1:
        return ModelLayout(root, (ModelFile(sizes[0][0], root, sizes[0][1]),))
    files = tuple(ModelFile(name, root / name, size) for name, size in sizes)
    return ModelLayout(files[0].path if files[0].name.endswith(".gguf") else root, files)


def is_layout(names: Sequence[str]) -> bool:
    """Whether these could be the names of a model's files, in order.

    What passes is safe to create below a folder of our own, on file systems that ignore case too: names are plain, no
    two are the same, and none leaves the folder.
    """
    if not 0 < len(names) <= MAX_FILES or len({name.lower() for name in names}) < len(names):
        return False
    if names[0].endswith(".gguf"):
        return tuple(names) == gguf_names(len(names))
    metadata = [name for name in names if not name.endswith(".safetensors")]
    weights = sorted(set(names) - set(metadata))
    if not weights or not all(_is_plain(name) for name in weights):
        return False
    return "config.json" in metadata and list(names) == [*_in_order(metadata), *weights]


def gguf_names(count: int) -> tuple[str, ...]:
    """What the files of a model of `count` GGUF files are called within the model, whatever its owner calls them."""
    if count == 1:
        return ("model.gguf",)
    return tuple(f"model-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1))


def present_metadata(folder: Path) -> list[str]:
    """The files beside the weights that a folder has, in order."""
    templates = [f"{TEMPLATE_FOLDER}/{path.name}" for path in (folder / TEMPLATE_FOLDER).glob("*.jinja")]
    found = [name for name in METADATA_NAMES if (folder / name).is_file()]
    return found + sorted(templates)


def model_name(path: Path) -> str:
    """What to call the model at a path: its folder, or its file without the ending and the number of the shard.

    A snapshot in a hub's cache (models--OWNER--NAME/snapshots/COMMIT) is called after the model. What a model's name
    can't hold becomes "-".
    """
    path = Path(os.path.abspath(path))
    name = path.name
    if path.suffix.lower() == ".gguf":
        shard = shard_of(path.name)
        name = shard[0] if shard else path.stem
    elif path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        name = path.parent.parent.name.rpartition("--")[2]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:96] or "model"


def shard_of(name: str) -> tuple[str, int, int] | None:
    """(name, number from 1, count) of a shard's file name; None for a file that is none."""
    found = _SHARD.fullmatch(name)
    if found is None or not 1 <= int(found[2]) <= int(found[3]):
        return None
    return found[1], int(found[2]), int(found[3])


def _gguf(path: Path) -> ModelLayout:
    shard = shard_of(path.name)
    if shard is None or shard[2] == 1:
        return ModelLayout(path, (ModelFile("model.gguf", path, path.stat().st_size),))
    stem, _, count = shard
    if count > MAX_FILES:
        raise ModelFileError(f"{path.name} says that it is one of {count} shards; at most {MAX_FILES} are supported")
    paths = [path.with_name(f"{stem}-{number:05}-of-{count:05}{path.suffix}") for number in range(1, count + 1)]
    return ModelLayout(paths[0], tuple(_found(path.parent, zip(gguf_names(count), paths, strict=True))))


def _folder(folder: Path) -> ModelLayout:
    metadata = present_metadata(folder)
    weights = _weight_names(folder)
    if "config.json" not in metadata:
        raise ModelFileError(f"{folder} has no config.json; give a folder as Hugging Face's or MLX's tools write it")
    names = [*metadata, *weights]
    for name in names:
        if not all(_is_plain(piece) for piece in name.split("/")):
            raise ModelFileError(
                f"{folder} has a file with the name {name[:140]!r}; rename it to letters, digits and ._+=- only"
            )
    if not is_layout(names):
        raise ModelFileError(
            f"the {len(names)} files of {folder} can't be told apart without regard to case, or are more than "
            f"{MAX_FILES}; save the model again"
        )
    files = tuple(_found(folder, ((name, folder / name) for name in names)))
    for file in files[: len(metadata)]:
        if file.size > MAX_METADATA_BYTES:
            raise ModelFileError(f"{file.path} has {file.size} bytes, too many for such a file; download it again")
    return ModelLayout(folder, files)


def _weight_names(folder: Path) -> list[str]:
    """The names of the weights' files, in order, whether they are there or not."""
    if (folder / INDEX_NAME).is_file():
        return _indexed_names(folder / INDEX_NAME)
    if (folder / "model.safetensors").is_file():  # others are the same weights in another form, or adapters
        return ["model.safetensors"]
    if found := {path.name for path in folder.glob("*.safetensors")}:
        return sorted(found | {name for one in found for name in _siblings(one)})
    if any(path.suffix in PICKLED for path in folder.iterdir()):
        raise ModelFileError(
            f"{folder} holds pickled weights only (*.bin, *.pt), which can run code when they are read and are not "
            "supported; get the model as safetensors or GGUF"
        )
    if shards := sorted(path.name for path in folder.glob("*.gguf")):
        raise ModelFileError(f"{folder} holds GGUF files; give the path of one of them, for example {shards[0]}")
    raise ModelFileError(f"{folder} has no *.safetensors files; give the folder or the GGUF file of a model")


def _siblings(name: str) -> list[str]:
    """All of NAME-00001-of-00003.safetensors; nothing for another name."""
    found = _SAFETENSORS_SHARD.fullmatch(name)
    count = min(int(found[3]), MAX_FILES) if found else 0
    return [f"{found[1]}-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)] if found else []


def _indexed_names(index: Path) -> list[str]:
    if index.stat().st_size > MAX_METADATA_BYTES:
        raise ModelFileError(f"{index} is too large for an index; download it again")
    try:
        names = sorted(set(msgspec.json.decode(index.read_bytes(), type=_Index).weight_map.values()))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ModelFileError(f"{index} is damaged ({error}); download it again") from None
    for name in names:
        if not name.endswith(".safetensors"):
            raise ModelFileError(f"{index} names {name[:140]!r}, which is not a safetensors file; get another copy")
    if not names:
        raise ModelFileError(f"{index} names no files; download it again")
    return names


def _found(folder: Path, wanted: Iterator[tuple[str, Path]]) -> Iterator[ModelFile]:
    for name, path in wanted:
        if not path.is_file():
            raise ModelFileError(f"{path.name} of the model in {folder} is missing; download it too")
        yield ModelFile(name, path, path.stat().st_size)


def _in_order(metadata: Collection[str]) -> list[str]:
    """Those of the names that can be files beside the weights, in their order."""
    templates = sorted(
        name for name in metadata if name.startswith(f"{TEMPLATE_FOLDER}/") and _is_template(name.split("/", 1)[1])
    )
    return [name for name in METADATA_NAMES if name in metadata] + templates


def _is_template(name: str) -> bool:
    return name.endswith(".jinja") and _is_plain(name)


def _is_plain(name: str) -> bool:
    """Whether a file of this name can be made anywhere and is that file."""
    return _PLAIN_NAME.fullmatch(name) is not None and _DEVICE_NAME.fullmatch(name) is None
