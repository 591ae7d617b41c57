"""What holds of every text and every sequence of ids."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_tokenizers import byte_level_metadata, sentencepiece_metadata

from swarmd.node.models.tokenizer import GUARD, Tokenizer

BYTE_LEVEL = Tokenizer.from_gguf(byte_level_metadata())
PIECES = ["▁", "a", "b", "c", "▁a", "ab", "bc", "abc", "▁ab", "ca", "cab", "▁b", "ba", "aa"]
SCORES = {piece: -float(i) for i, piece in enumerate(PIECES)}
SENTENCEPIECE = Tokenizer.from_gguf(sentencepiece_metadata(PIECES))

any_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=GUARD), max_size=60)
scripts = st.text(st.sampled_from("aé漢字ひらがな한국😀👩‍👧🇫🇷مرحبا <|im_end|>\n 1"), max_size=40)


@settings(max_examples=150, deadline=None)
@given(st.one_of(any_text, scripts))
def test_text_of_a_user_reads_back_unchanged(text: str) -> None:
    ids = BYTE_LEVEL.encode(text, add_special=False, parse_special=False)
    assert BYTE_LEVEL.decode(ids, skip_special=False) == text


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, BYTE_LEVEL.vocab_size - 1), max_size=60), st.booleans())
def test_pieces_of_any_ids_join_to_the_decoded_whole(ids: list[int], skip: bool) -> None:
    detokenizer = BYTE_LEVEL.detokenizer(skip)
    pieces = [detokenizer.push(i) for i in ids]
    assert "".join(pieces) + detokenizer.flush() == BYTE_LEVEL.decode(ids, skip)
    shown = b"".join(BYTE_LEVEL.token_bytes(i) for i in ids if not (skip and i < 3))
    assert BYTE_LEVEL.decode(ids, skip) == shown.decode("utf-8", "replace")


@settings(max_examples=150, deadline=None)
@given(scripts, st.sampled_from([BYTE_LEVEL, SENTENCEPIECE]))
def test_no_piece_of_a_valid_text_shows_half_a_character(text: str, tokenizer: Tokenizer) -> None:
    detokenizer = tokenizer.detokenizer(skip_special=False)
    ids = tokenizer.encode(text, add_special=False, parse_special=False)
    pieces = [detokenizer.push(i) for i in ids]
    assert "�" not in "".join(pieces)
    assert detokenizer.flush() == ""
    assert "".join(pieces) == text


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("abc dé"), max_size=12))
def test_sentencepiece_merges_the_best_scored_pair_first(text: str) -> None:
    expected = sentencepiece_by_definition(text)
    ids = SENTENCEPIECE.encode(text, add_special=False)
    assert b"".join(map(SENTENCEPIECE.token_bytes, ids)) == " ".join(["", text]).encode() * bool(text)
    assert [SENTENCEPIECE.token_bytes(i) for i in ids] == expected


def sentencepiece_by_definition(text: str) -> list[bytes]:
    """Kudo's algorithm, written down directly: again and again the adjacent pair with the best score,
    leftmost first."""
    symbols = list(("▁" + text).replace(" ", "▁")) if text else []
    while True:
        pairs = [(-SCORES[a + b], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in SCORES]
        if not pairs:
            break
        at = min(pairs)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    known = [[s.replace("▁", " ").encode()] if s in SCORES else [bytes([b]) for b in s.encode()] for s in symbols]
    return [piece for pieces in known for piece in pieces]
