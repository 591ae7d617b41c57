"""A model's architecture, from a config.json as Hugging Face's `transformers` (4 and 5) and MLX's tools write it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from swarmd.node.engine.spec import (
    MAX_CONTEXT,
    MAX_LAYERS,
    MAX_VOCAB,
    MAX_WIDTH,
    Activation,
    ArchSpec,
    LatentAttention,
    LayerSpec,
    MoeSpec,
    RopeSpec,
    YarnScaling,
)
from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.hf_families import FAMILIES, NEUTRAL, WHY_NOT, WRAPPERS, Family
from swarmd.node.models.hf_keys import ConfigKeys
from swarmd.node.models.hf_latent import latent_of, side_by_side
from swarmd.node.models.hf_moe import mixed_layers, moe_of
from swarmd.node.models.hf_rope import FULL, SLIDING, ropes_of, score_factor

_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def spec_from_config(config: Mapping[str, Any]) -> ArchSpec:
    """The architecture that a config.json describes; its name is the model_type of the text model.

    Raises ModelFileError for an unknown model_type (naming it and the known ones), for missing or impossible values,
    and for variants of a known one that the decoder does not implement, naming key and value.
    """
    family, values = _family_of(config)
    keys = ConfigKeys(values, defaults=family.defaults)
    hidden = keys.integer("hidden_size", maximum=MAX_WIDTH)
    n_heads, n_kv_heads, head_dim, latent = _heads(keys, family, hidden)
    n_layers = keys.integer("num_hidden_layers", maximum=MAX_LAYERS)
    ropes = ropes_of(keys, family, latent.rope_dim if latent else head_dim)
    moe = moe_of(keys, family)
    qkv_bias, output_bias = _attention_biases(keys, family)
    spec = ArchSpec(
        architecture=str(values["model_type"]),
        hidden_size=hidden,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        ffn_size=keys.integer("intermediate_size", maximum=MAX_WIDTH, default=moe.ffn_size if moe else None),
        vocab_size=keys.integer("vocab_size", maximum=MAX_VOCAB),
        context_length=_context(keys, ropes[0]),
        rms_eps=keys.number("rms_norm_eps", default=1e-6),
        layers=_layers(keys, family, n_layers, moe),
        ropes=ropes,
        tied_embeddings=keys.flag("tie_word_embeddings"),
        norms=family.norms,
        qk_norm=family.qk_norm,
        activation=_activation(keys, family),
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=family.mlp_bias and keys.flag("mlp_bias"),
        sinks=family.sinks,
        attention_scale=_attention_scale(keys, family, head_dim, ropes[0]),
        attention_softcap=keys.optional_number("attn_logit_softcapping") if family.softcaps else None,
        logit_softcap=keys.optional_number("final_logit_softcapping") if family.softcaps else None,
        moe=moe,
        latent=latent,
        **_multipliers(keys, family, hidden),
    )
    _refuse_unread(keys)
    return spec


def _heads(keys: ConfigKeys, family: Family, hidden: int) -> tuple[int, int, int, LatentAttention | None]:
    """Attention heads, key-value heads, dimensions of a head, and what latent attention makes of them."""
    n_heads = keys.integer("num_attention_heads", maximum=MAX_WIDTH)
    n_kv_heads = keys.integer("num_key_value_heads", maximum=MAX_WIDTH, default=n_heads)
    latent = latent_of(keys, family)
    if latent:
        head_dim = latent.nope_dim + latent.rope_dim
    else:
        head_dim = keys.integer("head_dim", maximum=MAX_WIDTH, default=hidden // n_heads)
    if latent and n_kv_heads != n_heads:
        keys.refuse("num_key_value_heads", n_kv_heads, f"it must be {n_heads}, as many as attention heads")
    if n_heads % n_kv_heads:
        keys.refuse("num_key_value_heads", n_kv_heads, f"it must divide the {n_heads} attention heads")
    return n_heads, n_kv_heads, head_dim, latent


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that a config.json names. Raises ModelFileError for an unknown one."""
    return _family_of(config)[0]


def rotates_neighbours(config: Mapping[str, Any]) -> bool:
    """Whether the files' rows are in an order that `hf_latent.row_order` undoes. Raises ModelFileError."""
    family, values = _family_of(config)
    return side_by_side(ConfigKeys(values, defaults=family.defaults), family)


def _family_of(config: Mapping[str, Any]) -> tuple[Family, Mapping[str, Any]]:
    """The family, and the object that describes the text model."""
    name = config.get("model_type")
    text = config.get("text_config")
    if name in WRAPPERS and isinstance(text, dict):
        inner = {"model_type": "gemma3_text" if name == "gemma3" else None, **text}
        if (tied := config.get("tie_word_embeddings")) is not None:
            inner.setdefault("tie_word_embeddings", tied)
        name, config = inner["model_type"], inner
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        why = WHY_NOT.get(str(name), "it is not supported")
        raise ModelFileError(
            f"this model cannot be served: model_type in config.json is {name!r:.60}; {why}; supported are "
            f"{', '.join([*FAMILIES, *WRAPPERS])}"
        )
    return family, config


def _activation(keys: ConfigKeys, family: Family) -> Activation:
    key = family.activation_keys[0]
    keys.get("hidden_act")  # Gemma's files have it too, and `transformers` does not look at it
    name = keys.get(key) or "silu"
    if family.moe == "gpt_oss":
        _check_clamped(keys, name)
        return "clamped_swiglu"
    if family.scaled_embedding and name == "gelu":
        name = "gelu_pytorch_tanh"  # Gemma's first files said so and meant the other
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        keys.refuse(key, name, f"supported are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _check_clamped(keys: ConfigKeys, name: object) -> None:
    if name != "silu":
        keys.refuse("hidden_act", name, "silu is needed for this kind of model")
    for key, only in (("swiglu_alpha", 1.702), ("swiglu_limit", 7.0)):
        if (value := keys.number(key, default=only)) != only:
            keys.refuse(key, value, f"only {only} is supported")


def _attention_biases(keys: ConfigKeys, family: Family) -> tuple[bool, bool]:
    """Whether Q, K and V have biases, and whether the output has."""
    match family.bias:
        case "no":
            return False, False
        case "qkv":
            return True, False
        case "qkv_bias":
            return keys.flag("qkv_bias"), False
        case "attention_bias":
            biased = keys.flag("attention_bias")
            return biased, biased
        case "attention_out_bias":
            return keys.flag("attention_bias"), keys.flag("attention_out_bias")


def _attention_scale(keys: ConfigKeys, family: Family, head_dim: int, rope: RopeSpec) -> float:
    match family.scale:
        case "head_dim":
            return head_dim**-0.5
        case "head_dim and yarn":
            return head_dim**-0.5 * score_factor(keys, rope)
        case "query_pre_attn_scalar":
            return keys.number("query_pre_attn_scalar") ** -0.5
        case "attention_multiplier":
            return keys.number("attention_multiplier", default=1.0)


def _multipliers(keys: ConfigKeys, family: Family, hidden: int) -> dict[str, float]:
    if family.scaled_embedding:
        return {"embedding_multiplier": hidden**0.5}
    if not family.multipliers:
        return {}
    return {
        "embedding_multiplier": keys.number("embedding_multiplier", default=1.0),
        "residual_multiplier": keys.number("residual_multiplier", default=1.0),
        "logit_multiplier": 1 / keys.number("logits_scaling", default=1.0),
    }


def _context(keys: ConfigKeys, rope: RopeSpec) -> int:
    """max_position_embeddings, or what YaRN extends the original context to where that is more."""
    said = keys.integer("max_position_embeddings", maximum=MAX_CONTEXT)
    if isinstance(rope.scaling, YarnScaling):
        said = max(said, min(MAX_CONTEXT, int(rope.scaling.factor * rope.scaling.original_context)))
    return said


def _layers(keys: ConfigKeys, family: Family, count: int, moe: MoeSpec | None) -> tuple[LayerSpec, ...]:
    rotated = _rotated(keys, family, count)
    windows = _windows(keys, family, rotated)
    mixed = mixed_layers(keys, family, count) if moe else [False] * count
    described = zip(windows, rotated, mixed, strict=True)
    return tuple(
        LayerSpec(window, int(window is not None and family.local_rope) if rotates else None, moe=mix)
        for window, rotates, mix in described
    )


def _rotated(keys: ConfigKeys, family: Family, count: int) -> list[bool]:
    """Whether each layer has positions."""
    if not family.no_rope:
        return [True] * count
    said = keys.integers("no_rope_layers", maximum=MAX_LAYERS)
    interval = keys.integer("no_rope_layer_interval", maximum=MAX_LAYERS)
    if said is None:
        return [(layer + 1) % interval != 0 for layer in range(count)]
    if len(said) < count:
        keys.refuse("no_rope_layers", said, f"one number for each of the {count} layers is needed")
    return [bool(flag) for flag in said[:count]]


def _windows(keys: ConfigKeys, family: Family, rotated: list[bool]) -> list[int | None]:
    """Each layer's window."""
    count = len(rotated)
    types = _layer_types(keys, count)
    used = keys.flag("use_sliding_window") if family.window_switch else True
    if keys.get("sliding_window") in (None, 0) or not used:
        return [None] * count
    window = keys.integer("sliding_window", maximum=MAX_CONTEXT)
    if types is not None and family.windows in ("never", "all") and not family.window_switch:
        only = FULL if family.windows == "never" else SLIDING
        if set(types) != {only}:
            keys.refuse("layer_types", sorted(set(types)), f"only {only} is supported for this kind of model")
    if types is not None:
        return [window if kind == SLIDING else None for kind in types]
    return [window if chosen else None for chosen in _windowed(keys, family, rotated)]


def _windowed(keys: ConfigKeys, family: Family, rotated: list[bool]) -> list[bool]:
    """Whether each layer has the window, where layer_types does not say so."""
    count = len(rotated)
    match family.windows:
        case "all":
            return [True] * count
        case "later":
            first = keys.integer("max_window_layers", minimum=0, maximum=1 << 20)
            return [layer >= first for layer in range(count)]
        case "period":
            period = keys.integer("sliding_window_pattern", maximum=MAX_LAYERS, default=family.period)
            return [(layer + 1) % period != 0 for layer in range(count)]
        case "no rope":
            return [not rotates for rotates in rotated]
        case "never":
            if family.window_switch:
                keys.refuse("use_sliding_window", True, "layer_types is needed, to say which layers have a window")
            return [False] * count


def _layer_types(keys: ConfigKeys, count: int) -> list[str] | None:
    types = keys.get("layer_types")
    if types is None:
        return None
    if not isinstance(types, list) or len(types) != count:
        keys.refuse("layer_types", types, f"a list with one entry for each of the {count} layers is needed")
    for kind in types:
        if kind not in (FULL, SLIDING):
            keys.refuse("layer_types", kind, f"supported are {FULL} and {SLIDING}")
    return cast(list[str], types)


def _refuse_unread(keys: ConfigKeys) -> None:
    """Keys that mean something to other models, and would to this one, in a way that is not known here."""
    for key in sorted(keys.names() & NEUTRAL.keys() - keys.asked):
        value = keys.get(key)
        if value not in NEUTRAL[key]:
            keys.refuse(key, value, "this kind of model is not known to use it")
