"""The default model, whole: it knows the capital of France, in the same words as `transformers`."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from support.llama_oracle import file_oracle

from swarmd.node.engine.sampling_params import SamplingParams
from swarmd.node.engine.spec import ArchSpec
from swarmd.node.engine.stage_engine import SequenceChunk, StageEngine
from swarmd.node.models.chat_template import ChatTemplate
from swarmd.node.models.gguf import GGUFFile
from swarmd.node.models.tokenizer import Tokenizer

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
N_TOKENS = 24


@pytest.fixture(scope="module")
def prompt(smollm2_path: Path) -> tuple[Tokenizer, list[int]]:
    with GGUFFile.open(smollm2_path) as file:
        tokenizer = Tokenizer.from_gguf(file.metadata)
        template = ChatTemplate.from_gguf(file.metadata, tokenizer)
    return tokenizer, tokenizer.encode(template.render(QUESTION), add_special=False)


def greedy(path: Path, prompt: list[int], *cuts: int) -> list[int]:
    with GGUFFile.open(path) as file:
        spec = ArchSpec.from_gguf(file.metadata, file.tensors)
    edges = [0, *cuts, spec.n_layers]
    stages = [StageEngine.load(path, spec, start, end, threads=2, kv_tokens=256) for start, end in pairwise(edges)]
    for stage in stages:
        stage.open(1, SamplingParams(temperature=0))
    tokens: list[int] = []
    chunk = SequenceChunk(1, 0, tuple(prompt), sample=True)
    while len(tokens) < N_TOKENS:
        result = stages[0].step([chunk], None, "f32")
        for stage in stages[1:]:
            result = stage.step([chunk], result.payload, "f32")
        tokens.append(result.samples[0].token)
        chunk = SequenceChunk(1, chunk.start + len(chunk.tokens), (tokens[-1],), sample=True)
    return tokens


def test_greedy_answer_equals_transformers(smollm2_path: Path, prompt: tuple[Tokenizer, list[int]]) -> None:
    tokenizer, ids = prompt
    tokens = greedy(smollm2_path, ids)
    assert "Paris" in tokenizer.decode(tokens)
    oracle = file_oracle(smollm2_path)
    with torch.no_grad():
        logits = oracle(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1]
    assert logits.argmax(-1).tolist() == tokens


def test_two_stages_answer_the_same(smollm2_path: Path, prompt: tuple[Tokenizer, list[int]]) -> None:
    assert greedy(smollm2_path, prompt[1], 17) == greedy(smollm2_path, prompt[1])
