"""The decoder, written once over a backend's operations; what differs between architectures is data (`ArchSpec`).

Its base is Llama's (Touvron et al. 2023, arXiv:2302.13971).
"""

from __future__ import annotations

from collections.abc import Sequence

from swarmd.node.engine.backends.base import Array, AttentionShape, Backend, LayerCache, RowSpan
from swarmd.node.engine.spec import ArchSpec
from swarmd.node.engine.stage_compute import Logits
from swarmd.node.engine.weights import LatentWeights, LayerWeights, Linear, MlpWeights, MoeWeights, StageWeights


class Decoder:
    """Layers from `start` on. Holds no state of sequences: the caches are given with each call."""

    def __init__(self, spec: ArchSpec, start: int, weights: StageWeights, backend: Backend) -> None:
        self._spec = spec
        self._weights = weights
        self._backend = backend
        self._shapes = [_attention_shape(spec, start + index) for index in range(len(weights.layers))]

    def embed(self, tokens: Sequence[int]) -> Array:
        """Token ids -> hidden states [tokens, hidden]; first stage only."""
        assert self._weights.embedding is not None, "only the first stage has the embedding"
        x = self._backend.embed(self._weights.embedding, tokens)
        return self._backend.scale(x, self._spec.embedding_multiplier)

    def forward(self, x: Array, spans: Sequence[RowSpan], caches: Sequence[Sequence[LayerCache]]) -> Array:
        """Hidden states [rows, hidden] through this stage's layers; `x` may be overwritten.

        `caches[i]` has the layer caches of `spans[i]`, with room for its rows; their keys and values are
        written.
        """
        positions = [span.start + i for span in spans for i in range(span.end - span.begin)]
        turns = [self._backend.rotation(positions, r.frequencies, r.magnitude) for r in self._weights.rotations]
        for index, layer in enumerate(self._weights.layers):
            shape = self._shapes[index]
            rotation = None if shape.rope is None else turns[shape.rope]
            x = self._attend(layer, shape, x, rotation, spans, [cache[index] for cache in caches])
            x = self._feed_forward(layer, x)
        return x

    def head(self, x: Array) -> Logits:
        """Hidden states [rows, hidden] -> logits, float32 [rows, vocab]; last stage only."""
        spec, weights, backend = self._spec, self._weights, self._backend
        assert weights.head is not None, "only the last stage has the head"
        normed = backend.rms_norm(x, weights.output_norm, spec.rms_eps)
        scaled = backend.scale(backend.linear(normed, weights.head), spec.logit_multiplier)
        return backend.logits(backend.softcap(scaled, spec.logit_softcap))

    def _attend(
        self,
        layer: LayerWeights,
        shape: AttentionShape,
        x: Array,
        rotation: Array | None,
        spans: Sequence[RowSpan],
        caches: Sequence[LayerCache],
    ) -> Array:
        weights = layer.attention
        normed = self._norm(x, weights.norm)
        if isinstance(weights, LatentWeights):
            mixed = self._attend_to_latents(normed, weights, shape, rotation, spans, caches)
        else:
            qkv = self._linear(normed, weights.qkv)
            mixed = self._backend.attention(qkv, shape, weights, rotation, spans, caches)
        return self._add(x, self._norm(self._linear(mixed, weights.output), weights.post_norm))

    def _attend_to_latents(
        self,
        x: Array,
        weights: LatentWeights,
        shape: AttentionShape,
        rotation: Array | None,
        spans: Sequence[RowSpan],
        caches: Sequence[LayerCache],
    ) -> Array:
        backend, latent = self._backend, shape.latent
        assert latent is not None
        made_from = x
        if weights.q_a is not None:
            made_from = backend.rms_norm(self._linear(x, weights.q_a), weights.q_a_norm, latent.eps)
        queries = self._linear(made_from, weights.q)
        latents = backend.rms_norm(self._linear(x, weights.kv_a), weights.kv_a_norm, latent.eps)
        keys = self._linear(x, weights.k_rope)
        return backend.latent_attention(queries, keys, latents, shape, weights, rotation, spans, caches)

    def _feed_forward(self, layer: LayerWeights, x: Array) -> Array:
        normed = self._norm(x, layer.mlp_norm)
        out = self._mixture(normed, layer.mlp) if isinstance(layer.mlp, MoeWeights) else self._mlp(normed, layer.mlp)
        return self._add(x, self._norm(out, layer.mlp_post_norm))

    def _mlp(self, x: Array, weights: MlpWeights) -> Array:
        gated = self._backend.gate(self._linear(x, weights.gate_up), self._spec.activation)
        return self._linear(gated, weights.down)

    def _mixture(self, x: Array, weights: MoeWeights) -> Array:
        """The chosen experts' outputs by their scores, and the shared expert's (Qwen2-MoE, DeepSeek)."""
        backend, spec = self._backend, self._spec
        assert spec.moe is not None
        scores = self._linear(x, weights.router)
        out = backend.mixture(x, scores, spec.moe, weights, spec.activation)
        if weights.shared is None:
            return out
        shared = self._mlp(x, weights.shared)
        if weights.shared_gate is not None:
            shared = backend.weigh(shared, backend.linear(x, weights.shared_gate))
        return backend.add(out, shared, 1.0)

    def _linear(self, x: Array, weights: Linear) -> Array:
        return self._backend.linear(x, weights.matrix, weights.bias)

    def _norm(self, x: Array, weight: Array | None) -> Array:
        return x if weight is None else self._backend.rms_norm(x, weight, self._spec.rms_eps)

    def _add(self, x: Array, y: Array) -> Array:
        return self._backend.add(x, y, self._spec.residual_multiplier)


def _attention_shape(spec: ArchSpec, layer: int) -> AttentionShape:
    described = spec.layers[layer]
    return AttentionShape(
        heads=spec.n_heads,
        kv_heads=spec.n_kv_heads,
        head_dim=spec.head_dim,
        scale=spec.attention_scale,
        softcap=spec.attention_softcap,
        window=described.window,
        rope=described.rope,
        qk_norm=spec.qk_norm,
        eps=spec.rms_eps,
        latent=spec.latent,
    )
