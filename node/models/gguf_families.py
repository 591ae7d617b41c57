"""What an architecture's name in a GGUF header implies and no key says.

Sources: convert_hf_to_gguf.py of llama.cpp, which writes the files, src/models there, which reads them, and for the
arithmetic the models' code in `transformers`, which decides where the two differ.
"""

from __future__ import annotations

from dataclasses import dataclass

from swarmd.node.engine.spec import Activation, NormPlacement, QkNorm


@dataclass(frozen=True)
class Family:
    """One value of `general.architecture`."""

    permuted: bool = False
    """The converter interleaves each head's halves in the rows of Q and K (`LlamaModel.permute`)."""
    norms: NormPlacement = "before"
    qk_norm: QkNorm = "none"
    activation: Activation = "silu"
    biases: tuple[str, ...] = ()
    """What must have biases: "qkv", "output", "experts". Where nothing is said they are seen by their tensors."""
    sinks: bool = False
    pre_mlp_norm: str = "ffn_norm"
    """The file's name for the norm before the MLP."""
    window_period: int = 0
    """Of so many layers the last sees everything and the others a window; 1: all see a window; 0: none is known."""
    default_window: int = 0
    """Where the file names none."""
    local_rope: bool = False
    """Layers with a window rotate without scaling, by a theta of their own if the file names one."""
    local_theta: float | None = None
    """The theta of layers with a window where the file names none; None: that of the others."""
    no_rope_period: int = 0
    """Every n-th layer has no positions."""
    yarn_truncate: bool = True
    """See `YarnScaling`."""
    normalize: bool = True
    """The chosen experts' weights are divided by their sum."""
    shared_gate: bool = False
    """The shared expert has a gate."""
    scaled_embedding: bool = False
    """Embeddings are multiplied by sqrt(hidden size)."""
    layers_of_27b: int = 0
    """The number of layers by which the model of 27B is known, which scales attention in a way of its own."""


WHY_NOT = {
    "deepseek2": "multi-head latent attention is read from folders of safetensors only; these files leave out YaRN's "
    "mscale, and older ones the experts' groups and scores",
}
"""What is known of other architectures."""

FAMILIES: dict[str, Family] = {
    "llama": Family(permuted=True, window_period=1),
    "mistral3": Family(permuted=True, window_period=1),
    "granite": Family(permuted=True),
    "granitemoe": Family(permuted=True),
    "smollm3": Family(permuted=True, no_rope_period=4),
    "qwen2": Family(biases=("qkv",)),
    "qwen2moe": Family(biases=("qkv",), normalize=False, shared_gate=True),
    "qwen3": Family(qk_norm="head"),
    "qwen3moe": Family(qk_norm="head"),
    "phi3": Family(window_period=1),
    "olmo2": Family(norms="after", qk_norm="full", window_period=4, local_rope=True),
    "olmoe": Family(qk_norm="full", normalize=False),
    "seed_oss": Family(biases=("qkv",), pre_mlp_norm="post_attention_norm"),
    "gemma": Family(activation="gelu_tanh", scaled_embedding=True),
    "gemma2": Family(
        norms="both",
        activation="gelu_tanh",
        window_period=2,
        default_window=4096,
        scaled_embedding=True,
        layers_of_27b=46,
    ),
    "gemma3": Family(
        norms="both",
        qk_norm="head",
        activation="gelu_tanh",
        window_period=6,
        local_rope=True,
        local_theta=10000.0,
        scaled_embedding=True,
        layers_of_27b=62,
    ),
    "gpt-oss": Family(
        activation="clamped_swiglu",
        biases=("qkv", "output", "experts"),
        sinks=True,
        window_period=2,
        pre_mlp_norm="post_attention_norm",
        yarn_truncate=False,
    ),
}
