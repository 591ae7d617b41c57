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
