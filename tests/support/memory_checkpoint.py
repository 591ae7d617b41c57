"""A model in memory: random weights of any `ArchSpec`, as a `Checkpoint`."""

from __future__ import annotations

from types import TracebackType

import numpy as np
from support.native_kernels import quantized_weight

from swarmd.node.engine.quantized import DenseWeight, Weight, WeightForm, form_of
from swarmd.node.engine.spec import ArchSpec
from swarmd.node.engine.tensors import EMBEDDING, ROPE_FACTORS, tensor_shapes
from swarmd.node.models.checkpoint import FileRange


class MemoryCheckpoint:
    """Dense fp32 weights whose products keep the size of what they multiply; with `bits`, the layers' matrices but the
    routers are quantized. Norms are around 1, biases and sinks around 0.
    """

    name = "in memory"

    def __init__(self, spec: ArchSpec, seed: int = 1, bits: int | None = None) -> None:
        self.spec = spec
        rng = np.random.default_rng(seed)
        shapes = tensor_shapes(spec, 0, spec.n_layers)
        self._weights = {name: self._random(rng, name, shape, bits) for name, shape in shapes.items()}

    def _random(self, rng: np.random.Generator, name: str, shape: tuple[int, ...], bits: int | None) -> Weight:
        if len(shape) == 1:
            middle = 1.0 if "norm" in name or name == ROPE_FACTORS else 0.0
            return DenseWeight(rng.normal(middle, 0.2, shape).astype(np.float32), "f32")
        if bits is not None and "layers" in name and "router" not in name:
            return quantized_weight(rng, bits, *shape, biased=False)
        size = 1.0 if name == EMBEDDING else 1.5 / shape[1] ** 0.5
        return DenseWeight(rng.normal(0, size, shape).astype(np.float32), "f32")

    def form(self, tensor: str) -> WeightForm:
        """See `Checkpoint`."""
        return form_of(self._weights[tensor])

    def stored_bytes(self, tensor: str) -> int:
        """See `Checkpoint`."""
        return self._weights[tensor].nbytes

    def read(self, tensor: str) -> Weight:
        """See `Checkpoint`."""
        return self._weights[tensor]

    def check(self, start: int, end: int) -> None:
        """Nothing is missing."""

    def stage_ranges(self, start: int, end: int) -> list[FileRange]:
        """There are no files."""
        return []

    def close(self) -> None:
        """There are no files."""

    def __enter__(self) -> MemoryCheckpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return
