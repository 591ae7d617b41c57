"""Text shown while it is generated, for every form of vocabulary: never half a character, never another text."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from support.hard_texts import TEXTS
from support.trained_tokenizers import (
    byte_level,
    byte_level_gguf,
    sentencepiece_bpe,
    sentencepiece_gguf,
    splits,
    unigram,
    write_folder,
)

from swarmd.node.models.pre_tokenizers import PRE_TOKENIZERS
from swarmd.node.models.tokenizer import GUARD, Tokenizer


def from_folder(backend: Any) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        return Tokenizer.from_folder(write_folder(Path(folder), backend, unk_token="<unk>"))


O200K = byte_level(splits(*PRE_TOKENIZERS["gpt-4o"].patterns))
TOKENIZERS = {
    "byte-level folder": from_folder(O200K),
    "byte-level gguf": Tokenizer.from_gguf(byte_level_gguf(O200K, "gpt-4o")),
    "llama folder": from_folder(sentencepiece_bpe(True)),
    "llama gguf": Tokenizer.from_gguf(sentencepiece_gguf(True)),
    "gemma folder": from_folder(sentencepiece_bpe(False)),
    "unigram folder": from_folder(unigram()),
}
EXACT = [name for name in TOKENIZERS if name != "unigram folder"]  # Metaspace has no token for "▁" beside the space

any_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=GUARD + "▁"), max_size=50)
hard_text = st.lists(st.sampled_from([t for t in TEXTS if "▁" not in t]), max_size=3).map("".join)


@settings(max_examples=250, deadline=None)
@given(st.one_of(any_text, hard_text), st.sampled_from(EXACT))
def test_every_text_reads_back_piece_by_piece_without_half_a_character(text: str, name: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, add_special=False, parse_special=False)
    detokenizer = tokenizer.detokenizer(skip_special=False)
    pieces = [detokenizer.push(i) for i in ids]
    assert "".join(pieces) == text
    assert detokenizer.flush() == ""
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
    assert tokenizer.decode(ids) == text


@settings(max_examples=250, deadline=None)
@given(st.data(), st.sampled_from(sorted(TOKENIZERS)), st.booleans(), st.booleans())
def test_pieces_of_any_ids_join_to_the_decoded_whole(data: Any, name: str, skip: bool, keep: bool) -> None:
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    detokenizer = tokenizer.detokenizer(skip, keep_leading_space=keep)
    pieces = [detokenizer.push(i) for i in ids]
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(ids, skip, keep_leading_space=keep)


@settings(max_examples=150, deadline=None)
@given(hard_text, hard_text, st.sampled_from(["byte-level folder", "byte-level gguf", "gemma folder"]), st.data())
def test_a_stream_cut_anywhere_goes_on_as_the_same_text(first: str, second: str, name: str, data: Any) -> None:
    """Another node takes over a stream: what it decodes from the cut on, with the bytes held back, is the rest."""
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(first + second, add_special=False, parse_special=False)
    cut = data.draw(st.integers(0, len(ids)))
    detokenizer = tokenizer.detokenizer(skip_special=False)
    before = "".join([detokenizer.push(i) for i in ids[:cut]])
    after = "".join([detokenizer.push(i) for i in ids[cut:]]) + detokenizer.flush()
    assert before + after == first + second
    whole = b"".join(map(tokenizer.token_bytes, ids))
    assert whole.decode() == first + second
    assert whole.startswith(before.encode())


@settings(max_examples=150, deadline=None)
@given(st.data(), any_text, st.sampled_from(sorted(TOKENIZERS)))
def test_no_text_of_a_user_holds_a_control_token(data: Any, text: str, name: str) -> None:
    tokenizer = TOKENIZERS[name]
    control = sorted(tokenizer.control_texts)
    parts = data.draw(st.lists(st.sampled_from([*control, text, *(c[:2] for c in control), *(c[2:] for c in control)])))
    ids = tokenizer.encode("".join(parts), add_special=False, parse_special=False)
    assert not {i for i in ids if tokenizer.token_text(i) in tokenizer.control_texts}
