"""A model's architecture as data: what the decoder must do and which tensors it needs, read from a GGUF
header.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NoReturn

from swarmd.node.models.errors import ModelFileError

KNOWN_ARCHITECTURES = ("llama",)

MAX_LAYERS = 1024
MAX_WIDTH = 1 << 20
MAX_VOCAB = 1 << 22
MAX_CONTEXT = 1 << 26

EMBEDDING = "token_embd.weight"
OUTPUT_NORM = "output_norm.weight"
HEAD = "output.weight"
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class RopeScaling:
    """How positions are stretched. `linear`: position / factor (Chen et al. 2023, arXiv:2306.15595)."""

    kind: str
    factor: float


@dataclass(frozen=True)
class ArchSpec:
    """One decoder-only transformer, in the terms of HF's config.json.

    `rope_dim` of `head_dim` dimensions are rotated. `rope_factors`: the file holds a divisor per rotation
    frequency (Llama 3.1's long-context scaling). `qk_permuted`: the rows of Q and K are in llama.cpp's
    interleaved order and must be put back into HF's rotate-half order at load. `tied_embeddings`: the head is
    the embedding matrix.
    """

    architecture: str
    n_layers: int
    hidden_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    context_length: int
    rope_theta: float
    rope_dim: int
    rope_scaling: RopeScaling | None
    rope_factors: bool
    rms_eps: float
    tied_embeddings: bool
    qk_permuted: bool

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object], tensor_names: Collection[str]) -> ArchSpec:
        """The architecture that a GGUF header describes.

        Raises ModelFileError for an unknown architecture (naming it and the known ones), for missing or
        impossible values, and for variants of a known architecture that the decoder does not implement.
        """
        name = metadata.get("general.architecture")
        if name not in KNOWN_ARCHITECTURES:
            raise ModelFileError(
                f"the model's architecture is {name!r:.60}, which is not supported; "
                f"supported architectures: {', '.join(KNOWN_ARCHITECTURES)}"
            )
        header = _Header(metadata, str(name))
        _refuse_variants(header)
        hidden = header.integer("embedding_length", MAX_WIDTH)
        n_heads = header.integer("attention.head_count", MAX_WIDTH)
        head_dim = header.integer("attention.key_length", MAX_WIDTH, default=hidden // n_heads)
        spec = cls(
            architecture=str(name),
            n_layers=header.integer("block_count", MAX_LAYERS),
            hidden_size=hidden,
            n_heads=n_heads,
            n_kv_heads=header.integer("attention.head_count_kv", MAX_WIDTH, default=n_heads),
            head_dim=head_dim,
            ffn_size=header.integer("feed_forward_length", MAX_WIDTH),
            vocab_size=header.integer("vocab_size", MAX_VOCAB, default=_vocabulary_size(metadata)),
            context_length=header.integer("context_length", MAX_CONTEXT),
            rope_theta=header.number("rope.freq_base", default=10000.0),
            rope_dim=header.integer("rope.dimension_count", MAX_WIDTH, default=head_dim),
            rope_scaling=_rope_scaling(header),
            rope_factors=ROPE_FACTORS in tensor_names,
            rms_eps=header.number("attention.layer_norm_rms_epsilon"),
            tied_embeddings=HEAD not in tensor_names,
            qk_permuted=True,
        )
        spec._check()
        return spec

    def _check(self) -> None:
        """Raise ModelFileError unless the sizes fit together."""
        if self.n_heads % self.n_kv_heads:
            _refuse(f"{self.n_heads} attention heads cannot share {self.n_kv_heads} key-value heads")
        if self.head_dim % 2 or self.rope_dim != self.head_dim:
            _refuse(f"rotary embedding of {self.rope_dim} of {self.head_dim} dimensions of a head is not supported")


class _Header:
    """Typed, range-checked access to one architecture's keys."""

    def __init__(self, metadata: Mapping[str, object], architecture: str) -> None:
        self._metadata = metadata
        self._prefix = architecture + "."

    def get(self, key: str) -> object:
        return self._metadata.get(self._prefix + key)

    def integer(self, key: str, maximum: int, *, default: int | None = None) -> int:
        value = self.get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= maximum:
            _refuse(f"{self._prefix}{key} is {_shown(value)}; a whole number from 1 to {maximum} is needed")
        return value

    def number(self, key: str, *, default: float | None = None) -> float:
        value = self.get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            _refuse(f"{self._prefix}{key} is {_shown(value)}; a positive number is needed")
        return float(value)


def tensor_shapes(spec: ArchSpec, start: int, end: int) -> dict[str, tuple[int, ...]]:
    """The GGUF tensors that layers [start, end) need, with their row-major shapes.

    Includes the embedding for start == 0, and the output norm and head (the embedding when tied) for end ==
    n_layers. Raises ValueError for a range outside the model.
    """
    if not 0 <= start < end <= spec.n_layers:
        raise ValueError(f"layers {start} to {end - 1} are not a range of a model of {spec.n_layers} layers")
    shapes: dict[str, tuple[int, ...]] = {}
    if spec.rope_factors:
        shapes[ROPE_FACTORS] = (spec.rope_dim // 2,)
    if start == 0:
        shapes[EMBEDDING] = (spec.vocab_size, spec.hidden_size)
    for layer in range(start, end):
        shapes |= _layer_shapes(spec, layer)
    if end == spec.n_layers:
        shapes[OUTPUT_NORM] = (spec.hidden_size,)
        shapes[EMBEDDING if spec.tied_embeddings else HEAD] = (spec.vocab_size, spec.hidden_size)
    return shapes


def stage_tensor_names(spec: ArchSpec, start: int, end: int) -> list[str]:
    """The names of the GGUF tensors that a stage of layers [start, end) needs; see `tensor_shapes`."""
    return list(tensor_shapes(spec, start, end))


def _layer_shapes(spec: ArchSpec, layer: int) -> dict[str, tuple[int, ...]]:
    hidden, queries, keys = spec.hidden_size, spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm": (hidden,),
        "attn_q": (queries, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, queries),
        "ffn_norm": (hidden,),
        "ffn_gate": (spec.ffn_size, hidden),
        "ffn_up": (spec.ffn_size, hidden),
        "ffn_down": (hidden, spec.ffn_size),
    }
    return {f"blk.{layer}.{part}.weight": shape for part, shape in shapes.items()}


def _refuse_variants(header: _Header) -> None:
    """Llama-family files that need more than the plain decoder."""
    if header.get("expert_count"):
        _refuse("it is a mixture of experts, which is not supported yet")
    if header.get("attention.sliding_window"):
        _refuse("it has sliding-window attention, which is not supported yet")
    if header.get("attention.key_length") != header.get("attention.value_length"):
        _refuse("its key and value heads differ in size, which is not supported yet")


def _rope_scaling(header: _Header) -> RopeScaling | None:
    kind = header.get("rope.scaling.type")
    if kind in (None, "none"):
        return None
    if kind != "linear":
        _refuse(f"its rope scaling {kind!r:.40} is not supported yet")
    return RopeScaling("linear", header.number("rope.scaling.factor"))


def _vocabulary_size(metadata: Mapping[str, object]) -> int | None:
    tokens = metadata.get("tokenizer.ggml.tokens")
    return len(tokens) if isinstance(tokens, list) else None


def _shown(value: object) -> str:
    return "missing" if value is None else f"{value!r:.40}"


def _refuse(what: str) -> NoReturn:
    raise ModelFileError(f"this model cannot be served: {what}; choose another file")
