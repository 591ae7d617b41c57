"""Files of SentencePiece itself: the same ids and text as its own library, clear refusals of damaged ones."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.hard_texts import TEXTS
from support.trained_tokenizers import CORPUS, model_proto

from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.sentencepiece_model import read_model
from swarmd.node.models.tokenizer import Tokenizer

PIECES = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *((f"<0x{b:02X}>", 0.0, 6) for b in range(256))]


@pytest.fixture
def spm() -> Any:
    return pytest.importorskip("sentencepiece", reason="the sentencepiece package (of the dev extra) is not installed")


def trained(spm: Any, folder: Path, **options: Any) -> Path:
    """A folder with a tokenizer.model that the library itself made."""
    lines = [line for text in CORPUS for line in text.split("\n") if line.strip() and "\0" not in line]
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in lines if "\ufffd" not in line]),
        model_writer=model,
        byte_fallback=True,
        normalization_rule_name="identity",
        character_coverage=0.98,
        hard_vocab_limit=False,
        minloglevel=3,
        **options,
    )
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("prefix", [True, False], ids=["prefix", "bare"])
@pytest.mark.parametrize("squeeze", [True, False], ids=["squeezed", "spaced"])
def test_ids_and_text_equal_those_of_sentencepiece(
    spm: Any, kind: str, prefix: bool, squeeze: bool, tmp_path: Path, proves: Callable[..., None]
) -> None:
    folder = trained(
        spm,
        tmp_path / "model",
        model_type=kind,
        vocab_size=900 if kind == "bpe" else 600,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=squeeze,
    )
    theirs = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ours = Tokenizer.from_folder(folder)
    for text in TEXTS:
        if kind == "unigram" and "<0x41>" in text:  # kept apart from the byte token of that name: see guard_encoder
            continue
        if squeeze and "▁" in text:  # theirs takes it for a space at the end of a text and nowhere else
            continue
        ids = theirs.encode(text)
        assert ours.encode(text, add_special=False, parse_special=False) == ids, repr(text)
        assert ours.decode(ids) == theirs.decode(ids), repr(text)
    row = "SentencePiece BPE" if kind == "bpe" else "SentencePiece Unigram"
    proves("tokenizers", row, "other", "works", case=f"{prefix} {squeeze}")


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_user_defined_tokens_stand_alone_and_control_tokens_need_to_be_wanted(
    spm: Any, kind: str, tmp_path: Path
) -> None:
    folder = trained(
        spm,
        tmp_path / "model",
        model_type=kind,
        vocab_size=900 if kind == "bpe" else 600,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        user_defined_symbols=["<think>", "▁▁▁"],
        control_symbols=["<ctl>"],
    )
    theirs = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ours = Tokenizer.from_folder(folder)
    runs = ("a    b", "   ") if kind == "bpe" else ()  # Unigram finds the best place for one in a longer run
    for text in ("a<think>b", "<think><think> x", *runs):
        assert ours.encode(text, add_special=False) == theirs.encode(text)
        assert ours.decode(theirs.encode(text)) == text
    control = theirs.piece_to_id("<ctl>")
    written = "<s>a<ctl></s> <unk><0x41>"
    ids = ours.encode(written, add_special=False, parse_special=False)
    assert not {0, 1, 2, control} & set(ids)
    assert ours.decode(ids) == written
    assert ours.encode("a<ctl>", add_special=False)[-1] == control
    assert ours.encode("a", add_special=True) == [1, *theirs.encode("a")]
    assert ours.eos_ids == {2}


def test_the_configuration_adds_tokens_to_a_file(tmp_path: Path) -> None:
    """Phi-3's role tokens stand behind Llama's vocabulary, and swallow the white space behind them."""
    pieces = [*PIECES, ("▁", -1.0, 1), ("a", -2.0, 1), ("▁a", -0.5, 1)]
    (tmp_path / "tokenizer.model").write_bytes(model_proto(pieces, 2, dummy_prefix=True))
    size = len(pieces)
    role = {"content": "<|user|>", "special": True, "rstrip": True}
    config = {"added_tokens_decoder": {str(size): role, str(size + 1): {"content": "<note>"}}, "add_bos_token": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = Tokenizer.from_folder(tmp_path)
    assert ours.vocab_size == size + 2
    assert ours.encode("<|user|>\n a<note>a", add_special=True) == [size, size - 1, size + 1, size - 1]
    assert ours.decode([size, size - 1, size + 1]) == "a<note>"
    assert "<|user|>" in ours.control_texts
    assert size not in ours.encode("<|user|>", add_special=False, parse_special=False)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {str(size + 1): role}}))
    with pytest.raises(ModelFileError, match=f"has {size} tokens.*has the id {size + 1}"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "has no tokens"),
        (b"\x0a\xff", "no SentencePiece model"),
        (b"\x0a\x7fab", "no SentencePiece model"),
        (b"\xff" * 30, "no SentencePiece model"),
        (b"{}" * 40, "no SentencePiece model"),
        (
            model_proto([("\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), 0.0, 9)], 2, dummy_prefix=True),
            "no Sent",
        ),
        (model_proto(PIECES, 4, dummy_prefix=True), "model type Char"),
        (model_proto(PIECES, 2, dummy_prefix=True, charsmap=b"abc"), "table for normalising.*tokenizer.json"),
        (model_proto([*PIECES, ("x", 0.0, 4)], 2, dummy_prefix=True, squeeze=True), "remove_extra_whitespaces"),
        (model_proto([("<0x>", 0.0, 6)], 2, dummy_prefix=True), "no SentencePiece model|form <0xHH>"),
    ],
)
def test_what_can_not_be_read_is_refused_by_name(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(ModelFileError, match=message) as caught:
        Tokenizer.from_folder(tmp_path)
    assert "<0xHH>" in str(caught.value) or "tokenizer.model" in str(caught.value)


def test_every_truncation_of_a_file_is_read_or_refused(tmp_path: Path) -> None:
    whole = model_proto(PIECES[:40], 2, dummy_prefix=True)
    for end in range(len(whole)):
        try:
            model = read_model(tmp_path / "tokenizer.model", whole[:end])
        except ModelFileError:
            continue
        assert len(model.tokens) == len(model.scores) == len(model.types) <= 40
