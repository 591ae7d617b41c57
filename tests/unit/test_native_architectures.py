"""Whatever an architecture asks for, a native step gives what the plain decoder gives, alone and in company.

Weights are dense fp32, so that both multiply the same numbers; the plain decoder's keys and values are rounded to fp16
as the native cache keeps them. What is left is fp32 rounding, and now and then a key that it moves to the next fp16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support.half_cache import HalfCacheBackend
from support.kernels import needs_kernels
from support.memory_checkpoint import MemoryCheckpoint

from swarmd.node.engine.cpu.native_compute import NativeCompute, why_not
from swarmd.node.engine.decoder_compute import DecoderCompute
from swarmd.node.engine.spec import (
    ArchSpec,
    FactorsScaling,
    LayerSpec,
    LinearScaling,
    MoeSpec,
    RopeSpec,
    YarnScaling,
)
from swarmd.node.engine.stage_compute import Span, StageCompute
from swarmd.node.models.costs import ATTENTION_THREADS, SAMPLED_ROWS, STEP_ROWS, model_costs

pytestmark = needs_kernels

OF_RANGE = 2e-4
"""What logits may differ by, of the distance between the largest and the smallest."""

BASE = ArchSpec(
    architecture="of a test",
    hidden_size=64,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    ffn_size=96,
    vocab_size=130,
    context_length=256,
    rms_eps=1e-5,
    layers=(LayerSpec(),) * 3,
    ropes=(RopeSpec(10000.0, 16),),
)
MOE = replace(
    BASE,
    ffn_size=40,
    layers=(LayerSpec(moe=True),) * 3,
    moe=MoeSpec(n_experts=8, top_k=3, ffn_size=32, normalize=False),
)


def moe(**changes: Any) -> MoeSpec:
    assert MOE.moe is not None
    return replace(MOE.moe, **changes)


SPECS: dict[str, ArchSpec] = {
    "llama": BASE,
    "norms after": replace(BASE, norms="after"),
    "norms before and after": replace(BASE, norms="both"),
    "norm of each head": replace(BASE, qk_norm="head"),
    "norm of all heads": replace(BASE, qk_norm="full"),
    "qkv bias": replace(BASE, qkv_bias=True),
    "all biases": replace(BASE, qkv_bias=True, output_bias=True, mlp_bias=True),
    "partial rotation": replace(BASE, ropes=(RopeSpec(10000.0, 6),)),
    "some layers without positions": replace(
        BASE, layers=(LayerSpec(), LayerSpec(rope=None), LayerSpec()), ropes=(RopeSpec(1e6, 16),)
    ),
    "two rotations and a window": replace(
        BASE,
        layers=(LayerSpec(window=7, rope=0), LayerSpec(rope=1), LayerSpec(window=20, rope=0)),
        ropes=(RopeSpec(10000.0, 16), RopeSpec(1e6, 16, LinearScaling(8.0))),
    ),
    "rotation with a magnitude": replace(BASE, ropes=(RopeSpec(10000.0, 16, YarnScaling(4.0, 64)),)),
    "factors of a file": replace(BASE, ropes=(RopeSpec(10000.0, 16, FactorsScaling()),)),
    "softcaps": replace(BASE, attention_softcap=2.0, logit_softcap=3.0),
    "multipliers": replace(
        BASE, attention_scale=0.4, embedding_multiplier=2.5, residual_multiplier=0.3, logit_multiplier=0.25
    ),
    "sinks": replace(BASE, sinks=True),
    "gelu": replace(BASE, activation="gelu_tanh"),
    "clamped": replace(BASE, activation="clamped_swiglu", embedding_multiplier=4.0, norms="after"),
    "odd sizes": replace(
        BASE,
        hidden_size=60,
        n_heads=3,
        n_kv_heads=1,
        head_dim=20,
        ffn_size=37,
        ropes=(RopeSpec(1e4, 20),),
        norms="both",
    ),
    "gemma": replace(
        BASE,
        norms="both",
        qk_norm="head",
        activation="gelu_tanh",
        embedding_multiplier=8.0,
        tied_embeddings=True,
        attention_softcap=50.0,
        logit_softcap=30.0,
        layers=(LayerSpec(window=9), LayerSpec(), LayerSpec(window=9)),
    ),
    "experts": MOE,
    "experts among layers": replace(MOE, layers=(LayerSpec(), LayerSpec(moe=True), LayerSpec(moe=True))),
    "shared expert": replace(MOE, moe=moe(normalize=True, shared_ffn_size=96)),
    "shared expert with a gate": replace(MOE, moe=moe(shared_ffn_size=24, shared_gate=True)),
    "router of sigmoids in groups": replace(
        MOE,
        moe=moe(
            n_experts=12, score="sigmoid", normalize=True, scale=2.5, n_groups=4, top_groups=2, selection_bias=True
        ),
    ),
    "gpt-oss": replace(
        MOE,
        activation="clamped_swiglu",
        sinks=True,
        qkv_bias=True,
        output_bias=True,
        layers=(LayerSpec(window=8, moe=True), LayerSpec(moe=True), LayerSpec(window=8, moe=True)),
        moe=moe(normalize=True, router_bias=True, expert_bias=True),
    ),
    "experts after norms": replace(MOE, norms="after", qk_norm="full", residual_multiplier=0.5),
    "one of two experts": replace(MOE, moe=moe(n_experts=2, top_k=1)),
}


@pytest.fixture(params=SPECS.values(), ids=list(SPECS), scope="module")
def spec(request: pytest.FixtureRequest) -> ArchSpec:
    return request.param


def native(checkpoint: MemoryCheckpoint, start: int = 0, end: int | None = None, threads: int = 2) -> NativeCompute:
    assert why_not(checkpoint, start, end or checkpoint.spec.n_layers) == ""
    return NativeCompute.load(
        checkpoint, start, end or checkpoint.spec.n_layers, threads=threads, kv_tokens=512, context=128
    )


def tokens_of(spec: ArchSpec, seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, spec.vocab_size, count).tolist()


def through(stages: Sequence[StageCompute], spans: Sequence[Span]) -> np.ndarray:
    """The logits of all rows of a step."""
    hidden, logits = None, None
    wanted = range(sum(len(span.tokens) for span in spans))
    for stage in stages:
        output = stage.forward(spans, hidden, "f32", wanted)
        hidden, logits = output.payload, output.logits
    assert logits is not None
    return logits.copy()


def rows_of(
    stages: Sequence[StageCompute], sequences: Sequence[Sequence[int]], cuts: Sequence[Sequence[int]]
) -> list[np.ndarray]:
    """Logits of every token of every sequence, step `i` taking each sequence up to cuts[sequence][i]."""
    found: list[list[np.ndarray]] = [[] for _ in sequences]
    for stage in stages:
        for seq in range(len(sequences)):
            stage.open(seq)
    at = [0] * len(sequences)
    for step in range(len(cuts[0])):
        spans = [Span(s, at[s], tokens[at[s] : cuts[s][step]]) for s, tokens in enumerate(sequences)]
        spans = [span for span in spans if span.tokens]
        logits, row = through(stages, spans), 0
        for span in spans:
            found[span.seq].append(logits[row : row + len(span.tokens)])
            row += len(span.tokens)
            at[span.seq] = span.end
    return [np.concatenate(parts) for parts in found]


ONE = [[29, 30, 32, 48, 60]]
"""A prompt longer than a window, then a token, a draft, and pieces."""


def test_logits_are_those_of_the_plain_decoder(spec: ArchSpec) -> None:
    checkpoint, sequences = MemoryCheckpoint(spec), [tokens_of(spec, 2, 60)]
    plain = DecoderCompute.load(checkpoint, 0, spec.n_layers, HalfCacheBackend(), kv_tokens=512, context=128)
    (expected,) = rows_of([plain], sequences, ONE)
    (found,) = rows_of([native(checkpoint)], sequences, ONE)
    assert np.isfinite(found).all()
    assert np.abs(found - expected).max() <= OF_RANGE * (expected.max() - expected.min())


@pytest.mark.parametrize("bits", [None, 4])
def test_a_row_has_the_same_bits_alone_and_in_company(spec: ArchSpec, bits: int | None) -> None:
    """Token by token on one thread; prompts side by side in pieces on three; and in stages of one layer."""
    if bits and any(size % 32 for size in (spec.hidden_size, spec.n_heads * spec.head_dim, *_widths(spec))):
        pytest.skip("quantized matrices have columns in multiples of 32")
    checkpoint = MemoryCheckpoint(spec, bits=bits)
    sequences = [tokens_of(spec, 3 + seq, count) for seq, count in enumerate((40, 21, 33))]
    single = native(checkpoint, threads=1)
    alone = rows_of([single], sequences[:1], [range(1, 41)])
    cuts = [[17, 18, 19, 34, 40], [20, 21, 21, 21, 21], [0, 31, 32, 33, 33]]
    together = rows_of([native(checkpoint, threads=3)], sequences, cuts)
    assert (together[0].view(np.uint32) == alone[0].view(np.uint32)).all()
    stages = [native(checkpoint, layer, layer + 1, threads=1 + layer) for layer in range(spec.n_layers)]
    for apart, whole in zip(rows_of(stages, sequences, cuts), together, strict=True):
        assert (apart.view(np.uint32) == whole.view(np.uint32)).all()


def test_more_rows_than_go_through_the_experts_at_a_time() -> None:
    """1760 pairs of a row and an expert in one step, cut at 1024; and the same rows in pieces, by two threads."""
    spec = replace(MOE, moe=moe(n_experts=16, top_k=8, shared_ffn_size=32))
    checkpoint, sequences = MemoryCheckpoint(spec), [tokens_of(spec, 5, 110), tokens_of(spec, 6, 110)]
    plain = DecoderCompute.load(checkpoint, 0, spec.n_layers, HalfCacheBackend(), kv_tokens=512, context=128)
    whole = rows_of([native(checkpoint, threads=2)], sequences, [[110], [110]])
    pieces = rows_of([native(checkpoint, threads=2)], sequences, [[1, 60, 110], [1, 50, 110]])
    for found, again, expected in zip(whole, pieces, rows_of([plain], sequences, [[110], [110]]), strict=True):
        assert np.abs(found - expected).max() <= OF_RANGE * (expected.max() - expected.min())
        assert (found.view(np.uint32) == again.view(np.uint32)).all()


def _widths(spec: ArchSpec) -> list[int]:
    mlp = [spec.ffn_size] if not all(layer.moe for layer in spec.layers) else []
    return mlp + ([spec.moe.ffn_size, spec.moe.shared_ffn_size] if spec.moe else [])


def test_the_workspace_is_what_was_planned_for(spec: ArchSpec) -> None:
    """But for the pieces' beginnings at multiples of 64 bytes."""
    checkpoint, logits, payloads = MemoryCheckpoint(spec), 4 * spec.vocab_size * SAMPLED_ROWS, 8 * STEP_ROWS
    planned = model_costs(checkpoint).workspace_bytes - logits - 48 * spec.vocab_size - payloads * spec.hidden_size
    stage = native(checkpoint, threads=ATTENTION_THREADS)
    held = stage.workspace_bytes(STEP_ROWS, SAMPLED_ROWS, spec.context_length)
    assert planned * 0.98 <= held <= planned * 1.01


def test_costs_are_what_is_held(spec: ArchSpec) -> None:
    checkpoint = MemoryCheckpoint(spec)
    costs = model_costs(checkpoint)
    for start, end in ((0, spec.n_layers), (0, 1), (1, spec.n_layers)):
        stage = native(checkpoint, start, end)
        expected = sum(costs.layer_bytes[start:end])
        expected += costs.embedding_bytes * (start == 0) + costs.head_bytes * (end == spec.n_layers)
        expected -= costs.shared_bytes * (start == 0 and end == spec.n_layers)
        assert stage.weight_bytes == expected
