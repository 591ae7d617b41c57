"""Attention for MLX: every sequence on its own contiguous cache, as operations of an unevaluated graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from swarmd.node.engine.backends.base import AttentionShape, LayerCache, RowSpan
from swarmd.node.engine.weights import AttentionWeights, LatentWeights

Rotations = tuple[mx.array, mx.array]
"""cos and sin, fp32 [rows, 1, rotated dimensions / 2]."""


@dataclass
class MlxLayerCache:
    """Keys and values [heads, tokens, dim], in the working type."""

    keys: mx.array
    values: mx.array


def attention(
    qkv: mx.array,
    shape: AttentionShape,
    weights: AttentionWeights,
    rotation: Rotations | None,
    spans: Sequence[RowSpan],
    caches: Sequence[LayerCache],
) -> mx.array:
    """See `Backend.attention`."""
    heads, kv_heads = shape.heads, shape.kv_heads
    qkv = qkv.reshape(qkv.shape[0], heads + 2 * kv_heads, shape.head_dim)
    queries, keys, values = mx.split(qkv, [heads, heads + kv_heads], axis=1)
    if shape.qk_norm != "none":
        queries = _norm(queries, weights.q_norm, shape)
        keys = _norm(keys, weights.k_norm, shape)
    if rotation is not None:
        queries, keys = _rotate(queries, *rotation), _rotate(keys, *rotation)
    mixed = []
    for span, cache in zip(spans, caches, strict=True):
        begin, end, stop = span.begin, span.end, span.start + span.end - span.begin
        cache.keys[:, span.start : stop] = keys[begin:end].swapaxes(0, 1)
        cache.values[:, span.start : stop] = values[begin:end].swapaxes(0, 1)
        first = 0 if shape.window is None else max(0, span.start - shape.window + 1)
        seen = cache.keys[:, first:stop], cache.values[:, first:stop]
        mixed.append(_attend(queries[begin:end].swapaxes(0, 1), *seen, shape, weights.sinks))
    return mx.concatenate(mixed)


def latent_attention(
    queries: mx.array,
    keys: mx.array,
    latents: mx.array,
    shape: AttentionShape,
    weights: LatentWeights,
    rotation: Rotations | None,
    spans: Sequence[RowSpan],
    caches: Sequence[LayerCache],
) -> mx.array:
    """See `Backend.latent_attention`. Products with `kv_b` are in fp32."""
    assert shape.latent is not None
    rows, nope = len(queries), shape.latent.nope_dim
    plain, turned = mx.split(queries.reshape(rows, shape.heads, shape.head_dim), [nope], axis=-1)
    keys = keys[:, None]
    if rotation is not None:
        turned, keys = _rotate(turned, *rotation), _rotate(keys, *rotation)
    absorbed = (plain.swapaxes(0, 1) @ weights.kv_b[:, :nope]).astype(latents.dtype)
    turned = turned.swapaxes(0, 1)
    mixed = []
    for span, cache in zip(spans, caches, strict=True):
        begin, end, stop = span.begin, span.end, span.start + span.end - span.begin
        cache.keys[0, span.start : stop] = keys[begin:end, 0]
        cache.values[0, span.start : stop] = latents[begin:end]
        seen = cache.keys[0, :stop], cache.values[0, :stop]
        mixed.append(_mix_latents(absorbed[:, begin:end], turned[:, begin:end], *seen, shape.scale))
    out = mx.concatenate(mixed, axis=1) @ weights.kv_b[:, nope:].swapaxes(1, 2)
    return out.swapaxes(0, 1).reshape(rows, -1).astype(latents.dtype)


def _mix_latents(absorbed: mx.array, turned: mx.array, keys: mx.array, latents: mx.array, scale: float) -> mx.array:
    """Of one sequence: both parts of the queries [heads, rows, d], the last of which belong to the last of the keys
    [n, rope_dim] and latents [n, kv_rank]; -> [heads, rows, kv_rank]. Scores are added in fp32.
    """
    scores = ((absorbed @ latents.T).astype(mx.float32) + (turned @ keys.T).astype(mx.float32)) * scale
    mask = _mask(absorbed.shape[1], len(keys), None)
    if mask is not None:
        scores = mx.where(mask, scores, -mx.inf)
    return mx.softmax(scores, axis=-1).astype(latents.dtype) @ latents


def _attend(
    queries: mx.array, keys: mx.array, values: mx.array, shape: AttentionShape, sinks: mx.array | None
) -> mx.array:
    """Of one sequence: queries [heads, rows, d], the last of which belongs to the last of the keys [kv_heads, n, d];
    -> [rows, heads*d].
    """
    heads, rows, head_dim = queries.shape
    mask = _mask(rows, keys.shape[1], shape.window)
    if shape.softcap is None:
        mixed = mx.fast.scaled_dot_product_attention(
            *(queries[None], keys[None], values[None]),
            scale=shape.scale,
            mask=mask,
            sinks=None if sinks is None else sinks.astype(queries.dtype),
        )[0]
    else:
        mixed = _capped(queries, keys, values, shape, mask, sinks)
    return mixed.swapaxes(0, 1).reshape(rows, heads * head_dim)


def _capped(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    shape: AttentionShape,
    mask: mx.array | None,
    sinks: mx.array | None,
) -> mx.array:
    """With capped scores, which MLX's own attention does not have: written out, scores in fp32."""
    heads, rows, head_dim = queries.shape
    grouped = queries.reshape(shape.kv_heads, -1, rows, head_dim)
    scores = (grouped @ keys[:, None].swapaxes(-1, -2)).astype(mx.float32) * shape.scale
    assert shape.softcap is not None
    scores = mx.tanh(scores / shape.softcap) * shape.softcap
    if mask is not None:
        scores = mx.where(mask, scores, -mx.inf)
    if sinks is not None:
        own = mx.broadcast_to(sinks.reshape(shape.kv_heads, -1, 1, 1), (*scores.shape[:-1], 1))
        scores = mx.concatenate([scores, own], axis=-1)
    shares = mx.softmax(scores, axis=-1)
    if sinks is not None:
        shares = shares[..., :-1]
    return (shares.astype(values.dtype) @ values[:, None]).reshape(heads, rows, head_dim)


def _mask(rows: int, n: int, window: int | None) -> mx.array | None:
    """Which of n keys the last `rows` positions see: bool [rows, n]; None where a single row sees all it is given."""
    if rows == 1:
        return None
    position = mx.arange(n - rows, n)[:, None]
    key = mx.arange(n)
    seen = key <= position
    return seen if window is None else seen & (key > position - window)


def _norm(x: mx.array, weight: mx.array | None, shape: AttentionShape) -> mx.array:
    """RMS norm of [rows, heads, head_dim], each head by itself or all together."""
    joined = x if shape.qk_norm == "head" else x.reshape(x.shape[0], -1)
    return mx.fast.rms_norm(joined, weight, shape.eps).astype(x.dtype).reshape(x.shape)


def _rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Rotary embedding of [rows, heads, head_dim] in fp32, halves of the rotated dimensions paired."""
    half = cos.shape[-1]
    first, second, rest = mx.split(x, [half, 2 * half], axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return mx.concatenate([part.astype(x.dtype) for part in (*turned, rest)], axis=-1)
