"""Logits of a whole checkpoint by the decoder and plain torch, without a stage around them."""

from __future__ import annotations

import torch

from swarmd.node.engine.backends.base import RowSpan
from swarmd.node.engine.backends.torch_cpu import TorchCpuBackend
from swarmd.node.engine.decoder import Decoder
from swarmd.node.engine.kv_cache import KvCache
from swarmd.node.engine.weights import load_stage_weights
from swarmd.node.models.checkpoint import Checkpoint


def decoder_logits(checkpoint: Checkpoint, tokens: list[int]) -> torch.Tensor:
    """Logits [tokens, vocabulary] of one sequence in one step, as a model that is loaded for that length."""
    spec, backend = checkpoint.spec, TorchCpuBackend()
    weights = load_stage_weights(checkpoint, 0, spec.n_layers, backend, context=len(tokens))
    decoder = Decoder(spec, 0, weights, backend)
    cache = KvCache(backend, spec.n_layers, spec.cache, len(tokens) + 16)
    cache.open(0)
    cache.reserve({0: len(tokens)})
    x = decoder.forward(decoder.embed(tokens), [RowSpan(0, len(tokens), 0)], [cache.layers(0)])
    return torch.from_numpy(decoder.head(x))
