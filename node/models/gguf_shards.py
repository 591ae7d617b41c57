"""A GGUF model's files, one or several, as one: what `gguf-split` of llama.cpp took apart.

Each shard is a GGUF file with tensors of its own and the keys split.no (from 0), split.count and split.tensors.count;
the first has the model's metadata (tools/gguf-split in llama.cpp).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np

from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.gguf import GGUFFile, TensorInfo
from swarmd.node.models.layout import ModelFile, layout_of


class GGUFShards:
    """The open files of a GGUF model. `name` is the first one's; `metadata` and `tensors` are as in `GGUFFile`."""

    def __init__(self, names: Sequence[str], files: Sequence[GGUFFile]) -> None:
        """`names`: what the files are called within the model. Raises ModelFileError if they don't belong together."""
        self.name = files[0].path.name
        self.metadata = files[0].metadata
        self.files = tuple(zip(names, files, strict=True))
        self.tensors: dict[str, TensorInfo] = {}
        self._file_of: dict[str, tuple[str, GGUFFile]] = {}
        for number, (name, file) in enumerate(self.files):
            check_shard(file, number, len(files))
            self._add(name, file)
        total = self.metadata.get("split.tensors.count", len(self.tensors))
        if len(files) > 1 and total != len(self.tensors):
            raise ModelFileError(
                f"the {len(files)} shards of {self.name} hold {len(self.tensors)} tensors and should hold "
                f"{total!r:.20}; they are of different models, fetch them again"
            )

    @classmethod
    def open(cls, path: Path, *, sparse: bool = False) -> GGUFShards:
        """Open the file, or all shards if it is one of several, whichever. See `GGUFFile.open`."""
        layout = (ModelFile(path.name, path, 0),) if path.suffix.lower() != ".gguf" else layout_of(path).files
        with ExitStack() as stack:
            files = [stack.enter_context(GGUFFile.open(file.path, sparse=sparse)) for file in layout]
            shards = cls([file.name for file in layout], files)
            stack.pop_all()
        return shards

    def read(self, tensor: str) -> np.ndarray:
        """See `GGUFFile.read`."""
        _, file = self._file_of.get(tensor, self.files[0])
        return file.read(tensor)

    def release(self, tensor: str) -> None:
        """See `GGUFFile.release`."""
        self._file_of[tensor][1].release(tensor)

    def file_name_of(self, tensor: str) -> str:
        """What the tensor's file is called within the model."""
        return self._file_of[tensor][0]

    def close(self) -> None:
        """See `GGUFFile.close`."""
        for _, file in self.files:
            file.close()

    def __enter__(self) -> GGUFShards:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _add(self, name: str, file: GGUFFile) -> None:
        for tensor, info in file.tensors.items():
            if tensor in self.tensors:
                raise ModelFileError(
                    f"{file.path.name} and another shard both have tensor {tensor!r}; fetch the shards of one model"
                )
            self.tensors[tensor] = info
            self._file_of[tensor] = (name, file)


def check_shard(file: GGUFFile, number: int, count: int) -> None:
    """Raise ModelFileError unless the file says that it is shard `number` (from 0) of `count`."""
    says = file.metadata.get("split.no", 0), file.metadata.get("split.count", 1) or 1
    if says != (number, count):
        raise ModelFileError(
            f"{file.path.name} says that it is shard {says[0]!r:.20} of {says[1]!r:.20}, counted from 0, not shard "
            f"{number} of {count}; give the shards the names that they were made with"
        )
