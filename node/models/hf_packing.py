"""How a folder's matrices are packed: the seam between names, stacks and rows, which are the checkpoint's, and ways of
quantization. Floats are the plain way; hf_quantized.py chooses.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from swarmd.node.engine.quantized import Array, DenseWeight, FloatType, Weight, WeightForm
from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.hf_names import Source
from swarmd.node.models.safetensors_file import StoredTensor
from swarmd.node.models.tensor_files import TensorFiles

FLOATS: dict[str, FloatType] = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


class Packing(Protocol):
    """One way in which matrices are stored, as tensors of the files that hold one between them.

    `Source.tensor` is what a matrix is called where it is not quantized (X.weight); vectors and matrices that were left
    as they are must be understood too (`PlainPacking` does). All methods raise ModelFileError that names the tensor.
    """

    def parts(self, tensor: str, files: TensorFiles) -> tuple[str, ...]:
        """The files' tensors that hold what would be called `tensor`; () where there is none."""
        ...

    def shape(self, source: Source, files: TensorFiles) -> tuple[int, ...]:
        """What is there, of one expert, before rows are chosen; must be (source.total, columns), (source.total,) for
        vectors."""
        ...

    def form(self, source: Source, files: TensorFiles) -> WeightForm:
        """In what form `read` gives it."""
        ...

    def read(self, source: Source, files: TensorFiles) -> Weight:
        """The source's rows, of its expert, as a copy."""
        ...


class PlainPacking:
    """Floats; see `Packing`."""

    def parts(self, tensor: str, files: TensorFiles) -> tuple[str, ...]:
        """See `Packing`."""
        return (tensor,) if tensor in files else ()

    def shape(self, source: Source, files: TensorFiles) -> tuple[int, ...]:
        """See `Packing`."""
        shape = files.info(source.tensor).shape
        if source.experts:
            if len(shape) < 2 or shape[0] != source.experts:
                raise ModelFileError(
                    f"tensor {source.tensor!r} has shape {shape}; config.json implies {source.experts} experts"
                )
            shape = shape[1:]
        return shape[::-1] if source.transposed else shape

    def form(self, source: Source, files: TensorFiles) -> WeightForm:
        """See `Packing`."""
        return WeightForm(_float_type(files.info(source.tensor)))

    def read(self, source: Source, files: TensorFiles) -> Weight:
        """See `Packing`."""
        kind = _float_type(files.info(source.tensor))
        if not source.transposed:
            return DenseWeight(rows_of(source, source.tensor, files), kind)
        values = files.read(source.tensor, source.expert, source.expert + 1)[0]
        return DenseWeight(np.ascontiguousarray(values.T[_chosen(source)]), kind)


def rows_of(source: Source, tensor: str, files: TensorFiles) -> Array:
    """The source's rows, of its expert, of a tensor whose rows are those of the matrix: a fresh, contiguous array."""
    rows = _chosen(source)
    if not source.experts and source.step == 1:
        return files.read(tensor, rows.start, rows.stop)
    values = files.read(tensor, source.expert, source.expert + 1)[0] if source.experts else files.read(tensor)
    return np.ascontiguousarray(values[rows])


def _chosen(source: Source) -> slice:
    return slice(source.first, source.first + source.rows * source.step, source.step)


def _float_type(info: StoredTensor) -> FloatType:
    kind = FLOATS.get(info.dtype)
    if kind is None:
        raise ModelFileError(
            f"tensor {info.name!r} is of type {info.dtype}, which is not supported here; supported are "
            f"{', '.join(FLOATS)}"
        )
    return kind
