"""One native stage with weights of the test's choosing, driven through the C interface, its KV pools in plain sight."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from swarmd.node.engine.block_table import BLOCK
from swarmd.node.engine.cpu.bindings import TILE, Batch, load
from swarmd.node.engine.cpu.matrices import NativeMatrix, aligned
from swarmd.node.engine.cpu.stage_structs import StageStructs
from swarmd.node.engine.quantized import DenseWeight, Weight
from swarmd.node.engine.spec import ArchSpec, LayerSpec
from swarmd.node.engine.weights import (
    AttentionWeights,
    LayerWeights,
    Linear,
    MlpWeights,
    MoeWeights,
    Rotation,
    StageWeights,
)

NOT_A_NUMBER = np.uint16(0x7E00)


class Shape(NamedTuple):
    """A layer's sizes."""

    hidden: int
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 2
    ffn: int = 32

    @property
    def attended(self) -> int:
        """Outputs of attention."""
        return self.heads * self.head_dim

    @property
    def qkv(self) -> int:
        """Rows of the stacked Q, K and V."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim


class Part(NamedTuple):
    """Consecutive rows of one sequence in a step: `x` [rows, hidden] from position `start` on."""

    seq: int
    start: int
    x: np.ndarray


def dense(values: np.ndarray) -> DenseWeight:
    """An fp32 matrix as a file stores it."""
    return DenseWeight(np.ascontiguousarray(values, np.float32), "f32")


def zeros(rows: int, columns: int) -> DenseWeight:
    """A matrix that gives nothing."""
    return dense(np.zeros((rows, columns)))


@dataclass
class LayerParts:
    """The weights of a layer. By default attention's and the MLP's outputs are zero: nothing is added to the input.

    `vectors` are biases (named like the matrix, with "_bias"), norms, `sinks`; norms before the blocks are ones unless
    given, or left out with `pre_norms` False. `moe` takes the MLP's place.
    """

    shape: Shape
    qkv: Weight | None = None
    attention_output: Weight | None = None
    gate_up: Weight | None = None
    down: Weight | None = None
    vectors: Mapping[str, np.ndarray] = field(default_factory=dict)
    pre_norms: bool = True
    moe: MoeWeights | None = None

    def weights(self) -> LayerWeights:
        """As the kernels keep them."""
        s = self.shape
        return LayerWeights(
            AttentionWeights(
                norm=self._norm("attention_norm"),
                qkv=self._linear("qkv", self.qkv or zeros(s.qkv, s.hidden)),
                q_norm=self._vector("q_norm"),
                k_norm=self._vector("k_norm"),
                sinks=self._vector("sinks"),
                output=self._linear("attention_output", self.attention_output or zeros(s.hidden, s.attended)),
                post_norm=self._vector("attention_post_norm"),
            ),
            mlp_norm=self._norm("mlp_norm"),
            mlp=self.moe
            or MlpWeights(
                self._linear("gate_up", self.gate_up or zeros(2 * s.ffn, s.hidden)),
                self._linear("down", self.down or zeros(s.hidden, s.ffn)),
            ),
            mlp_post_norm=self._vector("mlp_post_norm"),
        )

    def _norm(self, name: str) -> np.ndarray | None:
        given = self._vector(name)
        return np.ones(self.shape.hidden, np.float32) if given is None and self.pre_norms else given

    def _linear(self, name: str, weight: Weight) -> Linear:
        return Linear(NativeMatrix([weight]), self._vector(f"{name}_bias"))

    def _vector(self, name: str) -> np.ndarray | None:
        return vector(self.vectors[name]) if name in self.vectors else None


def vector(values: np.ndarray) -> np.ndarray:
    """As the kernels keep it."""
    return np.array(values, np.float32)


@dataclass
class NativeStage:
    """A stage of one layer (without `parts`: of none). Norm weights are ones and eps is 0 unless said otherwise.

    `tables` gives each sequence its KV blocks, of `n_blocks`; the pools begin filled with what is not a number, so that
    whatever is read before it was written spoils the result. `layer` and `spec` say what is not Llama's; `frequencies`
    are those of the layer's rotation, or the stage has more (`rotations`).
    """

    shape: Shape
    parts: LayerParts | None = None
    frequencies: np.ndarray | None = None
    tables: Mapping[int, Sequence[int] | np.ndarray] = field(default_factory=dict)
    n_blocks: int = 1
    threads: int = 1
    eps: float = 0.0
    embedding: Weight | None = None
    head: Weight | None = None
    output_norm: np.ndarray | None = None
    layer: LayerSpec = field(default_factory=LayerSpec)
    spec: Mapping[str, Any] = field(default_factory=dict)
    rotations: Sequence[Rotation] = ()

    def __post_init__(self) -> None:
        s = self.shape
        self._library = load()
        self._pool = self._library.swarmd_pool_new(self.threads)
        padded = -(-s.head_dim // TILE) * TILE
        self.keys = np.full((s.kv_heads, self.n_blocks, s.head_dim, BLOCK), NOT_A_NUMBER).view(np.float16)
        self.values = np.full((s.kv_heads, self.n_blocks, BLOCK, padded), NOT_A_NUMBER).view(np.float16)
        if not self.rotations:
            angles = np.zeros(s.head_dim // 2) if self.frequencies is None else self.frequencies
            self.rotations = (Rotation(vector(angles), 1.0),)
        self._ends = [NativeMatrix([weight]) if weight else None for weight in (self.embedding, self.head)]
        self._structs = self._stage_structs()
        self._struct = self._structs.stage

    def __del__(self) -> None:
        self._library.swarmd_pool_free(self._pool)

    def _stage_structs(self) -> StageStructs:
        s = self.shape
        norm = None
        if self.head is not None:
            norm = vector(np.ones(s.hidden) if self.output_norm is None else self.output_norm)
        layers = () if self.parts is None else (self.parts.weights(),)
        weights = StageWeights(layers, self._ends[0], norm, self._ends[1], tuple(self.rotations), 0)
        described = (self.layer,) * len(layers)
        spec = ArchSpec(
            architecture="of a test",
            hidden_size=s.hidden,
            n_heads=s.heads,
            n_kv_heads=s.kv_heads,
            head_dim=s.head_dim,
            ffn_size=s.ffn,
            vocab_size=1,
            context_length=1 << 20,
            rms_eps=self.eps,
            layers=described,
            ropes=(),
            **self.spec,
        )
        return StageStructs(spec, described, weights, [self.keys] * len(layers), [self.values] * len(layers))

    def step(self, parts: Sequence[Part], wire: str = "f32") -> np.ndarray:
        """Hidden states of all rows, as they would travel on: float32 or, as bits of bf16, uint16 [rows, hidden]."""
        dtype = np.float32 if wire == "f32" else np.uint16
        out = np.empty((sum(len(part.x) for part in parts), self.shape.hidden), dtype)
        self._run(parts, np.concatenate([part.x for part in parts]).astype(dtype, copy=False), None, out, [], None)
        return out

    def embed(self, tokens: Sequence[int], wire: str) -> np.ndarray:
        """What the first stage sends on for these tokens at positions 0, 1, ... of sequence 0."""
        out = np.empty((len(tokens), self.shape.hidden), np.float32 if wire == "f32" else np.uint16)
        self._run([Part(0, 0, np.empty((len(tokens), 0)))], None, np.array(tokens, np.int32), out, [], None)
        return out

    def logits(self, parts: Sequence[Part], wanted: Sequence[int]) -> np.ndarray:
        """The last stage's logits of the wanted rows: float32 [wanted, head's rows]."""
        head = self._ends[1]
        assert head is not None
        logits = np.empty((len(wanted), head.rows), np.float32)
        x = np.concatenate([part.x for part in parts]).astype(np.float32)
        self._run(parts, x, None, None, wanted, logits)
        return logits

    def _run(
        self,
        parts: Sequence[Part],
        hidden: np.ndarray | None,
        tokens: np.ndarray | None,
        out: np.ndarray | None,
        wanted: Sequence[int],
        logits: np.ndarray | None,
    ) -> None:
        lengths = [len(part.x) for part in parts]
        tables = [np.asarray(self.tables.get(part.seq, []), np.int32) for part in parts]
        first_row = np.cumsum([0, *lengths]).astype(np.int32)
        first_block = np.cumsum([0, *map(len, tables)]).astype(np.int32)
        blocks, start = np.concatenate(tables), np.array([part.start for part in parts], np.int32)
        wanted_rows = np.array(wanted, np.int32)
        context = max(part.start + len(part.x) for part in parts)
        batch = Batch(
            *(int(first_row[-1]), len(parts), first_row.ctypes.data, start.ctypes.data),
            *(first_block.ctypes.data, blocks.ctypes.data),
            *(None if tokens is None else tokens.ctypes.data, None if hidden is None else hidden.ctypes.data),
            0 if (hidden if out is None else out).dtype == np.float32 else 1,  # type: ignore[union-attr]
            *(None if out is None else out.ctypes.data, len(wanted), wanted_rows.ctypes.data),
            None if logits is None else logits.ctypes.data,
        )
        stage = ctypes.byref(self._struct)
        size = self._library.swarmd_workspace(self._pool, stage, batch.rows, batch.wanted, context)
        workspace = aligned(size)
        self._library.swarmd_step(self._pool, stage, ctypes.byref(batch), workspace.ctypes.data, context)
