"""The same vocabulary as a Hugging Face folder, as GGUF metadata and in `transformers`: the same ids, the same text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.hard_texts import LONE_SURROGATES, TEXTS
from support.trained_tokenizers import (
    byte_level,
    byte_level_gguf,
    model_proto,
    sentencepiece_bpe,
    sentencepiece_gguf,
    splits,
    unigram,
    write_folder,
)
from tokenizers import normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from swarmd.node.models.pre_tokenizers import PRE_TOKENIZERS
from swarmd.node.models.tokenizer import Tokenizer

SPECIAL = {"bos_token": "<|bos|>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>"}
PLAIN_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), PLAIN_BYTES])
# The models' own forms where they are not one expression.
OWN_FORM: dict[str, Any] = {"gpt-2": PLAIN_BYTES, "olmo": PLAIN_BYTES, "smollm": DIGITS, "command-r": DIGITS}


def sample(tokens: list[str]) -> list[str]:
    """The hard texts, each special token alone and inside a text, and all of them together."""
    return [*TEXTS, *tokens, *(f"a {t} b\n{t}{t}é" for t in tokens), "".join(tokens), " ".join(tokens)]


def own_form(name: str) -> Any:
    spec = PRE_TOKENIZERS[name]
    return byte_level(
        OWN_FORM.get(name) or splits(*spec.patterns),
        normalizers.NFC() if spec.nfc else None,
        ignore_merges=spec.ignore_merges,
    )


def assert_equal_to_transformers(ours: Tokenizer, theirs: Any, texts: list[str]) -> None:
    for text in texts:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special=False) == ids, repr(text)
        assert ours.encode(text, add_special=True) == theirs.encode(text), repr(text)
        for skip in (False, True):
            shown = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, skip_special=skip) == shown, repr(text)


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_byte_level_bpe_equals_transformers(name: str, tmp_path: Path, proves: Callable[..., None]) -> None:
    backend = own_form(name)
    folder = write_folder(tmp_path / "model", backend, **SPECIAL)
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    texts = sample(sorted(theirs.get_added_vocab()))
    assert_equal_to_transformers(Tokenizer.from_folder(folder), theirs, texts)
    assert_equal_to_transformers(Tokenizer.from_gguf(byte_level_gguf(backend, name)), theirs, texts)
    for column in ("tokenizer.json", "gguf"):
        proves("tokenizers", "byte-level BPE", column, "works", case=name)


@pytest.mark.parametrize("prefix_space", [True, False], ids=["llama", "gemma"])
def test_sentencepiece_bpe_equals_transformers(prefix_space: bool, tmp_path: Path, proves: Callable[..., None]) -> None:
    folder = write_folder(
        tmp_path / "model", sentencepiece_bpe(prefix_space), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    texts = sample(sorted(theirs.get_added_vocab()))
    gguf = sentencepiece_gguf(prefix_space)
    assert_equal_to_transformers(Tokenizer.from_folder(folder), theirs, texts)
    assert_equal_to_transformers(Tokenizer.from_gguf(gguf), theirs, texts)
    columns = (gguf["tokenizer.ggml.tokens"], gguf["tokenizer.ggml.scores"], gguf["tokenizer.ggml.token_type"])
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "tokenizer.model").write_bytes(model_proto(list(zip(*columns, strict=True)), 2, dummy_prefix=prefix_space))
    assert_equal_to_transformers(Tokenizer.from_folder(bare), theirs, texts)
    for column in ("tokenizer.json", "gguf", "other"):
        proves("tokenizers", "SentencePiece BPE", column, "works", case=str(prefix_space))


def test_unigram_equals_transformers(tmp_path: Path, proves: Callable[..., None]) -> None:
    folder = write_folder(tmp_path / "model", unigram(), bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    assert_equal_to_transformers(Tokenizer.from_folder(folder), theirs, sample(sorted(theirs.get_added_vocab())))
    proves("tokenizers", "SentencePiece Unigram", "tokenizer.json", "works")


@pytest.mark.parametrize("text", LONE_SURROGATES)
def test_lone_surrogates_read_the_same_in_all_forms(text: str, tmp_path: Path) -> None:
    backend = own_form("llama-bpe")
    folder = write_folder(tmp_path / "model", backend, **SPECIAL)
    clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    for ours in (Tokenizer.from_folder(folder), Tokenizer.from_gguf(byte_level_gguf(backend, "llama-bpe"))):
        assert ours.decode(ours.encode(text, add_special=False)) == clean
