"""A paged KV cache on a device: where a step's rows stand in it, and attention over it by operations of torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from swarmd.node.engine.block_table import BLOCK


@dataclass(frozen=True)
class PagedPool:
    """Keys and values of one layer: [blocks, BLOCK, heads, dim]."""

    keys: torch.Tensor
    values: torch.Tensor

    def write(self, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Keys and values [rows, heads, dim] into slots (block * BLOCK + place in it) [rows], int64."""
        for into, rows in ((self.keys, keys), (self.values, values)):
            into.view(-1, *into.shape[2:]).index_copy_(0, slots, rows.to(into.dtype))

    def read(self, table: torch.Tensor, first: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions [first, stop) of the sequence whose blocks are `table`: fp32 [heads, stop - first, dim]."""
        blocks, begin = table[first // BLOCK : -(-stop // BLOCK)], first % BLOCK
        keys, values = (
            pool[blocks].flatten(0, 1)[begin : begin + stop - first].transpose(0, 1).float()
            for pool in (self.keys, self.values)
        )
        return keys, values


@dataclass(frozen=True)
class LoneRows:
    """Rows that are the only ones of their sequences.

    `rows`: which of the step (None: all); `positions`, contiguous; `tables` [rows, blocks], int32: the blocks of their
    sequences, those behind the position being any.
    """

    rows: torch.Tensor | None
    positions: torch.Tensor
    tables: torch.Tensor


@dataclass(frozen=True)
class LongSpan:
    """Rows [begin, end) of one sequence from position `start` on; `table`: its blocks."""

    begin: int
    end: int
    start: int
    table: torch.Tensor


@dataclass(frozen=True)
class PagedBatch:
    """Where a step's rows stand: `positions` and `slots` [rows]; which are alone, and which belong together."""

    positions: torch.Tensor
    slots: torch.Tensor
    lone: LoneRows | None
    long: tuple[LongSpan, ...] = ()

    @classmethod
    def of_lone(cls, positions: torch.Tensor, tables: torch.Tensor) -> PagedBatch:
        """One row of each sequence, without asking the host anything."""
        positions = positions.contiguous()  # where they are a column of a plan
        blocks = tables.gather(1, (positions // BLOCK)[:, None].long())[:, 0].long()
        return cls(positions, blocks * BLOCK + positions % BLOCK, LoneRows(None, positions, tables))


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
    """See `triton_attention.attend`. All blocks of the tables are read, whatever the lengths, which only mask."""
    (rows, heads, _), kv_heads = queries.shape, keys.shape[2]
    near, values = (pool[tables].flatten(1, 2).float() for pool in (keys, values))
    scores = torch.einsum("rkgd,rnkd->rkgn", queries.view(rows, kv_heads, -1, queries.shape[-1]), near)
    if latent_queries is not None:
        scores += torch.einsum("rkgd,rnkd->rkgn", latent_queries.view(rows, kv_heads, -1, values.shape[-1]), values)
    scores = scores.mul_(scale)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    key, position = torch.arange(values.shape[1], device=values.device), positions[:, None]
    blocked = key > position
    if window is not None:
        blocked |= key <= position - window
    scores.masked_fill_(blocked[:, None, None], float("-inf"))
    if sinks is None:
        shares = scores.softmax(-1)
    else:
        own = sinks.view(kv_heads, -1, 1).expand(rows, -1, -1, -1)
        shares = torch.cat((scores, own), dim=-1).softmax(-1)[..., :-1]
    return torch.einsum("rkgn,rnkd->rkgd", shares, values).reshape(rows, heads, -1)
