"""Operations on torch tensors that are the same on every device; what keeps matrices and caches is built on them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from swarmd.node.engine.backends.base import AttentionShape
from swarmd.node.engine.spec import Activation, MoeSpec
from swarmd.node.engine.weights import AttentionWeights, LatentWeights, MoeWeights


class TorchOps(ABC):
    """The part of `Backend` that knows nothing of devices. Activations are fp32 tensors."""

    @abstractmethod
    def linear(self, x: torch.Tensor, weight: Any, bias: torch.Tensor | None = None) -> torch.Tensor:
        """See `Backend`."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Written out: F.rms_norm is several times slower on CPUs."""
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).mul_(weight)

    def add(self, x: torch.Tensor, y: torch.Tensor, factor: float) -> torch.Tensor:
        """In place."""
        return x.add_(y, alpha=factor)

    def scale(self, x: torch.Tensor, factor: float) -> torch.Tensor:
        """In place."""
        return x if factor == 1.0 else x.mul_(factor)

    def softcap(self, x: torch.Tensor, cap: float | None) -> torch.Tensor:
        """In place."""
        return x if cap is None else x.div_(cap).tanh_().mul_(cap)

    def weigh(self, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """In place."""
        return x.mul_(logits.sigmoid())

    def norm_and_rotate(
        self,
        qkv: torch.Tensor,
        shape: AttentionShape,
        weights: AttentionWeights,
        rotation: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> None:
        """Queries and keys of qkv [rows, heads + 2*kv_heads, head_dim], in place."""
        heads, kv_heads = shape.heads, shape.kv_heads
        if shape.qk_norm != "none":
            self._norm_heads(qkv[:, :heads], weights.q_norm, shape)
            self._norm_heads(qkv[:, heads : heads + kv_heads], weights.k_norm, shape)
        if rotation is not None:
            rotate(qkv[:, : heads + kv_heads], *rotation)

    def _norm_heads(self, x: torch.Tensor, weight: Any, shape: AttentionShape) -> None:
        """Norm [rows, heads, head_dim] in place, each head by itself or all together."""
        joined = x if shape.qk_norm == "head" else x.reshape(x.shape[0], -1)
        x.copy_(self.rms_norm(joined, weight, shape.eps).view(x.shape))

    def attend(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        start: int,
        shape: AttentionShape,
        weights: AttentionWeights,
    ) -> torch.Tensor:
        """Of one sequence: queries [rows, heads, d] at positions from `start` on, counted from the first of the keys
        [kv_heads, n, d].
        """
        rows, heads, head_dim = queries.shape
        kv_heads, n = keys.shape[:2]
        folded = queries.transpose(0, 1).reshape(kv_heads, heads // kv_heads * rows, head_dim)
        scores = self.softcap(torch.bmm(folded, keys.transpose(1, 2)).mul_(shape.scale), shape.softcap)
        if rows > 1:
            position = torch.arange(start, start + rows, device=keys.device)[:, None]
            key = torch.arange(n, device=keys.device)
            blocked = key > position
            if shape.window is not None:
                blocked |= key <= position - shape.window
            scores.view(kv_heads, -1, rows, n).masked_fill_(blocked, float("-inf"))
        if weights.sinks is None:
            shares = scores.softmax(-1)
        else:
            sinks = weights.sinks.view(kv_heads, -1, 1).expand(-1, -1, rows).reshape(kv_heads, -1, 1)
            shares = torch.cat((scores, sinks), dim=-1).softmax(-1)[..., :-1]
        mixed = torch.bmm(shares, values)
        return mixed.view(heads, rows, head_dim).transpose(0, 1).reshape(rows, heads * head_dim)

    def gate(self, gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
        """Overwrites its input."""
        gate, up = gate_up.chunk(2, dim=1)
        if activation == "silu":
            return F.silu(gate).mul_(up)
        if activation == "gelu_tanh":
            return F.gelu(gate, approximate="tanh").mul_(up)
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return (gate * torch.sigmoid(gate * 1.702)).mul_(up + 1)

    def mixture(
        self, x: torch.Tensor, scores: torch.Tensor, moe: MoeSpec, weights: MoeWeights, activation: Activation
    ) -> torch.Tensor:
        """Expert by expert, each for the rows that chose it."""
        shares, chosen = route(scores, moe, weights.selection_bias)
        out = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            mlp = weights.experts[expert]
            rows, places = (chosen == expert).nonzero(as_tuple=True)
            gated = self.gate(self.linear(x[rows], mlp.gate_up.matrix, mlp.gate_up.bias), activation)
            found = self.linear(gated, mlp.down.matrix, mlp.down.bias)
            out.index_add_(0, rows, found * shares[rows, places, None])
        return out


def route(scores: torch.Tensor, moe: MoeSpec, selection_bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The router's outputs [rows, experts] -> weights and numbers of the chosen experts, each [rows, top_k]."""
    shares = scores.sigmoid() if moe.score == "sigmoid" else scores.softmax(-1)
    candidates = shares if selection_bias is None else shares + selection_bias
    if moe.n_groups > 1:
        grouped = candidates.view(len(scores), moe.n_groups, -1)
        best = grouped.topk(moe.group_best, dim=-1).values.sum(-1).topk(moe.top_groups, dim=-1).indices
        allowed = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, True)
        candidates = grouped.masked_fill(~allowed[..., None], float("-inf")).view(len(scores), -1)
    chosen = candidates.topk(moe.top_k, dim=-1).indices
    weights = shares.gather(1, chosen)
    if moe.normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * moe.scale, chosen


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotary embedding in place on [rows, heads, head_dim], halves of the rotated dimensions paired."""
    first, second = x[..., : 2 * cos.shape[-1]].chunk(2, dim=-1)
    turned = second * cos + first * sin
    first.mul_(cos).sub_(second * sin)
    second.copy_(turned)


def attend_to_latents(
    queries: torch.Tensor, keys: torch.Tensor, latents: torch.Tensor, shape: AttentionShape, weights: LatentWeights
) -> torch.Tensor:
    """Of one sequence: queries [heads, rows, d], the last of which belongs to the last of the keys [n, rope_dim] and
    latents [n, kv_rank]; -> [heads, rows, value_dim].
    """
    assert shape.latent is not None
    nope, (heads, rows, _), n = shape.latent.nope_dim, queries.shape, len(keys)
    absorbed = torch.bmm(queries[..., :nope], weights.kv_b[:, :nope])
    scores = absorbed.view(heads * rows, -1) @ latents.T
    scores += queries[..., nope:].reshape(heads * rows, -1) @ keys.T
    scores = scores.mul_(shape.scale).view(heads, rows, n)
    if rows > 1:
        key = torch.arange(n, device=keys.device)
        scores.masked_fill_(key > key[n - rows :, None], float("-inf"))
    mixed = (scores.softmax(-1).view(heads * rows, n) @ latents).view(heads, rows, -1)
    return torch.bmm(mixed, weights.kv_b[:, nope:].transpose(1, 2))
