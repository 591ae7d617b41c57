"""What a model costs to hold: the planner's view of it, without names, files or tensors."""

from __future__ import annotations

import msgspec


class ModelCosts(msgspec.Struct, frozen=True):
    """Bytes that a stage needs, as the engine holds them in memory (not as the file stores them).

    `layer_bytes[i]` is the weights of layer i. `embedding_bytes` is needed by the first stage, `head_bytes` (final norm
    and head matrix, also when it is tied to the embedding) by the last; `shared_bytes` of them are one and the same
    when one stage is both. `kv_bytes_per_token` is K and V of one layer for one token. `workspace_bytes` is each
    stage's scratch: the largest dequantized tile and the activations of one step.
    """

    layer_bytes: tuple[int, ...]
    embedding_bytes: int
    head_bytes: int
    kv_bytes_per_token: int
    workspace_bytes: int
    shared_bytes: int = 0

    @property
    def n_layers(self) -> int:
        """Number of decoder layers to be divided among the stages."""
        return len(self.layer_bytes)

    def stage_bytes(self, start: int, end: int, kv_tokens: int) -> int:
        """All bytes that layers [start, end) need on one device, with KV room for so many tokens."""
        first, last = start == 0, end == self.n_layers
        total = sum(self.layer_bytes[start:end]) + (end - start) * self.kv_bytes_per_token * kv_tokens
        total += self.workspace_bytes + self.embedding_bytes * first + self.head_bytes * last
        return total - self.shared_bytes * (first and last)
