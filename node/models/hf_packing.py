"""How a folder's matrices are packed: the seam between names, stacks and rows, which are the checkpoint's, and ways of
quantization. Floats are the plain way; hf_quantized.py chooses.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from swarmd.node.engine.quantized import DenseWeight, FloatType, Weight, WeightForm
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
        rows = slice(source.first, source.first + source.rows * source.step, source.step)
        if not source.experts and source.step == 1 and not source.transposed:
            return DenseWeight(files.read(source.tensor, rows.start, rows.stop), kind)
        values = files.read(source.tensor, source.expert, source.expert + 1)[0]
        return DenseWeight(np.ascontiguousarray((values.T if source.transposed else values)[rows]), kind)


def _float_type(info: StoredTensor) -> FloatType:
    kind = FLOATS.get(info.dtype)
    if kind is None:
        raise ModelFileError(
            f"tensor {info.name!r} is of type {info.dtype}, which is not supported here; supported are "
            f"{', '.join(FLOATS)}"
        )
    return kind
