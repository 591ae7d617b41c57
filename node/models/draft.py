"""The draft model of a node: a small model that guesses tokens for the models that this node drives."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec

from swarmd.node.engine.spec import ArchSpec
from swarmd.node.models.checkpoint import open_checkpoint
from swarmd.node.models.costs import model_costs
from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.progress import ProgressCallback
from swarmd.node.models.store import ModelStore
from swarmd.partition.costs import ModelCosts

DRAFT_KV_TOKENS = 4096
"""KV room of a draft model; sequences that do not fit at the same time take turns."""


class DraftModel(msgspec.Struct, frozen=True):
    """A draft model on this machine; `bytes` is what it takes in memory, once loaded: all layers, KV, workspace."""

    path: Path
    bytes: int


async def bring_draft(store: ModelStore, name: str, progress: ProgressCallback) -> DraftModel:
    """The draft model that `name` means, here and readable.

    Raises ModelNameError, ModelFileError, ModelSourceError, OSError.
    """
    stored = await store.ensure(name, progress)
    return DraftModel(stored.path, await asyncio.to_thread(_needed_bytes, stored.path))


def require_same_vocabulary(draft: Path, drafting: ArchSpec, target: ArchSpec) -> None:
    """Raises ModelFileError, which names the draft model, unless both models have the same number of tokens."""
    if drafting.vocab_size != target.vocab_size:
        raise ModelFileError(
            f"the draft model {draft} has a vocabulary of {drafting.vocab_size} tokens and the model that it is to "
            f"guess for one of {target.vocab_size}: give --draft-model a smaller model of the same family, or none"
        )


def _needed_bytes(path: Path) -> int:
    with open_checkpoint(path) as checkpoint:
        return whole_model_bytes(model_costs(checkpoint), min(DRAFT_KV_TOKENS, checkpoint.spec.context_length))


def whole_model_bytes(costs: ModelCosts, kv_tokens: int) -> int:
    """Bytes that one process takes which holds all layers and so many tokens of KV."""
    weights = sum(costs.layer_bytes) + costs.embedding_bytes + costs.head_bytes - costs.shared_bytes
    return weights + costs.n_layers * costs.kv_bytes_per_token * kv_tokens + costs.workspace_bytes
