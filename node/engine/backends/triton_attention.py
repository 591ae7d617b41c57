"""Attention of single queries over a paged KV cache, by Triton kernels: what every sequence does at decode.

Blocks are found through a table and lengths read on the device, so that one captured step serves every length. The
context is divided among SPLITS programs, each with a softmax of its own, which a second kernel joins ("Flash-Decoding",
Dao et al. 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html; the running softmax is that of Milakov and
Gimelshein 2018, arXiv:1805.02867). With TRITON_INTERPRET=1 it runs without a GPU.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false
# ruff: noqa: N803
from __future__ import annotations

import torch
import triton
import triton.language as tl

from swarmd.node.engine.block_table import BLOCK

TILE = 32
"""Tokens that a program reads at once; two blocks of the cache."""
GROUP = 16
"""Query heads that one program computes together, the smallest size of a product on tensor cores."""
PROGRAMS = 256
"""About as many programs as keep a large GPU busy: the context is divided until there are so many."""
MOST_SPLITS = 32


@triton.jit
def _dot(a, b, EXACT: tl.constexpr):
    return tl.dot(a, b, input_precision="ieee") if EXACT else tl.dot(a, b)


@triton.jit
def _share(length, window, split, WINDOWED: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr):
    """The tokens [begin, end) that one of SPLITS programs reads of those that the last of `length` tokens sees."""
    first = 0
    if WINDOWED:
        first = tl.maximum(length - window, 0)
    share = tl.cdiv(tl.cdiv(length - first, SPLITS), TILE) * TILE
    begin = first + split * share
    return begin, tl.minimum(begin + share, length)


@triton.jit
def _rows(pointer, row, real, DIM: tl.constexpr, SIZE: tl.constexpr):
    """Rows of DIM numbers, [len(row), SIZE]; zeros where they are not real and behind DIM."""
    d = tl.arange(0, SIZE)
    return tl.load(pointer + row[:, None] * DIM + d[None, :], mask=real[:, None] & (d < DIM)[None, :], other=0)


@triton.jit
def _capped(score, softcap, CAPPED: tl.constexpr):
    if CAPPED:
        # tanh(x) = 1 - 2 / (exp(2x) + 1), which has the right limits where exp overflows.
        score = softcap * (1 - 2 / (tl.exp(2 * score / softcap) + 1))
    return score


@triton.jit
def attend_part(
    queries, latent_queries, keys, values, tables, positions, mixed, best, sums,
    width, scale, softcap, window,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    KEY_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, LATENT: tl.constexpr, CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr, EXACT: tl.constexpr, SPLITS: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One share of the context of one row, for up to GROUP heads that share a key head.

    queries [rows, HEADS, KEY_DIM] of keys' type; LATENT: scores are also of latent_queries [rows, HEADS, VALUE_DIM]
    with the values. Pools are [blocks, BLOCK, KV_HEADS, dim], tables [rows, ...] with a row every `width`. Results are
    fp32: mixed [rows, HEADS, SPLITS, VALUE_DIM], not divided by its sum; best and sums [rows, HEADS, SPLITS]. Sizes are
    dims rounded up to powers of two.
    """
    row = tl.program_id(0).to(tl.int64)
    chunks = (HEADS // KV_HEADS + GROUP - 1) // GROUP
    kv_head, chunk = tl.program_id(1) // chunks, tl.program_id(1) % chunks
    split = tl.program_id(2)
    inner = chunk * GROUP + tl.arange(0, GROUP)
    real = inner < HEADS // KV_HEADS
    head = row * HEADS + kv_head * (HEADS // KV_HEADS) + inner
    query = _rows(queries, head, real, KEY_DIM, KEY_SIZE)
    if LATENT:
        absorbed = _rows(latent_queries, head, real, VALUE_DIM, VALUE_SIZE)
    begin, end = _share(tl.load(positions + row).to(tl.int32) + 1, window, split, WINDOWED, SPLITS, TILE)
    top = tl.full([GROUP], float("-inf"), tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    out = tl.zeros([GROUP, VALUE_SIZE], tl.float32)
    for at in range(begin, end, TILE):
        token = at + tl.arange(0, TILE)
        seen = token < end
        block = tl.load(tables + row * width + token // BLOCK, mask=seen, other=0).to(tl.int64)
        place = (block * BLOCK + token % BLOCK) * KV_HEADS + kv_head
        key, value = _rows(keys, place, seen, KEY_DIM, KEY_SIZE), _rows(values, place, seen, VALUE_DIM, VALUE_SIZE)
        score = _dot(query, tl.trans(key), EXACT)
        if LATENT:
            score += _dot(absorbed, tl.trans(value), EXACT)
        score = _capped(score * scale, softcap, CAPPED)
        score = tl.where(seen[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        kept = tl.exp(top - higher)
        weight = tl.exp(score - higher[:, None])
        total = total * kept + tl.sum(weight, axis=1)
        out = out * kept[:, None] + _dot(weight.to(value.dtype), value, EXACT)
        top = higher
    into, e = head * SPLITS + split, tl.arange(0, VALUE_SIZE)
    tl.store(mixed + into[:, None] * VALUE_DIM + e[None, :], out, mask=real[:, None] & (e < VALUE_DIM)[None, :])
    tl.store(best + into, top, mask=real)
    tl.store(sums + into, total, mask=real)


@triton.jit
def join(
    mixed, best, sums, sinks, out,
    HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_SIZE: tl.constexpr, SPLITS: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """out [rows, HEADS, VALUE_DIM] of the parts; a sink's logit takes its share of the softmax and gives nothing."""
    head = tl.program_id(0).to(tl.int64)
    split, e = tl.arange(0, SPLITS), tl.arange(0, VALUE_SIZE)
    tops = tl.load(best + head * SPLITS + split)
    highest = tl.max(tops, axis=0)
    if SINKS:
        sink = tl.load(sinks + head % HEADS)
        highest = tl.maximum(highest, sink)
    share = tl.exp(tops - highest)
    total = tl.sum(share * tl.load(sums + head * SPLITS + split), axis=0)
    if SINKS:
        total += tl.exp(sink - highest)
    at = (head * SPLITS + split)[:, None] * VALUE_DIM + e[None, :]
    parts = tl.load(mixed + at, mask=(e < VALUE_DIM)[None, :], other=0)
    tl.store(out + head * VALUE_DIM + e, tl.sum(parts * share[:, None], axis=0) / total, mask=e < VALUE_DIM)


def attend(
    queries: torch.Tensor,
    latent_queries: torch.Tensor | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    positions: torch.Tensor,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """One query [rows, heads, key_dim] of each sequence over its tokens up to `positions` [rows], by `tables` [rows,
    blocks]: fp32 [rows, heads, value_dim].

    `keys` and `values` are a layer's pools [blocks, BLOCK, kv_heads, dim], fp32 or bf16; products are in their type.
    `latent_queries` [rows, heads, value_dim]: scores are also of these with the values (latent attention).
    """
    rows, heads, key_dim = queries.shape
    kv_heads, value_dim = values.shape[2:]
    chunks = triton.cdiv(heads // kv_heads, GROUP)
    splits = min(MOST_SPLITS, triton.next_power_of_2(max(1, PROGRAMS // (rows * kv_heads * chunks))))

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(rows, heads, *shape, device=queries.device, dtype=torch.float32)

    mixed, best, sums, out = empty(splits, value_dim), empty(splits), empty(splits), empty(value_dim)
    queries = queries.to(keys.dtype).contiguous()
    absorbed = queries if latent_queries is None else latent_queries.to(values.dtype).contiguous()
    of_both = {"HEADS": heads, "VALUE_DIM": value_dim, "VALUE_SIZE": _size(value_dim), "SPLITS": splits}
    has = {"LATENT": latent_queries is not None, "CAPPED": softcap is not None, "WINDOWED": window is not None}
    attend_part[(rows, kv_heads * chunks, splits)](
        *(queries, absorbed, keys, values, tables, positions, mixed, best, sums),
        *(tables.stride(0), scale, softcap or 0.0, window or 0),
        **(of_both | has | SIZES),
        KV_HEADS=kv_heads,
        KEY_DIM=key_dim,
        KEY_SIZE=_size(key_dim),
        EXACT=keys.dtype is torch.float32,
    )
    join[(rows * heads,)](
        *(mixed, best, sums, best if sinks is None else sinks, out), **(of_both | {"SINKS": sinks is not None})
    )
    return out


SIZES = {"GROUP": GROUP, "TILE": TILE, "BLOCK": BLOCK}


def _size(dim: int) -> int:
    """The power of two that a kernel takes for it, at least the smallest of tensor cores."""
    return max(16, int(triton.next_power_of_2(dim)))
