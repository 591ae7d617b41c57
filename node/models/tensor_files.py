"""The tensors of all safetensors files of a model, as if they were one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from swarmd.node.engine.quantized import Array
from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.safetensors_file import SafetensorsFile, StoredTensor


class TensorFiles:
    """See the module. Iterating gives the tensors' names."""

    def __init__(self, files: Sequence[tuple[str, Path]], *, sparse: bool = False) -> None:
        """`files`: names within the model, and paths. Raises ModelFileError, also for a tensor that two files have."""
        self._where: dict[str, tuple[str, SafetensorsFile]] = {}
        for name, path in files:
            file = SafetensorsFile(path, sparse=sparse)
            for tensor in file.tensors:
                if tensor in self._where:
                    other = self._where[tensor][0]
                    raise ModelFileError(f"{other} and {name} both hold tensor {tensor!r}; get another copy")
                self._where[tensor] = name, file

    def __contains__(self, tensor: object) -> bool:
        return tensor in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def info(self, tensor: str) -> StoredTensor:
        """Raises ModelFileError where no file has it."""
        return self._file(tensor).tensors[tensor]

    def file_of(self, tensor: str) -> str:
        """The name within the model of the file that holds it. Raises ModelFileError where none does."""
        self._file(tensor)
        return self._where[tensor][0]

    def read(self, tensor: str, start: int = 0, stop: int | None = None) -> Array:
        """See `SafetensorsFile.read`."""
        return self._file(tensor).read(tensor, start, stop)

    def _file(self, tensor: str) -> SafetensorsFile:
        if tensor not in self._where:
            raise ModelFileError(f"the model lacks tensor {tensor!r}; it is incomplete or of another kind of model")
        return self._where[tensor][1]
