"""The Llama decoder (Touvron et al. 2023, arXiv:2302.13971), written once over a backend's operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from swarmd.node.engine.backends.base import Array, Backend, LayerCache, RowSpan
from swarmd.node.engine.spec import ArchSpec
from swarmd.node.engine.weights import LayerWeights, StageWeights


class Decoder:
    """One stage's part of the model. Holds no state of sequences: the caches are given with each call."""

    def __init__(self, spec: ArchSpec, weights: StageWeights, backend: Backend) -> None:
        self._spec = spec
        self._weights = weights
        self._backend = backend
        self._shape = (spec.n_heads, spec.n_kv_heads, spec.head_dim)

    def embed(self, tokens: Sequence[int]) -> Array:
        """Token ids -> hidden states [tokens, hidden]; first stage only."""
        assert self._weights.embedding is not None, "only the first stage has the embedding"
        return self._backend.embed(self._weights.embedding, tokens)

    def forward(self, x: Array, spans: Sequence[RowSpan], caches: Sequence[Sequence[LayerCache]]) -> Array:
        """Hidden states [rows, hidden] through this stage's layers; `x` may be overwritten.

        `caches[i]` has the layer caches of `spans[i]`, with room for its rows; their keys and values are
        written.
        """
        positions = [span.start + i for span in spans for i in range(span.end - span.begin)]
        rotation = self._backend.rotation(positions, self._weights.frequencies)
        for index, layer in enumerate(self._weights.layers):
            x = self._layer(layer, x, rotation, spans, [cache[index] for cache in caches])
        return x

    def head(self, x: Array) -> Any:
        """Hidden states [rows, hidden] -> logits, a float32 torch.Tensor [rows, vocab]; last stage only."""
        weights, backend = self._weights, self._backend
        assert weights.head is not None, "only the last stage has the head"
        normed = backend.rms_norm(x, weights.output_norm, self._spec.rms_eps)
        return backend.logits(backend.linear(normed, weights.head))

    def _layer(
        self,
        layer: LayerWeights,
        x: Array,
        rotation: Array,
        spans: Sequence[RowSpan],
        caches: Sequence[LayerCache],
    ) -> Array:
        backend, eps = self._backend, self._spec.rms_eps
        qkv = backend.linear(backend.rms_norm(x, layer.attention_norm, eps), layer.qkv)
        mixed = backend.attention(qkv, self._shape, rotation, spans, caches)
        x = backend.add(x, backend.linear(mixed, layer.attention_output))
        return backend.add(x, backend.gated_mlp(backend.rms_norm(x, layer.mlp_norm, eps), layer.gate_up, layer.down))
