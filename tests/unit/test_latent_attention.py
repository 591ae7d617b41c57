"""Multi-head latent attention, beside its logits (test_architectures.py): what it keeps, what is planned for it, what
computes it, and that a row does not depend on its company.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.memory_checkpoint import MemoryCheckpoint

from swarmd.node.engine.backends.torch_cpu import TorchCpuBackend
from swarmd.node.engine.computes import load_compute
from swarmd.node.engine.cpu.bindings import NativeMissing
from swarmd.node.engine.decoder_compute import DecoderCompute
from swarmd.node.engine.kv_cache import KvCache
from swarmd.node.engine.spec import ArchSpec, LatentAttention, LayerSpec, MoeSpec, RopeSpec
from swarmd.node.engine.stage_compute import Span
from swarmd.node.models.costs import model_costs

SPEC = ArchSpec(
    architecture="of a test",
    hidden_size=64,
    n_heads=4,
    n_kv_heads=4,
    head_dim=32,
    ffn_size=96,
    vocab_size=128,
    context_length=256,
    rms_eps=1e-6,
    layers=(LayerSpec(), LayerSpec(moe=True), LayerSpec(moe=True)),
    ropes=(RopeSpec(10000.0, 16),),
    moe=MoeSpec(16, 3, 32, score="sigmoid", shared_ffn_size=32, n_groups=4, top_groups=2, selection_bias=True),
    latent=LatentAttention(q_rank=32, kv_rank=96, nope_dim=16, rope_dim=16, value_dim=24),
)


def plain(checkpoint: MemoryCheckpoint, start: int = 0, end: int = SPEC.n_layers) -> DecoderCompute:
    torch.set_grad_enabled(False)
    return DecoderCompute.load(checkpoint, start, end, TorchCpuBackend(), kv_tokens=512)


@pytest.mark.parametrize("bits", [None, 4])
def test_costs_are_what_is_held(bits: int | None) -> None:
    """Matrices of both products with latents in fp32, whatever the checkpoint has."""
    checkpoint = MemoryCheckpoint(SPEC, bits=bits)
    costs = model_costs(checkpoint)
    assert costs.layer_bytes[1] == plain(checkpoint, 1, 2).weight_bytes
    assert sum(costs.layer_bytes) + costs.embedding_bytes + costs.head_bytes == plain(checkpoint).weight_bytes


def test_the_cache_holds_one_latent_and_one_key_for_all_heads() -> None:
    cache = KvCache(TorchCpuBackend(), 1, SPEC.cache, 64)
    cache.open(0)
    cache.reserve({0: 64})
    (layer,) = cache.layers(0)
    assert (layer.keys.nbytes + layer.values.nbytes) / 64 == 4 * (96 + 16)
    assert model_costs(MemoryCheckpoint(SPEC)).kv_bytes_per_token == 4 * (96 + 16)


def test_a_row_has_the_same_bits_alone_and_in_company() -> None:
    checkpoint, generator = MemoryCheckpoint(SPEC), np.random.default_rng(3)
    first, second = (generator.integers(0, SPEC.vocab_size, 12).tolist() for _ in range(2))
    alone, company = plain(checkpoint), plain(checkpoint)
    alone.open(0)
    company.open(0)
    company.open(1)
    for begin, end in ((0, 9), (9, 10), (10, 12)):
        rows = range(end - begin)
        single = alone.forward([Span(0, begin, first[begin:end])], None, "f32", rows).logits
        spans = [Span(0, begin, first[begin:end]), Span(1, begin, second[begin:end])]
        both = company.forward(spans, None, "f32", rows).logits
        assert single is not None
        assert both is not None
        assert (single.view(np.uint32) == both.view(np.uint32)).all()


def test_plain_torch_computes_it_where_our_own_kernels_are_wanted_if_they_can() -> None:
    checkpoint = MemoryCheckpoint(SPEC)
    compute = load_compute(checkpoint, 0, 3, device="cpu", kernels="auto", threads=1, kv_tokens=64)
    assert compute.name == "torch-cpu"
    with pytest.raises(NativeMissing, match=r"latent attention|were not built"):
        load_compute(checkpoint, 0, 3, device="cpu", kernels="native", threads=1, kv_tokens=64)
