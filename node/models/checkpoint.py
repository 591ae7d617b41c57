"""A model's weights under canonical names, whatever kind of file holds them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

from swarmd.node.engine.quantized import Weight, WeightForm
from swarmd.node.engine.spec import ArchSpec


@dataclass(frozen=True)
class FileRange:
    """Bytes [offset, offset + nbytes) of one of the model's files; `file` is its plain name."""

    file: str
    offset: int
    nbytes: int


class Checkpoint(Protocol):
    """An open model. Names of tensors are those of engine/tensors.py; only what is read is touched.

    `name` is the file's or folder's, for messages. All methods raise ModelFileError for what the files do not hold, or
    hold in a form that is not supported, naming tensor and type.
    """

    name: str
    spec: ArchSpec

    def form(self, tensor: str) -> WeightForm:
        """In what form `read` gives a matrix; vectors are dense."""
        ...

    def stored_bytes(self, tensor: str) -> int:
        """Bytes that the tensor takes in its file."""
        ...

    def read(self, tensor: str) -> Weight:
        """The tensor as a copy, in canonical form, row order and layout."""
        ...

    def check(self, start: int, end: int) -> None:
        """Raise unless the tensors of layers [start, end) are all there with the right shapes, and no others.

        A tensor that the decoder does not know (an adapter, say) would change the results if it were skipped.
        """
        ...

    def stage_ranges(self, start: int, end: int) -> list[FileRange]:
        """Where the tensors of layers [start, end) lie."""
        ...

    def close(self) -> None:
        """Release the files."""
        ...

    def __enter__(self) -> Checkpoint: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_checkpoint(path: str | os.PathLike[str], *, sparse: bool = False) -> Checkpoint:
    """Open the model at `path`: a GGUF file, or a folder of safetensors.

    `sparse` says that files have their full length but only some tensors' bytes. Raises ModelFileError for anything
    that is not a complete, well-formed model of a kind that is supported.
    """
    path = Path(path)
    if path.is_dir():
        from swarmd.node.models.hf_checkpoint import HFCheckpoint

        return HFCheckpoint.open(path, sparse=sparse)
    from swarmd.node.models.gguf_checkpoint import GGUFCheckpoint

    return GGUFCheckpoint.open(path, sparse=sparse)
