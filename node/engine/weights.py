"""Loading: from a GGUF file to the prepared weights of one stage, and of no other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from swarmd.node.engine.backends.base import Array, Prepared, WeightKeeper
from swarmd.node.engine.gguf_blocks import from_gguf
from swarmd.node.engine.quantized import Weight, llama_row_order
from swarmd.node.engine.spec import EMBEDDING, HEAD, OUTPUT_NORM, ROPE_FACTORS, ArchSpec, tensor_shapes
from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.gguf import GGUFFile

ReportProgress = Callable[[int, int], None]
"""Called with (file bytes loaded, file bytes to load) after each tensor."""


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer, as a backend keeps it; Q, K and V are one matrix, and so are gate and up."""

    attention_norm: Array
    qkv: Prepared
    attention_output: Prepared
    mlp_norm: Array
    gate_up: Prepared
    down: Prepared


@dataclass(frozen=True)
class StageWeights:
    """What one stage holds. `nbytes` counts a tied embedding and head once; `frequencies` (rotary, fp32) not
    at all.
    """

    layers: tuple[LayerWeights, ...]
    embedding: Prepared | None
    output_norm: Array | None
    head: Prepared | None
    frequencies: Array
    nbytes: int


def check_stage_tensors(gguf: GGUFFile, spec: ArchSpec, start: int, end: int) -> None:
    """Raise ModelFileError unless the file has the stage's tensors with the right shapes, and no others in
    its layers.

    A tensor that the decoder does not know (a bias, an adapter) would change the results if it were skipped
    in silence.
    """
    shapes = tensor_shapes(spec, start, end)
    for name, shape in shapes.items():
        info = gguf.tensors.get(name)
        if info is None:
            raise ModelFileError(
                f"{gguf.path.name} lacks tensor {name!r}; it is incomplete or of another kind of model"
            )
        if info.shape != shape:
            raise ModelFileError(
                f"tensor {name!r} of {gguf.path.name} has shape {info.shape}; the header implies {shape}"
            )
    prefixes = tuple(f"blk.{layer}." for layer in range(start, end))
    for name in gguf.tensors:
        if name.startswith(prefixes) and name not in shapes:
            raise ModelFileError(
                f"{gguf.path.name} has tensor {name!r}, which {spec.architecture} models are not known to use"
            )


def load_stage_weights(
    gguf: GGUFFile,
    spec: ArchSpec,
    start: int,
    end: int,
    keeper: WeightKeeper,
    progress: ReportProgress | None = None,
) -> StageWeights:
    """Read, convert and prepare the tensors of layers [start, end), one matrix at a time. Raises
    ModelFileError.
    """
    check_stage_tensors(gguf, spec, start, end)
    return _Loader(gguf, spec, start, end, keeper, progress).load()


class _Loader:
    def __init__(
        self,
        gguf: GGUFFile,
        spec: ArchSpec,
        start: int,
        end: int,
        keeper: WeightKeeper,
        progress: ReportProgress | None,
    ) -> None:
        self._gguf = gguf
        self._spec = spec
        self._start = start
        self._end = end
        self._keeper = keeper
        self._progress = progress
        self._total = sum(gguf.tensors[name].nbytes for name in tensor_shapes(spec, start, end))
        self._done = 0
        self._held = 0

    def load(self) -> StageWeights:
        spec, first, last = self._spec, self._start == 0, self._end == self._spec.n_layers
        embedding = self._matrix(EMBEDDING) if first else None
        layers = tuple(self._layer(layer) for layer in range(self._start, self._end))
        output_norm = self._vector(OUTPUT_NORM) if last else None
        head = None
        if last:
            tied_here = spec.tied_embeddings and embedding is not None
            head = embedding if tied_here else self._matrix(EMBEDDING if spec.tied_embeddings else HEAD)
        frequencies = self._keeper.prepare_vector(self._rope_frequencies())
        return StageWeights(layers, embedding, output_norm, head, frequencies, self._held)

    def _layer(self, layer: int) -> LayerWeights:
        prefix = f"blk.{layer}."
        return LayerWeights(
            attention_norm=self._vector(f"{prefix}attn_norm.weight"),
            qkv=self._matrix(*(f"{prefix}attn_{part}.weight" for part in "qkv")),
            attention_output=self._matrix(f"{prefix}attn_output.weight"),
            mlp_norm=self._vector(f"{prefix}ffn_norm.weight"),
            gate_up=self._matrix(f"{prefix}ffn_gate.weight", f"{prefix}ffn_up.weight"),
            down=self._matrix(f"{prefix}ffn_down.weight"),
        )

    def _matrix(self, *names: str) -> Prepared:
        prepared = self._keeper.prepare([self._weight(name) for name in names])
        self._held += prepared.nbytes
        return prepared

    def _vector(self, name: str) -> Array:
        values = self._weight(name).dequantize()
        self._held += values.nbytes
        return self._keeper.prepare_vector(values)

    def _weight(self, name: str) -> Weight:
        info, spec = self._gguf.tensors[name], self._spec
        weight = from_gguf(name, info.type, self._gguf.read(name), info.shape)
        if spec.qk_permuted and name.endswith("attn_q.weight"):
            weight = weight.take(llama_row_order(spec.n_heads, spec.head_dim))
        elif spec.qk_permuted and name.endswith("attn_k.weight"):
            weight = weight.take(llama_row_order(spec.n_kv_heads, spec.head_dim))
        self._done += info.nbytes
        if self._progress is not None:
            self._progress(self._done, self._total)
        return weight

    def _rope_frequencies(self) -> np.ndarray:
        """Radians per position of each rotated pair, fp32 [rope_dim / 2]."""
        spec = self._spec
        exponents = np.arange(0, spec.rope_dim, 2, dtype=np.float32) / np.float32(spec.rope_dim)
        frequencies = np.float32(1) / np.float32(spec.rope_theta) ** exponents
        if spec.rope_factors:
            frequencies = frequencies / self._weight(ROPE_FACTORS).dequantize()
        if spec.rope_scaling is not None:
            frequencies = frequencies / np.float32(spec.rope_scaling.factor)
        return frequencies.astype(np.float32)
