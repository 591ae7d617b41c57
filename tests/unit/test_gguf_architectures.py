"""Every architecture's GGUF file gives back the tensors and the rotary angles of the model that was converted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support.decoding import decoder_logits
from support.gguf_from_hf import write_gguf_of
from support.tiny_hf import CASES
from transformers import PreTrainedModel

from swarmd.node.engine.rope import rope_table
from swarmd.node.engine.spec import ArchSpec, FactorsScaling
from swarmd.node.engine.tensors import ROPE_FACTORS, tensor_shapes
from swarmd.node.models.checkpoint import Checkpoint, open_checkpoint

TOKENS = 40


@pytest.fixture(scope="module", params=CASES)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    model = CASES[request.param]()
    path = write_gguf_of(model, tmp_path_factory.mktemp("arch") / "model.gguf")
    with open_checkpoint(path) as checkpoint:
        yield model, checkpoint


def test_tensors_come_back_exactly(converted: tuple[PreTrainedModel, Checkpoint]) -> None:
    model, checkpoint = converted
    spec = checkpoint.spec
    checkpoint.check(0, spec.n_layers)
    expected = canonical_state(model)
    names = set(tensor_shapes(spec, 0, spec.n_layers)) - {ROPE_FACTORS}
    assert names == set(expected)
    for name, values in expected.items():
        got = checkpoint.read(name)
        assert np.array_equal(got.dequantize(), values), name
        assert checkpoint.stored_bytes(name) == values.nbytes


def test_angles_are_those_of_transformers(converted: tuple[PreTrainedModel, Checkpoint]) -> None:
    model, checkpoint = converted
    spec, config = checkpoint.spec, model.config
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * spec.n_layers
    no_rope = getattr(config, "no_rope_layers", None) or [1] * spec.n_layers
    for layer, kind, rotates in zip(spec.layers, kinds, no_rope, strict=True):
        assert (layer.rope is None) == (not rotates)
        if layer.rope is None:
            continue
        rope = spec.ropes[layer.rope]
        factors = None
        if isinstance(rope.scaling, FactorsScaling):
            factors = checkpoint.read(ROPE_FACTORS).dequantize()
        frequencies, magnitude = rope_table(rope, 100, factors)
        rotary = model.model.rotary_emb
        by_kind = hasattr(rotary, f"{kind}_inv_freq")
        expected = getattr(rotary, f"{kind}_inv_freq" if by_kind else "inv_freq")
        scaling = getattr(rotary, f"{kind}_attention_scaling" if by_kind else "attention_scaling")
        np.testing.assert_allclose(frequencies, expected.numpy(), rtol=1e-6)
        assert magnitude == pytest.approx(scaling, rel=1e-6)


def test_layers_and_numbers_are_those_of_the_configuration(converted: tuple[PreTrainedModel, Checkpoint]) -> None:
    model, checkpoint = converted
    spec, config = checkpoint.spec, model.config
    kinds = getattr(config, "layer_types", None)
    everywhere = config.model_type in ("phi3", "mistral") and config.sliding_window
    for number, layer in enumerate(spec.layers):
        windowed = everywhere or (kinds is not None and kinds[number] == "sliding_attention")
        assert layer.window == (config.sliding_window if windowed else None)
    attention = model.model.layers[0].self_attn
    assert spec.attention_scale == pytest.approx(attention.scaling, rel=1e-6)
    assert spec.embedding_multiplier == pytest.approx(_embedding_multiplier(model), rel=1e-6)
    assert spec.residual_multiplier == pytest.approx(getattr(config, "residual_multiplier", 1.0), rel=1e-6)
    assert spec.logit_multiplier == pytest.approx(1 / getattr(config, "logits_scaling", 1.0), rel=1e-6)
    assert spec.attention_softcap == getattr(config, "attn_logit_softcapping", None)
    assert spec.logit_softcap == getattr(config, "final_logit_softcapping", None)
    assert spec.rms_eps == pytest.approx(config.rms_norm_eps, rel=1e-6)
    _check_experts(spec, config)


def test_logits_are_those_of_transformers(converted: tuple[PreTrainedModel, Checkpoint]) -> None:
    """A prefill longer than the windows, in fp32, through the decoder and plain torch."""
    model, checkpoint = converted
    tokens = torch.randint(0, model.config.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(4)).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0]
        got = decoder_logits(checkpoint, tokens)
    assert expected.std() > 0.3, "the oracle's logits must say something"
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-4)


def _check_experts(spec: ArchSpec, config: Any) -> None:
    experts = getattr(config, "num_local_experts", getattr(config, "num_experts", None))
    if spec.moe is None:
        assert experts is None
        return
    assert all(layer.moe for layer in spec.layers)
    assert (spec.moe.n_experts, spec.moe.top_k) == (experts, config.num_experts_per_tok)
    assert spec.moe.normalize == getattr(config, "norm_topk_prob", True)
    assert spec.moe.shared_gate == (config.model_type == "qwen2_moe")


def _embedding_multiplier(model: PreTrainedModel) -> float:
    scale = getattr(model.model.embed_tokens, "scalar_embed_scale", None)
    if model.config.model_type in ("gemma", "gemma2"):
        return model.config.hidden_size**0.5
    return getattr(model.config, "embedding_multiplier", 1.0) if scale is None else scale


def canonical_state(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """The model's parameters under the names of engine/tensors.py."""
    state: dict[str, np.ndarray] = {}
    for name, tensor in model.state_dict().items():
        state |= dict(_canonical(name, tensor.detach().numpy(), model.config))
    if model.config.tie_word_embeddings or model.config.model_type.startswith("gemma"):
        del state["lm_head.weight"]
    return state


def _canonical(name: str, values: np.ndarray, config: Any) -> Iterator[tuple[str, np.ndarray]]:
    kind = config.model_type
    if kind not in ("gemma2", "gemma3_text", "olmo2", "olmo3"):
        name = name.replace(".post_attention_layernorm.", ".pre_feedforward_layernorm.")
    if kind.startswith("gemma") and name.endswith("norm.weight"):
        values = values + 1
    for moe in ("block_sparse_moe.router", "mlp.gate"):
        name = name.replace(f"{moe}.weight", "mlp.router.weight")
    prefix, _, part = name.partition(".experts.")
    if part:
        yield from _canonical_experts(f"{prefix.rpartition('.')[0]}.mlp.experts", part, values, kind)
    elif "qkv_proj" in name:
        queries = config.num_attention_heads * (config.hidden_size // config.num_attention_heads)
        keys = (len(values) - queries) // 2
        for letter, rows in zip("qkv", np.split(values, [queries, queries + keys]), strict=True):
            yield name.replace("qkv_proj", f"{letter}_proj"), rows
    elif "gate_up_proj" in name or "shared_mlp.input_linear" in name:
        for half, rows in zip(("gate", "up"), np.split(values, 2), strict=True):
            shared = name.replace("shared_mlp.input_linear", f"mlp.shared_expert.{half}_proj")
            yield shared.replace("gate_up_proj", f"{half}_proj"), rows
    else:
        yield name.replace("shared_mlp.output_linear", "mlp.shared_expert.down_proj"), values


def _canonical_experts(prefix: str, part: str, values: np.ndarray, kind: str) -> Iterator[tuple[str, np.ndarray]]:
    bias = part.endswith("_bias")
    end = "bias" if bias else "weight"
    for expert, value in enumerate(values):
        value = value.T if kind == "gpt_oss" and not bias else value
        if part.startswith("down"):
            yield f"{prefix}.{expert}.down_proj.{end}", value
        elif kind == "gpt_oss":
            yield f"{prefix}.{expert}.gate_proj.{end}", value[::2]
            yield f"{prefix}.{expert}.up_proj.{end}", value[1::2]
        else:
            gate, up = np.split(value, 2)
            yield f"{prefix}.{expert}.gate_proj.{end}", gate
            yield f"{prefix}.{expert}.up_proj.{end}", up
