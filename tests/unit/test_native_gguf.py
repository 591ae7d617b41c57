"""GGUF files of every quantized type, computed by our own kernels: agreement with plain torch on the same file.

The kernels see activations in int8 codes, so plain torch is given the same, and keys and values in fp16. Then both
multiply the same numbers. What is left is fp32 rounding, until it tips a code to its neighbour: that moves a row, and
the rows that attend to it, by about as much as the codes themselves. So tokens are also computed by themselves, where
most rows have no such code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers as hf
from support.gguf_blocks import weight_blocks
from support.gguf_from_hf import write_gguf_of
from support.kernels import needs_kernels
from support.native_kernels import exceeds, product_of_codes, product_of_values
from support.quantized_activations import QuantizedActivationsBackend
from support.tiny_hf import SIZES

from swarmd.node.engine.backends.torch_cpu import TorchCpuBackend
from swarmd.node.engine.cpu.matrices import NativeMatrix, linear
from swarmd.node.engine.cpu.native_compute import NativeCompute, why_not
from swarmd.node.engine.decoder_compute import DecoderCompute
from swarmd.node.engine.gguf_blocks import QUANTIZED_FORMS
from swarmd.node.engine.quantized import QuantizedWeight
from swarmd.node.engine.stage_compute import Span, StageCompute
from swarmd.node.engine.tensors import tensor_shapes
from swarmd.node.models.checkpoint import Checkpoint, open_checkpoint
from swarmd.node.models.gguf_types import GGUFType

pytestmark = needs_kernels

PROMPT, TOKENS = 40, list(range(5, 53))
KV_TOKENS = 64 * (len(TOKENS) + 1)
OF_ROUNDING = 1e-5
"""What a row of logits may differ by, of the range of all, where no code was tipped."""
OF_CODES = 2e-2
"""The same for every row, whether torch is given codes or not."""

WIDTHS = {**SIZES, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "attn_implementation": "eager"}
EXPERTS = {"num_experts_per_tok": 2, "intermediate_size": 256}


def llama() -> hf.PreTrainedModel:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**WIDTHS, "tie_word_embeddings": True}))


def mixtral() -> hf.PreTrainedModel:
    return hf.MixtralForCausalLM(hf.MixtralConfig(**{**WIDTHS, **EXPERTS, "num_local_experts": 4}))


def qwen2_moe() -> hf.PreTrainedModel:
    """With an expert that always runs, behind a gate of one row."""
    shared = {"num_experts": 4, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256}
    return hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**{**WIDTHS, **EXPERTS, **shared}))


def file_of(build: Callable[[], hf.PreTrainedModel], kind: GGUFType, path: Path) -> Path:
    """All matrices random, in this type; their products keep the size of what they multiply."""

    def blocks(values: np.ndarray) -> tuple[gguf.GGMLQuantizationType, np.ndarray]:
        rows, columns = values.size // values.shape[-1], values.shape[-1]
        return gguf.GGMLQuantizationType(int(kind)), weight_blocks(kind, rows, columns, 1.2 * columns**-0.5, rows)

    torch.manual_seed(0)
    return write_gguf_of(build().float().eval(), path, raw_of=blocks)


def step(stages: Sequence[StageCompute], spans: Sequence[Span]) -> np.ndarray:
    """The logits of all rows."""
    hidden, logits = None, None
    wanted = range(sum(len(span.tokens) for span in spans))
    for stage in stages:
        output = stage.forward(spans, hidden, "f32", wanted)
        hidden, logits = output.payload, output.logits
    assert logits is not None
    return logits.copy()


def of_one_sequence(stages: Sequence[StageCompute]) -> np.ndarray:
    """A prompt in two pieces, then token by token: float32 [tokens, vocabulary]."""
    for stage in stages:
        stage.open(0)
    cuts = [0, PROMPT // 2, *range(PROMPT, len(TOKENS) + 1)]
    return np.concatenate([step(stages, [Span(0, start, TOKENS[start:end])]) for start, end in pairwise(cuts)])


def of_tokens_alone(stages: Sequence[StageCompute]) -> np.ndarray:
    """Each in a sequence of its own, all in one step: float32 [tokens, vocabulary]."""
    for stage in stages:
        for seq in range(1, len(TOKENS) + 1):
            stage.open(seq)
    return step(stages, [Span(seq, 0, [token]) for seq, token in enumerate(TOKENS, 1)])


def native(checkpoint: Checkpoint, cuts: Sequence[int]) -> list[StageCompute]:
    assert why_not(checkpoint, cuts[0], cuts[-1]) == ""
    return [
        NativeCompute.load(checkpoint, start, end, threads=2, kv_tokens=KV_TOKENS, context=64)
        for start, end in pairwise(cuts)
    ]


def plain(checkpoint: Checkpoint, backend: TorchCpuBackend) -> list[StageCompute]:
    torch.set_grad_enabled(False)
    layers = checkpoint.spec.n_layers
    return [DecoderCompute.load(checkpoint, 0, layers, backend, kv_tokens=KV_TOKENS, context=64)]


def errors_of_rows(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Each row's largest difference, of the whole range."""
    assert expected.std() > 0.3, "the oracle's logits must say something"
    return np.abs(found - expected).max(-1) / (expected.max() - expected.min())


@pytest.mark.parametrize("kind", QUANTIZED_FORMS, ids=lambda kind: kind.name)
class TestEachType:
    @pytest.fixture
    def checkpoint(self, kind: GGUFType, tmp_path: Path) -> Iterator[Checkpoint]:
        with open_checkpoint(file_of(llama, kind, tmp_path / "m.gguf")) as checkpoint:
            yield checkpoint

    def test_products_and_rows_of_the_files_matrices(self, checkpoint: Checkpoint) -> None:
        """Within the bounds of `support/native_kernels.py`; rows of the embedding bit for bit."""
        rng = np.random.default_rng(3)
        for name, shape in tensor_shapes(checkpoint.spec, 0, 1).items():
            weight = checkpoint.read(name)
            if not isinstance(weight, QuantizedWeight):
                assert len(shape) == 1
                continue
            matrix = NativeMatrix([weight])
            x = rng.normal(0, 1, (3, matrix.columns)).astype(np.float32)
            x[1, ::67] *= 20  # what stands out
            found = linear(matrix, x)
            assert exceeds(found, product_of_codes(x, weight)) <= 1, name
            assert exceeds(found, product_of_values(x, weight)) <= 1, name
            assert (matrix.rows_at([0, weight.rows - 1]) == weight.dequantize()[[0, -1]]).all(), name

    def test_logits_are_those_of_plain_torch(self, checkpoint: Checkpoint) -> None:
        kernels, oracle = native(checkpoint, [0, 2]), plain(checkpoint, QuantizedActivationsBackend())
        alone = errors_of_rows(of_tokens_alone(kernels), of_tokens_alone(oracle))
        assert np.median(alone) < OF_ROUNDING
        assert alone.max() < OF_CODES
        whole = of_one_sequence(kernels)
        assert errors_of_rows(whole, of_one_sequence(oracle)).max() < OF_CODES
        assert errors_of_rows(whole, of_one_sequence(plain(checkpoint, TorchCpuBackend()))).max() < OF_CODES
        assert (of_one_sequence(native(checkpoint, [0, 1, 2])) == whole).all()


@pytest.mark.parametrize("kind", [GGUFType.Q4_K, GGUFType.Q6_K, GGUFType.MXFP4], ids=lambda kind: kind.name)
@pytest.mark.parametrize("build", [mixtral, qwen2_moe])
def test_experts_read_their_own_rows(build: Callable[[], hf.PreTrainedModel], kind: GGUFType, tmp_path: Path) -> None:
    """Of activations, with the sums of their halves where groups are of 16."""
    with open_checkpoint(file_of(build, kind, tmp_path / "m.gguf")) as checkpoint:
        found = of_tokens_alone(native(checkpoint, [0, 2]))
        expected = of_tokens_alone(plain(checkpoint, QuantizedActivationsBackend()))
    errors = errors_of_rows(found, expected)
    assert np.median(errors) < OF_ROUNDING
    assert errors.max() < OF_CODES
