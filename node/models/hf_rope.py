"""The rotary embeddings that a config.json describes.

In both spellings: `rope_theta` and `rope_scaling` (transformers 4), and `rope_parameters`, of the model or by type of
layer (transformers 5). What each scaling means is in modeling_rope_utils.py of `transformers`.
"""

from __future__ import annotations

from math import log

from swarmd.node.engine.spec import (
    MAX_CONTEXT,
    MAX_WIDTH,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeScaling,
    RopeSpec,
    YarnScaling,
)
from swarmd.node.models.hf_families import Family
from swarmd.node.models.hf_keys import ConfigKeys

DEFAULT_THETA = 10000.0
FULL, SLIDING = "full_attention", "sliding_attention"
_KNOWN = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"}


def ropes_of(config: ConfigKeys, family: Family, head_dim: int) -> tuple[RopeSpec, ...]:
    """The rotary embedding of all layers, or those of layers without and with a window."""
    theta = config.number("rope_theta", default=DEFAULT_THETA)
    parameters, scaling = config.table("rope_parameters"), config.table("rope_scaling")
    if parameters is not None and parameters.names() & {FULL, SLIDING}:
        return _by_type(config, parameters, family, theta, head_dim)
    full = _rope(config, scaling or parameters, family, theta, head_dim)
    if not family.local_rope:
        return (full,)
    local = config.number("rope_local_base_freq", default=family.local_theta or theta)
    return (full, RopeSpec(local, full.dim))


def score_factor(config: ConfigKeys, rope: RopeSpec) -> float:
    """What DeepSeek multiplies attention's scores by beside head_dim ** -0.5 (`yarn_apply_mscale` in
    modeling_deepseek_v3.py)."""
    scaling = config.table("rope_scaling") or config.table("rope_parameters")
    if scaling is None or not isinstance(rope.scaling, YarnScaling):
        return 1.0
    all_dim = scaling.optional_number("mscale_all_dim")
    return _magnitude(rope.scaling.factor, all_dim) ** 2 if all_dim else 1.0


def _by_type(
    config: ConfigKeys, parameters: ConfigKeys, family: Family, theta: float, head_dim: int
) -> tuple[RopeSpec, ...]:
    if not family.local_rope:
        config.refuse("rope_parameters", sorted(parameters.names()), "this kind of model has one for all layers")
    if unknown := parameters.names() - {FULL, SLIDING}:
        parameters.refuse(min(unknown), "there", "this type of layer is not known")
    thetas = {FULL: theta, SLIDING: family.local_theta or theta}
    return tuple(_rope(config, parameters.table(kind), family, thetas[kind], head_dim) for kind in (FULL, SLIDING))


def _rope(config: ConfigKeys, parameters: ConfigKeys | None, family: Family, theta: float, head_dim: int) -> RopeSpec:
    if parameters is None:
        parameters = ConfigKeys({})
    theta = parameters.number("rope_theta", default=theta)
    share = 1.0
    for keys in (parameters, config) if family.partial_rope else (parameters,):
        if share == 1.0:
            share = keys.number("partial_rotary_factor", default=1.0)
    if share > 1 or (share != 1 and not family.partial_rope):
        parameters.refuse("partial_rotary_factor", share, "1 is needed for this kind of model")
    dim = int(head_dim * share)
    if dim < 2 or dim % 2:
        parameters.refuse("partial_rotary_factor", share, f"it must give an even number of a head's {head_dim} sizes")
    return RopeSpec(theta, dim, _scaling(config, parameters, family, dim))


def _scaling(config: ConfigKeys, parameters: ConfigKeys, family: Family, dim: int) -> RopeScaling | None:
    kind = parameters.get("rope_type", "type") or "default"
    if family.partial_rope and kind in ("su", "yarn"):
        kind = "longrope"  # what Phi-3's first files called it
    makers = {"linear": _linear, "llama3": _llama3, "yarn": _yarn, "longrope": _long_rope}
    if kind == "default":
        scaling = None
    elif isinstance(kind, str) and kind in makers:
        scaling = makers[kind](config, parameters, dim)
    else:
        parameters.refuse("rope_type", kind, f"supported are default, {', '.join(makers)}")
    unread = parameters.names() - parameters.asked - _KNOWN
    if scaling is None:  # Phi-4 and others leave numbers of a scaling that they don't have
        unread -= {"factor", "original_max_position_embeddings"}
    if unread:
        parameters.refuse(min(unread), parameters.get(min(unread)), f"rope_type {kind!r:.40} is not known to use it")
    return scaling


def _linear(_config: ConfigKeys, parameters: ConfigKeys, _dim: int) -> LinearScaling:
    return LinearScaling(parameters.number("factor"))


def _llama3(config: ConfigKeys, parameters: ConfigKeys, _dim: int) -> Llama3Scaling:
    low, high = parameters.number("low_freq_factor"), parameters.number("high_freq_factor")
    if not low < high:
        parameters.refuse("low_freq_factor", low, f"it must be less than high_freq_factor, {high:g}")
    return Llama3Scaling(parameters.number("factor"), low, high, _original(config, parameters))


def _yarn(config: ConfigKeys, parameters: ConfigKeys, _dim: int) -> YarnScaling:
    original = _original(config, parameters)
    factor = parameters.number("factor", default=_context(config) / original)
    magnitude = parameters.optional_number("attention_factor")
    mscale, all_dim = parameters.optional_number("mscale"), parameters.optional_number("mscale_all_dim")
    if magnitude is None and mscale and all_dim:
        magnitude = _magnitude(factor, mscale) / _magnitude(factor, all_dim)
    return YarnScaling(
        factor=factor,
        original_context=original,
        beta_fast=parameters.number("beta_fast", default=32.0),
        beta_slow=parameters.number("beta_slow", default=1.0),
        magnitude=magnitude,
        truncate=parameters.flag("truncate", default=True),
    )


def _magnitude(factor: float, scale: float) -> float:
    return 0.1 * scale * log(factor) + 1.0 if factor > 1 else 1.0


def _long_rope(config: ConfigKeys, parameters: ConfigKeys, dim: int) -> LongRopeScaling:
    original = _original(config, parameters)
    return LongRopeScaling(
        short=_factors(parameters, "short_factor", dim // 2),
        long=_factors(parameters, "long_factor", dim // 2),
        original_context=original,
        extension=parameters.number("factor", default=_context(config) / original),
        magnitude=parameters.optional_number("attention_factor"),
    )


def _factors(parameters: ConfigKeys, key: str, count: int) -> tuple[float, ...]:
    values = parameters.get(key)
    if (
        not isinstance(values, list)
        or len(values) != count
        or count > MAX_WIDTH
        or not all(isinstance(value, int | float) and 0 < value < 1e30 for value in values)
    ):
        parameters.refuse(key, values, f"a list of {count} positive numbers is needed")
    return tuple(map(float, values))


def _original(config: ConfigKeys, parameters: ConfigKeys) -> int:
    """The context that the model was trained with; a key beside max_position_embeddings counts first (Phi-3)."""
    key = "original_max_position_embeddings"
    within = parameters.get(key)
    return config.integer(key, maximum=MAX_CONTEXT, default=within if isinstance(within, int) else _context(config))


def _context(config: ConfigKeys) -> int:
    return config.integer("max_position_embeddings", maximum=MAX_CONTEXT)
