"""Multi-head latent attention, as a config.json describes it, and the order of its rows in files.

DeepSeek's files have the dimensions that are rotated together side by side; the engine rotates the first with the
middle one (`apply_rotary_pos_emb_interleave` in modeling_deepseek_v3.py of `transformers`). Queries and keys are put
into the engine's order alike, which no score sees.
"""

from __future__ import annotations

import numpy as np

from swarmd.node.engine.quantized import Array
from swarmd.node.engine.spec import MAX_WIDTH, ArchSpec, LatentAttention
from swarmd.node.engine.tensors import query_stem
from swarmd.node.models.hf_families import Family
from swarmd.node.models.hf_keys import ConfigKeys

NORM_EPS = 1e-6
"""Of the norms of latents, whatever `rms_norm_eps` is: DeepSeek's modules are made without it."""


def latent_of(keys: ConfigKeys, family: Family) -> LatentAttention | None:
    """None for a family without latents."""
    if not family.latent:
        return None
    ranked = keys.get("q_lora_rank") is not None
    rope_dim = keys.integer("qk_rope_head_dim", minimum=2, maximum=MAX_WIDTH)
    if rope_dim % 2:
        keys.refuse("qk_rope_head_dim", rope_dim, "an even number is needed")
    return LatentAttention(
        q_rank=keys.integer("q_lora_rank", maximum=MAX_WIDTH) if ranked else None,
        kv_rank=keys.integer("kv_lora_rank", maximum=MAX_WIDTH),
        nope_dim=keys.integer("qk_nope_head_dim", maximum=MAX_WIDTH),
        rope_dim=rope_dim,
        value_dim=keys.integer("v_head_dim", maximum=MAX_WIDTH),
        eps=NORM_EPS,
    )


def side_by_side(keys: ConfigKeys, family: Family) -> bool:
    """Whether dimensions that are rotated together stand side by side in the files."""
    return family.latent and keys.flag("rope_interleave", default=True)


def row_order(spec: ArchSpec, tensor: str) -> Array | None:
    """Where dimensions stand side by side: the file's row for each row of the engine's order, to be given to `take`;
    None for a tensor whose rows stay as they are.
    """
    latent, stem = spec.latent, tensor.removesuffix(".weight").rpartition(".")[2]
    if latent is None or stem not in ("k_rope_proj", query_stem(latent)):
        return None
    heads, kept = (1, 0) if stem == "k_rope_proj" else (spec.n_heads, latent.nope_dim)
    rotated = np.arange(kept, kept + latent.rope_dim)
    order = np.concatenate((np.arange(kept), rotated[0::2], rotated[1::2]))
    return (np.arange(heads)[:, None] * len(order) + order).reshape(-1)
