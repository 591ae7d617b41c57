"""ArchSpec says what a header means or refuses it; model_costs says what the engine will hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.tiny_gguf import TinyModel, Type, write_tiny_gguf

from swarmd.node.engine.spec import LinearScaling, RopeSpec
from swarmd.node.engine.stage_engine import StageEngine
from swarmd.node.engine.tensors import EMBEDDING, HEAD, OUTPUT_NORM, tensor_shapes
from swarmd.node.models.checkpoint import open_checkpoint
from swarmd.node.models.costs import model_costs
from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.gguf_checkpoint import GGUFCheckpoint
from swarmd.node.models.gguf_shards import GGUFShards
from swarmd.node.models.gguf_spec import spec_from_gguf

METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 128,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.tokens": ["a"] * 50,
}

MODELS = {
    "mixed types, tied": TinyModel(
        type=Type.Q4_1, types={"token_embd": Type.Q8_0, "attn_v": Type.Q5_0, "down": Type.F16}
    ),
    "symmetric, untied": TinyModel(type=Type.Q4_0, tied=False, types={"output": Type.BF16}),
    "five bits, rope factors": TinyModel(type=Type.Q5_1, rope_factors=True, n_layers=3),
}


@pytest.fixture(scope="module", params=MODELS, ids=str)
def model_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("costs") / "tiny.gguf", MODELS[request.param])


def test_defaults_follow_llama_cpp() -> None:
    spec = spec_from_gguf(METADATA, [])
    assert (spec.vocab_size, spec.head_dim, spec.ropes) == (50, 16, (RopeSpec(10000.0, 16),))
    assert spec.tied_embeddings


def test_linear_rope_scaling_is_read() -> None:
    spec = spec_from_gguf({**METADATA, "llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, [])
    assert spec.ropes[0].scaling == LinearScaling(4.0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"general.architecture": "mamba"}, r"'mamba'.*supported architectures: llama"),
        ({"general.architecture": None}, "architecture is None"),
        ({"llama.block_count": None}, "block_count is missing"),
        ({"llama.block_count": 0}, "block_count is 0"),
        ({"llama.block_count": "many"}, "block_count is 'many'"),
        ({"llama.block_count": 1 << 40}, "block_count"),
        ({"llama.attention.head_count_kv": 3}, "cannot share"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "epsilon"),
        ({"llama.rope.dimension_count": 7}, "rotary"),
        ({"llama.rope.scaling.type": "yarn"}, "'yarn'"),
        ({"llama.expert_count": 8}, "experts"),
        ({"llama.attention.key_length": 16, "llama.attention.value_length": 32}, "differ"),
    ],
)
def test_unsupported_headers_are_refused(changes: dict[str, Any], says: str) -> None:
    metadata = {key: value for key, value in {**METADATA, **changes}.items() if value is not None}
    with pytest.raises(ModelFileError, match=says):
        spec_from_gguf(metadata, [])


def test_each_stage_needs_its_own_tensors_only() -> None:
    spec = spec_from_gguf(METADATA, ["output.weight"])
    first, last = tensor_shapes(spec, 0, 1), tensor_shapes(spec, 1, 2)
    assert EMBEDDING in first
    assert {HEAD, OUTPUT_NORM} <= set(last)
    assert not set(first) & set(last)
    tied = spec_from_gguf(METADATA, [])
    assert EMBEDDING in tensor_shapes(tied, 1, 2)
    with pytest.raises(ValueError, match="not a range"):
        tensor_shapes(spec, 1, 3)


def test_costs_are_what_the_engine_holds_for_every_stage(model_path: Path) -> None:
    with open_checkpoint(model_path) as checkpoint:
        spec, costs = checkpoint.spec, model_costs(checkpoint)
    assert costs.n_layers == spec.n_layers
    for start in range(spec.n_layers):
        for end in range(start + 1, spec.n_layers + 1):
            engine = StageEngine.load(model_path, spec, start, end, threads=1, kv_tokens=8)
            expected = sum(costs.layer_bytes[start:end])
            expected += costs.embedding_bytes * engine.first + costs.head_bytes * engine.last
            expected -= costs.shared_bytes * (engine.first and engine.last)
            if engine.kernels.startswith("native"):
                assert engine.weight_bytes == expected, (start, end)
            else:
                assert 0.97 * expected < engine.weight_bytes <= expected, (start, end)


def test_costs_count_a_tied_head_as_shared(model_path: Path) -> None:
    with open_checkpoint(model_path) as checkpoint:
        spec, costs = checkpoint.spec, model_costs(checkpoint)
    if spec.tied_embeddings:
        assert costs.shared_bytes == costs.embedding_bytes
        assert costs.head_bytes == costs.embedding_bytes + 4 * spec.hidden_size
    else:
        assert costs.shared_bytes == 0
    assert costs.kv_bytes_per_token == 2 * 2 * 16 * 2


def test_costs_refuse_unsupported_types_before_anything_is_loaded(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "f64.gguf", TinyModel())
    with GGUFShards.open(path) as file:
        info = file.tensors["blk.1.ffn_up.weight"]
        object.__setattr__(info, "type", type(info.type).IQ2_XS)
        with pytest.raises(ModelFileError, match=r"blk\.1\.ffn_up\.weight.*IQ2_XS, not supported yet"):
            model_costs(GGUFCheckpoint(file))
