"""A model's architecture, from the header of a GGUF file
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NoReturn

from swarmd.node.engine.spec import (
    MAX_CONTEXT,
    MAX_LAYERS,
    MAX_VOCAB,
    MAX_WIDTH,
    ArchSpec,
    FactorsScaling,
    LayerSpec,
    LinearScaling,
    RopeScaling,
    RopeSpec,
)
from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.gguf_names import HEAD, ROPE_FACTORS

KNOWN_ARCHITECTURES = ("llama",)


def spec_from_gguf(metadata: Mapping[str, object], tensor_names: Collection[str]) -> ArchSpec:
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
    n_kv_heads = header.integer("attention.head_count_kv", MAX_WIDTH, default=n_heads)
    rope_dim = header.integer("rope.dimension_count", MAX_WIDTH, default=head_dim)
    if n_heads % n_kv_heads:
        _refuse(f"{n_heads} attention heads cannot share {n_kv_heads} key-value heads")
    if rope_dim % 2 or rope_dim > head_dim:
        _refuse(f"rotary embedding of {rope_dim} of {head_dim} dimensions of a head is not possible")
    theta = header.number("rope.freq_base", default=10000.0)
    return ArchSpec(
        architecture=str(name),
        hidden_size=hidden,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        ffn_size=header.integer("feed_forward_length", MAX_WIDTH),
        vocab_size=header.integer("vocab_size", MAX_VOCAB, default=_vocabulary_size(metadata)),
        context_length=header.integer("context_length", MAX_CONTEXT),
        rms_eps=header.number("attention.layer_norm_rms_epsilon"),
        layers=(LayerSpec(),) * header.integer("block_count", MAX_LAYERS),
        ropes=(RopeSpec(theta, rope_dim, _rope_scaling(header, tensor_names)),),
        tied_embeddings=HEAD not in tensor_names,
    )


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


def _refuse_variants(header: _Header) -> None:
    """Llama-family files that need more than the plain decoder."""
    if header.get("expert_count"):
        _refuse("it is a mixture of experts, which is not supported yet")
    if header.get("attention.sliding_window"):
        _refuse("it has sliding-window attention, which is not supported yet")
    if header.get("attention.key_length") != header.get("attention.value_length"):
        _refuse("its key and value heads differ in size, which is not supported yet")


def _rope_scaling(header: _Header, tensor_names: Collection[str]) -> RopeScaling | None:
    if ROPE_FACTORS in tensor_names:
        return FactorsScaling()
    kind = header.get("rope.scaling.type")
    if kind in (None, "none"):
        return None
    if kind != "linear":
        _refuse(f"its rope scaling {kind!r:.40} is not supported yet")
    return LinearScaling(header.number("rope.scaling.factor"))


def _vocabulary_size(metadata: Mapping[str, object]) -> int | None:
    tokens = metadata.get("tokenizer.ggml.tokens")
    return len(tokens) if isinstance(tokens, list) else None


def _shown(value: object) -> str:
    return "missing" if value is None else f"{value!r:.40}"


def _refuse(what: str) -> NoReturn:
    raise ModelFileError(f"this model cannot be served: {what}; choose another file")
