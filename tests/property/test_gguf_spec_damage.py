"""Whatever a header says about an architecture, it is an ArchSpec or a ModelFileError, in bounded time and memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.gguf_from_hf import write_gguf_of
from support.tiny_hf import CASES

from swarmd.node.engine.tensors import tensor_shapes
from swarmd.node.models.checkpoint import open_checkpoint
from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.gguf import GGUFFile
from swarmd.node.models.gguf_families import FAMILIES
from swarmd.node.models.gguf_names import tensor_sources
from swarmd.node.models.gguf_spec import spec_from_gguf

MEMORY_BOUND = 64 << 20
SIZES: dict[str, Any] = {
    "block_count": 4,
    "context_length": 128,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "vocab_size": 50,
}
KEYS = sorted(
    value.removeprefix("{arch}.")
    for group in (gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope)
    for value in vars(group).values()
    if isinstance(value, str) and value.startswith("{arch}.")
)
TENSORS = (
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
    "output.weight",
    "blk.0.ffn_gate_inp.weight",
    "blk.2.ffn_gate_inp.weight",
    "blk.0.attn_qkv.weight",
    "blk.0.ffn_up.bias",
    "blk.0.ffn_up_shexp.weight",
    "blk.2.exp_probs_b.bias",
)
numbers = st.sampled_from((0, 1, 2, 4, 7, 64, 1 << 12, 1 << 20, 1 << 31, 1 << 63, -1)) | st.integers(-2, 300)
values = (
    numbers
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.booleans()
    | st.sampled_from(("", "linear", "yarn", "longrope", "none", "x"))
    | st.lists(numbers | st.booleans(), max_size=5)
)


@settings(max_examples=400, deadline=None)
@given(
    architecture=st.sampled_from(sorted(FAMILIES)),
    changes=st.dictionaries(st.sampled_from(KEYS), values, max_size=6),
    names=st.sets(st.sampled_from(TENSORS)),
)
def test_any_header(architecture: str, changes: dict[str, Any], names: set[str]) -> None:
    metadata = {f"{architecture}.{key}": value for key, value in {**SIZES, **changes}.items()}
    metadata["general.architecture"] = architecture
    try:
        spec = spec_from_gguf(metadata, names, lambda name, length: (1.5,) * min(length, 1 << 20))
    except ModelFileError as error:
        assert len(str(error)) < 500
        return
    assert spec.n_heads % spec.n_kv_heads == 0
    assert all(layer.rope is None or layer.rope < len(spec.ropes) for layer in spec.layers)
    if spec.n_layers * (spec.moe.n_experts if spec.moe else 1) < 5000:
        assert tensor_sources(spec, names).keys() == tensor_shapes(spec, 0, spec.n_layers).keys()


@pytest.fixture(scope="module", params=["mixtral", "gemma3", "phi3 long", "gpt-oss"])
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, int]:
    path = write_gguf_of(CASES[request.param](), tmp_path_factory.mktemp("damage") / "m.gguf")
    with GGUFFile.open(path) as file:
        return path.with_name("damaged.gguf"), path.read_bytes(), file.header_bytes


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_bytes_of_the_keys_and_the_tensor_table(original: tuple[Path, bytes, int], data: st.DataObject) -> None:
    path, content, header = original
    damaged = bytearray(content)
    for position in data.draw(st.lists(st.integers(24, 1500) | st.integers(header - 2500, header - 1), max_size=3)):
        damaged[position] = data.draw(st.sampled_from((0, 1, 0x7F, 0x80, 0xFF)) | st.integers(0, 255))
    path.write_bytes(bytes(damaged))
    tracemalloc.start()
    try:
        with open_checkpoint(path) as checkpoint:
            checkpoint.check(0, checkpoint.spec.n_layers)
            for name in tensor_shapes(checkpoint.spec, 0, checkpoint.spec.n_layers):
                checkpoint.read(name)
    except ModelFileError as error:
        assert str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MEMORY_BOUND
