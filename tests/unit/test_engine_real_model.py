"""The default model, whole: it knows the capital of France, in the same words as `transformers`."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from support.kernels import needs_kernels
from support.llama_oracle import file_oracle

from swarmd.node.engine.sampling_params import SamplingParams
from swarmd.node.engine.stage_engine import Kernels, SequenceChunk, StageEngine
from swarmd.node.models.chat_template import ChatTemplate
from swarmd.node.models.gguf import GGUFFile
from swarmd.node.models.gguf_spec import spec_from_gguf
from swarmd.node.models.tokenizer import Tokenizer

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
N_TOKENS = 24


@pytest.fixture(scope="module")
def prompt(smollm2_path: Path) -> tuple[Tokenizer, list[int]]:
    with GGUFFile.open(smollm2_path) as file:
        tokenizer = Tokenizer.from_gguf(file.metadata)
        template = ChatTemplate.from_gguf(file.metadata, tokenizer)
    return tokenizer, tokenizer.encode(template.render(QUESTION), add_special=False)


def greedy(path: Path, prompt: list[int], *cuts: int, kernels: Kernels) -> list[int]:
    with GGUFFile.open(path) as file:
        spec = spec_from_gguf(file.metadata, file.tensors)
    edges = [0, *cuts, spec.n_layers]
    stages = [
        StageEngine.load(path, spec, start, end, threads=2, kv_tokens=256, kernels=kernels)
        for start, end in pairwise(edges)
    ]
    for stage in stages:
        stage.open(1, SamplingParams(temperature=0))
    tokens: list[int] = []
    chunk = SequenceChunk(1, 0, tuple(prompt), sample=1)
    while len(tokens) < N_TOKENS:
        result = stages[0].step([chunk], None, "f32")
        for stage in stages[1:]:
            result = stage.step([chunk], result.payload, "f32")
        tokens.append(result.samples[0].token)
        chunk = SequenceChunk(1, chunk.start + len(chunk.tokens), (tokens[-1],), sample=1)
    return tokens


def test_greedy_answer_equals_transformers(smollm2_path: Path, prompt: tuple[Tokenizer, list[int]]) -> None:
    """In fp32, which is what plain torch computes in, token for token."""
    tokenizer, ids = prompt
    tokens = greedy(smollm2_path, ids, kernels="torch")
    assert "Paris" in tokenizer.decode(tokens)
    assert oracle_logits(smollm2_path, ids, tokens).argmax(-1).tolist() == tokens


@needs_kernels
def test_our_kernels_choose_what_transformers_finds_best_or_nearly_so(
    smollm2_path: Path, prompt: tuple[Tokenizer, list[int]]
) -> None:
    """Activations are rounded to int8: where two tokens are about as likely the other one may win."""
    tokenizer, ids = prompt
    tokens = greedy(smollm2_path, ids, kernels="native")
    assert "Paris" in tokenizer.decode(tokens)
    logits = oracle_logits(smollm2_path, ids, tokens)
    lost = logits.max(-1).values - logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert float(lost.max()) < 0.5
    assert int((lost == 0).sum()) >= N_TOKENS - 3


@pytest.mark.parametrize("kernels", [pytest.param("native", marks=needs_kernels), "torch"])
def test_two_stages_answer_the_same(smollm2_path: Path, prompt: tuple[Tokenizer, list[int]], kernels: Kernels) -> None:
    assert greedy(smollm2_path, prompt[1], 17, kernels=kernels) == greedy(smollm2_path, prompt[1], kernels=kernels)


def oracle_logits(path: Path, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """The logits after the prompt and after each of `tokens` but the last, by `transformers`."""
    with torch.no_grad():
        return file_oracle(path)(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
