"""Speculation on real nodes: the same answers, in fewer steps, with and without a draft model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.swarm import Node
from support.tiny_gguf import TinyModel, write_tiny_gguf

PROMPT = [30, 40, 50, 60, 70, 80, 90] * 6
NEW_TOKENS = 64
OPTIONS = ("--no-mdns", "--model", "none", "--context", "256", "--threads", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("models") / "model.gguf", TinyModel(context_length=256))


def answer(node: Node, temperature: float) -> list[str]:
    """The tokens of a completion of exactly NEW_TOKENS."""
    [served] = node.get("/v1/models")["data"]
    body: dict[str, Any] = {"model": served["id"], "prompt": PROMPT, "max_tokens": NEW_TOKENS, "logprobs": 0}
    body |= {"temperature": temperature, "seed": 7, "logit_bias": {"0": -100, "1": -100, "2": -100}}
    status, reply = node.post("/v1/completions", body)
    assert status == 200, reply
    tokens = reply["choices"][0]["logprobs"]["tokens"]
    assert len(tokens) == NEW_TOKENS
    return tokens


def until_guessed(node: Node, right: int) -> float:
    """Wait until its driver has told of so many guesses that were right; the part of all guesses that these are."""
    deadline, page = time.monotonic() + 20, ""
    while time.monotonic() < deadline:
        page = node.request("GET", "/metrics").read().decode()
        families = text_string_to_metric_families(page)
        found = {sample.name: sample.value for family in families for sample in family.samples}
        if found.get("swarmd_spec_decode_num_accepted_tokens_total", 0) >= right:
            drafted = found["swarmd_spec_decode_num_draft_tokens_total"]
            return found["swarmd_spec_decode_num_accepted_tokens_total"] / drafted
        node.until_members(1)
    raise AssertionError(f"not {right} guesses were right:\n{page}")


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_guesses_change_nothing_but_the_number_of_steps(tmp_path: Path, model: Path) -> None:
    """A random model soon repeats itself, so that guesses from the text are often right; its twin, as the draft model,
    always is.
    """
    answers = {}
    for name, options in (("off", ("--no-speculate",)), ("on", ()), ("draft", ("--draft-model", str(model)))):
        with Node(tmp_path / name, *OPTIONS, *options) as node:
            node.serve(model)
            node.until_ready(stages=1)
            answers[name] = [answer(node, 0.0)]
            if name != "off":
                assert until_guessed(node, right=NEW_TOKENS // 4) > 0.3
            answers[name].append(answer(node, 1.0))
    assert answers["off"] == answers["on"] == answers["draft"]


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_draft_model_of_another_vocabulary_is_refused_by_name(tmp_path: Path, model: Path) -> None:
    other = write_tiny_gguf(tmp_path / "other.gguf", TinyModel(context_length=256, vocab_size=300))
    with Node(tmp_path / "node", *OPTIONS, "--draft-model", str(other)) as node:
        node.serve(model)
        said = node.until_said("the draft model .* has a vocabulary of 300 tokens")
        assert str(other) in said
        assert "--draft-model" in said
