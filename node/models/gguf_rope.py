"""Rotary embeddings as GGUF headers describe them."""

from __future__ import annotations

from collections.abc import Callable, Collection

from swarmd.node.engine.spec import (
    MAX_CONTEXT,
    MAX_WIDTH,
    FactorsScaling,
    LinearScaling,
    LongRopeScaling,
    RopeScaling,
    RopeSpec,
    YarnScaling,
)
from swarmd.node.models.gguf_families import Family
from swarmd.node.models.gguf_keys import ArchKeys, refuse, shown

FACTORS = "rope_freqs.weight"
LONG_FACTORS = "rope_factors_long.weight"
SHORT_FACTORS = "rope_factors_short.weight"

ReadVector = Callable[[str, int], tuple[float, ...]]
"""(tensor name, length) -> its values; raises ModelFileError for another length."""


def no_vectors(name: str, length: int) -> tuple[float, ...]:
    """A `ReadVector` for a header without its tensors."""
    refuse(f"tensor {name!r} of {length} values is needed, and only the header is here")


def ropes_of(
    keys: ArchKeys,
    family: Family,
    head_dim: int,
    context: int,
    names: Collection[str],
    read_vector: ReadVector,
) -> tuple[RopeSpec, ...]:
    """The rope of the layers that see everything, and behind it that of the layers with a window if it is another."""
    dim = keys.integer("rope.dimension_count", MAX_WIDTH, default=head_dim)
    if dim % 2 or dim > head_dim:
        refuse(f"a rotary embedding of {dim} of {head_dim} dimensions of a head is not possible")
    if family.permuted and dim != head_dim:
        refuse(f"a rotary embedding of {dim} of {head_dim} dimensions of a head is not supported for this architecture")
    theta = keys.number("rope.freq_base", default=10000.0)
    local_theta = keys.number("rope.freq_base_swa", default=family.local_theta or theta)
    scaling = _scaling(keys, family, dim, context, names, read_vector)
    whole = RopeSpec(theta, dim, scaling)
    local = RopeSpec(local_theta, dim, None if family.local_rope else scaling)
    return (whole,) if local == whole else (whole, local)


def _scaling(
    keys: ArchKeys,
    family: Family,
    dim: int,
    context: int,
    names: Collection[str],
    read_vector: ReadVector,
) -> RopeScaling | None:
    kind = keys.get("rope.scaling.type")
    factor = keys.optional_number("rope.scaling.factor") or keys.optional_number("rope.scale_linear")
    original = keys.integer("rope.scaling.original_context_length", MAX_CONTEXT, default=context)
    magnitude = keys.optional_number("rope.scaling.attn_factor")
    yarn = _yarn(keys, family, factor, original)
    if LONG_FACTORS in names or SHORT_FACTORS in names:
        if kind not in (None, "longrope"):
            refuse(f"it has long and short rope factors beside rope scaling {shown(kind)}")
        short, long = read_vector(SHORT_FACTORS, dim // 2), read_vector(LONG_FACTORS, dim // 2)
        return LongRopeScaling(short, long, original, context / original, magnitude)
    if magnitude not in (None, 1.0):
        refuse(f"rope.scaling.attn_factor of {magnitude} without long rope factors is not supported")
    scaled = factor is not None and factor != 1.0
    if FACTORS in names:
        if scaled and kind != "none":
            refuse(f"it has both rope factors and rope scaling {shown(kind)}")
        return FactorsScaling()
    if kind == "yarn":
        if factor is None:
            refuse("its rope scaling 'yarn' comes without rope.scaling.factor")
        return yarn
    if kind not in (None, "none", "linear"):
        refuse(f"its rope scaling {shown(kind)} is not supported")
    return LinearScaling(factor) if scaled and factor is not None and kind != "none" else None


def _yarn(keys: ArchKeys, family: Family, factor: float | None, original: int) -> YarnScaling:
    """What the keys of YaRN say; whether it is used is the caller's business.

    `yarn_attn_factor` stands for the whole magnitude in `transformers` and for a part of it in llama.cpp; neither is
    guessed.
    """
    for key, neutral in (("ext_factor", (None, 1.0)), ("attn_factor", (None,)), ("log_multiplier", (None,))):
        value = keys.optional_number(f"rope.scaling.yarn_{key}")
        if value not in neutral:
            refuse(f"rope.scaling.yarn_{key} of {value} is not supported")
    return YarnScaling(
        factor=factor or 1.0,
        original_context=original,
        beta_fast=keys.number("rope.scaling.yarn_beta_fast", default=32.0),
        beta_slow=keys.number("rope.scaling.yarn_beta_slow", default=1.0),
        truncate=family.yarn_truncate,
    )
