"""A GGUF model as a `Checkpoint`."""

from __future__ import annotations

from math import prod
from pathlib import Path
from types import TracebackType

import numpy as np

from swarmd.node.engine.gguf_blocks import form_of_type, from_gguf
from swarmd.node.engine.quantized import Weight, WeightForm, llama_row_order
from swarmd.node.engine.tensors import tensor_shapes
from swarmd.node.models.checkpoint import FileRange
from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.gguf import TensorInfo
from swarmd.node.models.gguf_names import Source, tensor_sources
from swarmd.node.models.gguf_rope import LONG_FACTORS, SHORT_FACTORS
from swarmd.node.models.gguf_shards import GGUFShards
from swarmd.node.models.gguf_spec import spec_from_gguf


class GGUFCheckpoint:
    """See `Checkpoint`. Owns the files."""

    def __init__(self, shards: GGUFShards) -> None:
        """Raises ModelFileError for an architecture that is not supported."""
        self.name = shards.name
        self._shards = shards
        self.spec = spec_from_gguf(shards.metadata, shards.tensors, self._read_vector)
        self._shapes = tensor_shapes(self.spec, 0, self.spec.n_layers)
        self._sources = tensor_sources(self.spec, shards.tensors)

    @classmethod
    def open(cls, path: Path, *, sparse: bool = False) -> GGUFCheckpoint:
        """See `open_checkpoint`. Of a split model, `path` is any of its shards."""
        shards = GGUFShards.open(path, sparse=sparse)
        try:
            return cls(shards)
        except BaseException:
            shards.close()
            raise

    def form(self, tensor: str) -> WeightForm:
        """See `Checkpoint`."""
        info = self._info(tensor)
        return form_of_type(info.name, info.type, self._shapes[tensor])

    def stored_bytes(self, tensor: str) -> int:
        """See `Checkpoint`. Of a tensor that is stored with others, its share."""
        start, end = self._place(tensor)
        return end - start

    def read(self, tensor: str) -> Weight:
        """See `Checkpoint`. The row order of Q and K is undone on the quantized rows, without loss."""
        info, source, shape = self._info(tensor), self._source(tensor), self._shapes[tensor]
        start, end = self._place(tensor)
        weight = from_gguf(info.name, info.type, self._shards.read(info.name)[start:end], shape)
        self._shards.release(info.name)
        if source.heads:
            weight = weight.take(llama_row_order(source.heads, shape[0] // source.heads))
        return weight

    def check(self, start: int, end: int) -> None:
        """See `Checkpoint`. Tensors that nobody knows are refused in other layers too: a header that counts too few
        layers looks like that.
        """
        for tensor in tensor_shapes(self.spec, start, end):
            self._place(tensor)
        known = {source.tensor for source in self._sources.values()} | {LONG_FACTORS, SHORT_FACTORS}
        for name in self._shards.tensors:
            if name not in known:
                raise ModelFileError(
                    f"{self.name} has tensor {name!r}, which {self.spec.architecture} models are not known to use"
                )

    def stage_ranges(self, start: int, end: int) -> list[FileRange]:
        """See `Checkpoint`."""
        infos = {info.name: info for info in map(self._info, tensor_shapes(self.spec, start, end))}
        return [FileRange(self._shards.file_name_of(name), info.offset, info.nbytes) for name, info in infos.items()]

    def close(self) -> None:
        """See `Checkpoint`."""
        self._shards.close()

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
        info = self._shards.tensors.get(name)
        if info is None:
            raise ModelFileError(f"{self.name} lacks tensor {name!r}; it is incomplete or of another kind of model")
        return info

    def _place(self, tensor: str) -> tuple[int, int]:
        """Where the tensor begins and ends within its file's tensor, in bytes. Raises for a shape that is not expected.

        It is a run of whole rows there, and blocks lie within rows.
        """
        info, source = self._info(tensor), self._source(tensor)
        if _squeezed(info.shape) != _squeezed(source.whole):
            raise ModelFileError(
                f"tensor {info.name!r} of {self.name} has shape {info.shape}; the header implies {source.whole}"
            )
        elements = prod(info.shape)
        end = source.first + prod(self._shapes[tensor])
        return info.nbytes * source.first // elements, info.nbytes * end // elements

    def _read_vector(self, name: str, length: int) -> tuple[float, ...]:
        info = self._shards.tensors.get(name)
        if info is None or info.shape != (length,):
            shape = "missing" if info is None else f"of shape {info.shape}"
            raise ModelFileError(f"tensor {name!r} of {self.name} is {shape}; the header implies {(length,)}")
        values = from_gguf(name, info.type, self._shards.read(name), info.shape).dequantize()
        if not (np.isfinite(values).all() and (values > 0).all()):
            raise ModelFileError(f"tensor {name!r} of {self.name} holds values that are not positive; fetch it again")
        return tuple(values.tolist())


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without leading ones: a matrix of one row may be stored as a vector."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape
