"""From tokens to what a client sees: whole characters, stop strings and log-probabilities."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_tokenizers import byte_level_metadata, sentencepiece_metadata

from swarmd.node.models.tokenizer import Tokenizer
from swarmd.node.serving.generation import PieceToken
from swarmd.node.serving.messages import Token
from swarmd.node.serving.text_stream import TextStream

TOKENIZER = Tokenizer.from_gguf(byte_level_metadata())
END_OF_TURN = 2


def encode(text):
    return TOKENIZER.encode(text, add_special=False)


def shown(stream, ids):
    """All text that a client sees of these tokens, piece by piece, up to a stop string."""
    pieces = []
    for id_ in ids:
        pieces.append(stream.push(Token(id_, 0.0)).text)
        if stream.stopped:
            return pieces
    return [*pieces, stream.finish().text]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=40))
def test_the_pieces_joined_are_the_text_of_all_tokens(ids):
    stream = TextStream(TOKENIZER, ())
    assert "".join(shown(stream, ids)) == TOKENIZER.decode(ids)
    assert stream.tokens == ids
    assert not stream.stopped


@settings(max_examples=200, deadline=None)
@given(
    st.text("thein aé😀", max_size=30).map(encode),
    st.lists(st.text("thein aé😀", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_a_stop_string_ends_the_text_before_it_and_no_part_of_it_is_ever_shown(ids, stops):
    stream = TextStream(TOKENIZER, stops)
    pieces = shown(stream, ids)
    text = TOKENIZER.decode(ids)
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert stream.stopped == bool(ends)
    assert "".join(pieces) == (text[: min(ends)[1]] if ends else text)


def test_a_character_in_several_tokens_is_shown_once_it_is_whole():
    ids = encode("😀")
    assert len(ids) > 1
    stream = TextStream(TOKENIZER, ())
    assert [stream.push(Token(id_, 0.0)).text for id_ in ids] == [""] * (len(ids) - 1) + ["😀"]


def test_a_character_that_is_never_completed_is_shown_as_damaged_at_the_end():
    stream = TextStream(TOKENIZER, ())
    assert stream.push(Token(encode("😀")[0], 0.0)).text == ""
    assert stream.finish().text == "\ufffd"


def test_what_may_become_a_stop_string_is_held_back_until_it_is_clear_that_it_does_not():
    first, second, third = encode("a"), encode("b"), encode("c")
    stream = TextStream(TOKENIZER, ["abX"])
    texts = [stream.push(Token(id_, 0.0)).text for id_ in (*first, *second, *third)]
    assert texts == ["", "", "abc"]


def test_what_was_held_back_is_shown_at_the_end():
    stream = TextStream(TOKENIZER, ["abX"])
    assert shown(stream, [*encode("a"), *encode("b")]) == ["", "", "ab"]


def test_a_stop_string_that_is_complete_only_at_the_end_counts():
    stream = TextStream(TOKENIZER, ["a\ufffd"])
    for id_ in (*encode("xa"), encode("😀")[0]):
        stream.push(Token(id_, 0.0))
    assert not stream.stopped
    assert (stream.finish().text, stream.stopped) == ("", True)


def test_nothing_is_shown_after_a_stop_string():
    stream = TextStream(TOKENIZER, ["b"])
    assert shown(stream, encode("abc"))[0] == "a"
    assert stream.stopped
    assert stream.push(Token(encode("c")[0], 0.0)).text == ""
    assert (stream.finish().text, stream.stopped) == ("", True)


def test_tokens_carry_their_text_and_log_probability_and_their_alternatives():
    a, b = encode("a")[0], encode("b")[0]
    piece = TextStream(TOKENIZER, ()).push(Token(a, -0.25, ((a, -0.25), (b, -1.5))))
    assert piece.tokens == (PieceToken("a", -0.25, (("a", -0.25), ("b", -1.5))),)


def test_a_control_token_is_counted_and_not_shown():
    stream = TextStream(TOKENIZER, ())
    piece = stream.push(Token(END_OF_TURN, -0.5))
    assert (piece.text, stream.tokens) == ("", [END_OF_TURN])
    assert piece.tokens[0].text == "<|im_end|>"


@pytest.mark.parametrize(("continues", "text"), [(False, "Paris is"), (True, " Paris is")])
def test_a_space_at_the_beginning_counts_only_where_a_text_goes_on(continues, text):
    tokenizer = Tokenizer.from_gguf(sentencepiece_metadata(["▁Paris", "▁is"]))
    stream = TextStream(tokenizer, (), continues=continues)
    assert "".join(shown(stream, [259, 260])) == text


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="must not be empty"):
        TextStream(TOKENIZER, [""])
