"""Which tensors a stage needs, by canonical name, and their shapes.

Canonical names are Hugging Face's, where models agree; of the norms around attention and MLP, whose names mean
different things in different models, Gemma's. Readers of files translate. Q and K rows are in HF's order
(rotate-half); Q, K, V, gate and up are tensors of their own, and so is each expert's.
"""

from __future__ import annotations

from swarmd.node.engine.spec import ArchSpec, FactorsScaling, LatentAttention, MoeSpec

EMBEDDING = "model.embed_tokens.weight"
OUTPUT_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
ROPE_FACTORS = "model.rope_factors"

Shapes = dict[str, tuple[int, ...]]


def tensor_shapes(spec: ArchSpec, start: int, end: int) -> Shapes:
    """The tensors that layers [start, end) need, with their row-major shapes.

    Includes the embedding for start == 0, and the output norm and head (the embedding when tied) for end ==
    n_layers. Raises ValueError for a range outside the model.
    """
    if not 0 <= start < end <= spec.n_layers:
        raise ValueError(f"layers {start} to {end - 1} are not a range of a model of {spec.n_layers} layers")
    shapes: Shapes = {}
    for rope in spec.ropes:
        if isinstance(rope.scaling, FactorsScaling):
            shapes[ROPE_FACTORS] = (rope.dim // 2,)
    if start == 0:
        shapes[EMBEDDING] = (spec.vocab_size, spec.hidden_size)
    for layer in range(start, end):
        shapes |= layer_shapes(spec, layer)
    if end == spec.n_layers:
        shapes[OUTPUT_NORM] = (spec.hidden_size,)
        shapes[head_name(spec)] = (spec.vocab_size, spec.hidden_size)
    return shapes


def head_name(spec: ArchSpec) -> str:
    """The matrix that the head multiplies by."""
    return EMBEDDING if spec.tied_embeddings else HEAD


def layer_prefix(layer: int) -> str:
    """What the names of a layer's tensors begin with."""
    return f"model.layers.{layer}."


def layer_shapes(spec: ArchSpec, layer: int) -> Shapes:
    """The tensors of one layer."""
    parts = _norm_shapes(spec)
    parts |= _latent_shapes(spec, spec.latent) if spec.latent else _attention_shapes(spec)
    parts |= _moe_shapes(spec.moe, spec.hidden_size) if spec.layers[layer].moe and spec.moe else _mlp_shapes(spec)
    prefix = layer_prefix(layer)
    return {prefix + name: shape for name, shape in parts.items()}


def kept_dense(name: str) -> bool:
    """Whether a matrix is kept as fp32 whatever the file has: that of latents, which is multiplied from both sides."""
    return name.endswith("self_attn.kv_b_proj.weight")


def _norm_shapes(spec: ArchSpec) -> Shapes:
    hidden = spec.hidden_size
    shapes: Shapes = {}
    if spec.norms in ("before", "both"):
        shapes |= {"input_layernorm.weight": (hidden,), "pre_feedforward_layernorm.weight": (hidden,)}
    if spec.norms in ("after", "both"):
        shapes |= {"post_attention_layernorm.weight": (hidden,), "post_feedforward_layernorm.weight": (hidden,)}
    return shapes


def _attention_shapes(spec: ArchSpec) -> Shapes:
    hidden, queries, keys = spec.hidden_size, spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
    shapes: Shapes = {}
    for part, rows in (("q", queries), ("k", keys), ("v", keys)):
        shapes[f"self_attn.{part}_proj.weight"] = (rows, hidden)
        if spec.qkv_bias:
            shapes[f"self_attn.{part}_proj.bias"] = (rows,)
    shapes["self_attn.o_proj.weight"] = (hidden, queries)
    if spec.output_bias:
        shapes["self_attn.o_proj.bias"] = (hidden,)
    if spec.qk_norm != "none":
        full = spec.qk_norm == "full"
        shapes["self_attn.q_norm.weight"] = (queries if full else spec.head_dim,)
        shapes["self_attn.k_norm.weight"] = (keys if full else spec.head_dim,)
    if spec.sinks:
        shapes["self_attn.sinks"] = (spec.n_heads,)
    return shapes


def _latent_shapes(spec: ArchSpec, latent: LatentAttention) -> Shapes:
    """Rows of the queries' matrix are head by head, first those that are not rotated; so are those of `kv_b_proj`,
    first a head's key."""
    hidden, heads = spec.hidden_size, spec.n_heads
    made_from = latent.q_rank or hidden
    shapes: Shapes = {}
    if latent.q_rank is not None:
        shapes["self_attn.q_a_proj.weight"] = (latent.q_rank, hidden)
        shapes["self_attn.q_a_layernorm.weight"] = (latent.q_rank,)
    shapes[f"self_attn.{query_stem(latent)}.weight"] = (heads * spec.head_dim, made_from)
    shapes["self_attn.kv_a_proj.weight"] = (latent.kv_rank, hidden)
    shapes["self_attn.kv_a_layernorm.weight"] = (latent.kv_rank,)
    shapes["self_attn.k_rope_proj.weight"] = (latent.rope_dim, hidden)
    shapes["self_attn.kv_b_proj.weight"] = (heads * (latent.nope_dim + latent.value_dim), latent.kv_rank)
    shapes["self_attn.o_proj.weight"] = (hidden, heads * latent.value_dim)
    return shapes


def query_stem(latent: LatentAttention) -> str:
    """What makes all heads' queries."""
    return "q_proj" if latent.q_rank is None else "q_b_proj"


def _mlp_shapes(spec: ArchSpec) -> Shapes:
    return _gated("mlp.", spec.hidden_size, spec.ffn_size, bias=spec.mlp_bias)


def _moe_shapes(moe: MoeSpec, hidden: int) -> Shapes:
    shapes: Shapes = {"mlp.router.weight": (moe.n_experts, hidden)}
    if moe.router_bias:
        shapes["mlp.router.bias"] = (moe.n_experts,)
    if moe.selection_bias:
        shapes["mlp.router.selection_bias"] = (moe.n_experts,)
    for expert in range(moe.n_experts):
        shapes |= _gated(f"mlp.experts.{expert}.", hidden, moe.ffn_size, bias=moe.expert_bias)
    if moe.shared_ffn_size:
        shapes |= _gated("mlp.shared_expert.", hidden, moe.shared_ffn_size, bias=False)
        if moe.shared_gate:
            shapes["mlp.shared_expert_gate.weight"] = (1, hidden)
    return shapes


def _gated(prefix: str, hidden: int, ffn: int, *, bias: bool) -> Shapes:
    shapes: Shapes = {}
    for part, rows, columns in (("gate", ffn, hidden), ("up", ffn, hidden), ("down", hidden, ffn)):
        shapes[f"{prefix}{part}_proj.weight"] = (rows, columns)
        if bias:
            shapes[f"{prefix}{part}_proj.bias"] = (rows,)
    return shapes
