"""A GGUF file as a `Checkpoint`."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from swarmd.node.engine.gguf_blocks import form_of_type, from_gguf
from swarmd.node.engine.quantized import Weight, WeightForm, llama_row_order
from swarmd.node.engine.tensors import tensor_shapes
from swarmd.node.models.checkpoint import FileRange
from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.gguf import GGUFFile, TensorInfo
from swarmd.node.models.gguf_names import Source, layer_prefix, tensor_sources
from swarmd.node.models.gguf_spec import spec_from_gguf


class GGUFCheckpoint:
    """See `Checkpoint`. Owns the file."""

    def __init__(self, file: GGUFFile) -> None:
        """Raises ModelFileError for an architecture that is not supported."""
        self.name = file.path.name
        self.spec = spec_from_gguf(file.metadata, file.tensors)
        self._file = file
        self._sources = tensor_sources(self.spec, file.tensors)

    @classmethod
    def open(cls, path: Path, *, sparse: bool = False) -> GGUFCheckpoint:
        """See `open_checkpoint`."""
        file = GGUFFile.open(path, sparse=sparse)
        try:
            return cls(file)
        except BaseException:
            file.close()
            raise

    def form(self, tensor: str) -> WeightForm:
        """See `Checkpoint`."""
        info = self._info(tensor)
        return form_of_type(info.name, info.type, info.shape)

    def stored_bytes(self, tensor: str) -> int:
        """See `Checkpoint`."""
        return self._info(tensor).nbytes

    def read(self, tensor: str) -> Weight:
        """See `Checkpoint`. The row order of Q and K is undone on the quantized rows, without loss."""
        info, source = self._info(tensor), self._source(tensor)
        weight = from_gguf(info.name, info.type, self._file.read(info.name), info.shape)
        if source.heads:
            weight = weight.take(llama_row_order(source.heads, info.shape[0] // source.heads))
        return weight

    def check(self, start: int, end: int) -> None:
        """See `Checkpoint`."""
        shapes = tensor_shapes(self.spec, start, end)
        for tensor, shape in shapes.items():
            info = self._info(tensor)
            if info.shape != shape:
                raise ModelFileError(
                    f"tensor {info.name!r} of {self.name} has shape {info.shape}; the header implies {shape}"
                )
        known = {self._source(tensor).tensor for tensor in shapes}
        prefixes = tuple(layer_prefix(layer) for layer in range(start, end))
        for name in self._file.tensors:
            if name.startswith(prefixes) and name not in known:
                raise ModelFileError(
                    f"{self.name} has tensor {name!r}, which {self.spec.architecture} models are not known to use"
                )

    def stage_ranges(self, start: int, end: int) -> list[FileRange]:
        """See `Checkpoint`."""
        infos = [self._info(tensor) for tensor in tensor_shapes(self.spec, start, end)]
        return [FileRange(self.name, info.offset, info.nbytes) for info in infos]

    def close(self) -> None:
        """See `Checkpoint`."""
        self._file.close()

    def __enter__(self) -> GGUFCheckpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _source(self, tensor: str) -> Source:
        source = self._sources.get(tensor)
        if source is None:
            raise ModelFileError(f"{self.name} lacks the tensor for {tensor!r}; it is of another kind of model")
        return source

    def _info(self, tensor: str) -> TensorInfo:
        name = self._source(tensor).tensor
        info = self._file.tensors.get(name)
        if info is None:
            raise ModelFileError(f"{self.name} lacks tensor {name!r}; it is incomplete or of another kind of model")
        return info
