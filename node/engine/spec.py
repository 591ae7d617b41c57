"""A model's architecture as data: everything that the decoder must know, whatever kind of file said so. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MAX_LAYERS = 1024
MAX_WIDTH = 1 << 20
MAX_VOCAB = 1 << 22
MAX_CONTEXT = 1 << 26
MAX_EXPERTS = 1 << 12


@dataclass(frozen=True)
class LinearScaling:
    """position / factor (Chen et al. 2023, arXiv:2306.15595)."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Low frequencies are divided by `factor`, high ones kept, those between blended (Llama 3.1's config.json)."""

    factor: float
    low_factor: float
    high_factor: float
    original_context: int


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al. 2023, arXiv:2309.00071). `magnitude` multiplies cos and sin; None: 0.1 ln(factor) + 1.

    `truncate`: the ramp's ends are rounded to whole dimensions (gpt-oss does not).
    """

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    magnitude: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class LongRopeScaling:
    """A divisor per frequency, other ones beyond the original context (Ding et al. 2024, arXiv:2402.13753).

    `magnitude` multiplies cos and sin; None: sqrt(1 + ln(max/original) / ln(original)), `extension` being max/original.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_context: int
    extension: float
    magnitude: float | None = None


@dataclass(frozen=True)
class FactorsScaling:
    """A divisor per rotation frequency, in the tensor ROPE_FACTORS (GGUF files of Llama 3.1)."""


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling | FactorsScaling


@dataclass(frozen=True)
class RopeSpec:
    """A rotary embedding, rotate-half, of the first `dim` dimensions of each head (Su et al. 2021, arXiv:2104.09864).

    Frequencies are theta ** (-2i/dim), then scaled; rope.py computes them.
    """

    theta: float
    dim: int
    scaling: RopeScaling | None = None


@dataclass(frozen=True)
class LayerSpec:
    """What may differ from layer to layer.

    `window`: the number of positions that a query sees, itself included (None: all before it); `rope`: an index into
    `ArchSpec.ropes` (None: no positions); `moe`: the MLP is a mixture of experts.
    """

    window: int | None = None
    rope: int | None = 0
    moe: bool = False


@dataclass(frozen=True)
class MoeSpec:
    """A mixture of experts (Shazeer et al. 2017, arXiv:1701.06538) in place of the MLP.

    Scores of all experts are softmax or sigmoid of the router's outputs; the `top_k` best run, weighted by their
    scores, divided by their sum if `normalize`, times `scale`. `shared_ffn_size` > 0: an expert that always runs, with
    `shared_gate` weighted by the sigmoid of one more output. With `n_groups` > 1 only the experts of the `top_groups`
    groups whose `group_best` best sum highest are candidates (1 in DeepSeek-V2, 2 in V3), and `selection_bias` is added
    to scores for choosing only (DeepSeek-V3, arXiv:2412.19437).
    """

    n_experts: int
    top_k: int
    ffn_size: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True
    scale: float = 1.0
    router_bias: bool = False
    expert_bias: bool = False
    shared_ffn_size: int = 0
    shared_gate: bool = False
    n_groups: int = 1
    top_groups: int = 1
    group_best: int = 2
    selection_bias: bool = False


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    Keys and values of all heads are products of one latent of `kv_rank` numbers per token and a matrix per head:
    `nope_dim` of each key, to which `rope_dim` rotated ones that all heads share are joined, and `value_dim` of each
    value. Queries are made by way of `q_rank` numbers, or directly (None). Latents are normed, with `eps`.
    """

    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    eps: float = 1e-6


@dataclass(frozen=True)
class CacheShape:
    """What a layer keeps of each token: `heads` times a key of `key_dim` and a value of `value_dim` numbers."""

    heads: int
    key_dim: int
    value_dim: int


NormPlacement = Literal["before", "after", "both"]
"""Where a block's RMS norms are: before attention and MLP (Llama), after them (OLMo 2), or both (Gemma 2)."""

QkNorm = Literal["none", "head", "full"]
"""RMS norm of queries and keys before the rotation: none, each head by itself (Qwen 3), or all together (OLMo 2)."""

Activation = Literal["silu", "gelu_tanh", "clamped_swiglu"]
"""silu(gate) * up; gelu_tanh(gate) * up; or gpt-oss' g * sigmoid(1.702 g) * (u + 1), g <= 7, |u| <= 7."""


@dataclass(frozen=True)
class ArchSpec:
    """One decoder-only transformer.

    `layers` has one entry per layer. Softcaps are c: x -> c tanh(x / c). `attention_scale` multiplies q.k.
    `embedding_multiplier` is applied after the embedding, `residual_multiplier` to what attention and MLP add,
    `logit_multiplier` to the head's outputs. `tied_embeddings`: the head is the embedding matrix. Norm weights are what
    x / rms is multiplied by: readers of files that hold weight - 1 (Gemma) add the 1. With `latent`, `head_dim` is that
    of queries and keys.
    """

    architecture: str
    hidden_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    context_length: int
    rms_eps: float
    layers: tuple[LayerSpec, ...]
    ropes: tuple[RopeSpec, ...]
    tied_embeddings: bool = False
    norms: NormPlacement = "before"
    qk_norm: QkNorm = "none"
    activation: Activation = "silu"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    sinks: bool = False
    attention_scale: float = 0.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    moe: MoeSpec | None = None
    latent: LatentAttention | None = None

    def __post_init__(self) -> None:
        if self.attention_scale == 0.0:
            object.__setattr__(self, "attention_scale", self.head_dim**-0.5)

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def cache(self) -> CacheShape:
        """What a layer keeps of a token. Latents stand where values do: both keys and values are made from them."""
        if self.latent is None:
            return CacheShape(self.n_kv_heads, self.head_dim, self.head_dim)
        return CacheShape(1, self.latent.rope_dim, self.latent.kv_rank)
