"""The mixture of experts that a config.json describes, and which layers have it.

Sources: the configuration and modeling files of each model in `transformers`; of DeepSeek's keys that these do not look
at, the ones beside the published files.
"""

from __future__ import annotations

from typing import Any

from swarmd.node.engine.spec import MAX_EXPERTS, MAX_LAYERS, MAX_WIDTH, MoeSpec
from swarmd.node.models.hf_families import Family
from swarmd.node.models.hf_keys import ConfigKeys


def moe_of(keys: ConfigKeys, family: Family) -> MoeSpec | None:
    """The mixture of the layers that have one."""
    kind = family.moe
    if kind is None:
        return None
    if kind in ("deepseek_v2", "deepseek_v3"):
        return _deepseek(keys, v3=kind == "deepseek_v3")
    n_experts = keys.integer("num_local_experts", "num_experts", maximum=MAX_EXPERTS)
    size = ("moe_intermediate_size", "intermediate_size") if kind == "qwen" else ("intermediate_size",)
    shared = keys.integer(family.shared_size, minimum=0, maximum=MAX_WIDTH) if family.shared_size else 0
    return MoeSpec(
        n_experts=n_experts,
        top_k=keys.integer("num_experts_per_tok", "experts_per_token", maximum=n_experts),
        ffn_size=keys.integer(*size, maximum=MAX_WIDTH),
        normalize=keys.flag("norm_topk_prob") if kind == "qwen" else True,
        router_bias=kind == "gpt_oss",
        expert_bias=kind == "gpt_oss",
        shared_ffn_size=shared,
        shared_gate=kind == "qwen" and shared > 0,
    )


def _deepseek(keys: ConfigKeys, *, v3: bool) -> MoeSpec:
    n_experts = keys.integer("n_routed_experts", maximum=MAX_EXPERTS)
    top_k = keys.integer("num_experts_per_tok", maximum=n_experts)
    size = keys.integer("moe_intermediate_size", maximum=MAX_WIDTH)
    _only(keys, "scoring_func", "sigmoid" if v3 else "softmax")
    _only(keys, "moe_layer_freq", 1)
    if v3:
        _only(keys, "topk_method", "noaux_tc")
    else:  # `transformers` does not look at it, and DeepSeek's own code then leaves the scale out
        _only(keys, "norm_topk_prob", False)
    n_groups, top_groups, group_best = _groups(keys, n_experts, top_k, v3=v3)
    return MoeSpec(
        n_experts=n_experts,
        top_k=top_k,
        ffn_size=size,
        score="sigmoid" if v3 else "softmax",
        normalize=v3 and keys.flag("norm_topk_prob"),
        scale=keys.number("routed_scaling_factor"),
        shared_ffn_size=keys.integer("n_shared_experts", minimum=0, maximum=MAX_WIDTH // size) * size,
        n_groups=n_groups,
        top_groups=top_groups,
        group_best=group_best,
        selection_bias=v3,
    )


def _groups(keys: ConfigKeys, n_experts: int, top_k: int, *, v3: bool) -> tuple[int, int, int]:
    """How many groups there are, how many are chosen, and how many of each one's experts that depends on."""
    method = "noaux_tc" if v3 else keys.get("topk_method")
    if method == "greedy":
        return 1, 1, 1
    if not v3 and method != "group_limited_greedy":
        keys.refuse("topk_method", method, "supported are greedy and group_limited_greedy")
    groups = keys.integer("n_group", maximum=n_experts)
    best = 2 if v3 else 1
    if n_experts % groups or n_experts // groups < best:
        keys.refuse("n_group", groups, f"it must divide the {n_experts} experts into groups of {best} at least")
    chosen = keys.integer("topk_group", maximum=groups)
    if top_k > chosen * (n_experts // groups):
        keys.refuse("topk_group", chosen, f"so many groups have fewer than the {top_k} experts that are to be chosen")
    return groups, chosen, best


def _only(keys: ConfigKeys, key: str, only: Any) -> None:
    if (value := keys.get(key)) not in (None, only):
        keys.refuse(key, value, f"only {only!r} is supported for this kind of model")


def mixed_layers(keys: ConfigKeys, family: Family, count: int) -> list[bool]:
    """Whether each layer's MLP is a mixture of experts."""
    if family.moe in ("deepseek_v2", "deepseek_v3"):
        plain_ones = keys.integer("first_k_dense_replace", minimum=0, maximum=MAX_LAYERS)
        return [layer >= plain_ones for layer in range(count)]
    if family.moe != "qwen":
        return [True] * count
    step = keys.integer("decoder_sparse_step", maximum=MAX_LAYERS, default=1)
    plain = set(keys.integers("mlp_only_layers", maximum=MAX_LAYERS) or ())
    return [layer not in plain and (layer + 1) % step == 0 for layer in range(count)]
