"""Every single typing error and every swap of neighbours in a join token is recognised."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmd.transport.token import JoinToken, TokenError

secrets = st.binary(min_size=20, max_size=20)
typed = st.sampled_from("0123456789ABCDEFGHJKMNPQRSTVWXYZabcUu!-. \u00e9\u0130")


def accepts(text: str) -> bytes | None:
    try:
        return JoinToken.parse(text).secret
    except TokenError:
        return None


@given(secrets)
@settings(max_examples=50)
def test_a_token_survives_its_text(secret):
    assert accepts(str(JoinToken(secret))) == secret


@given(secrets, st.data())
@settings(max_examples=300)
def test_one_wrong_character_never_makes_another_token(secret, data):
    text = str(JoinToken(secret))
    place = data.draw(st.integers(0, len(text) - 1))
    wrong = text[:place] + data.draw(typed) + text[place + 1 :]
    meant_the_same = accepts(wrong) == secret and wrong.upper().replace(" ", "-") == text.upper()
    assert accepts(wrong) is None or meant_the_same


@given(secrets, st.data())
@settings(max_examples=300)
def test_swapped_neighbours_never_make_another_token(secret, data):
    text = str(JoinToken(secret))
    place = data.draw(st.integers(0, len(text) - 2))
    wrong = text[:place] + text[place + 1] + text[place] + text[place + 2 :]
    # Only a hyphen between two groups may move: it means nothing.
    assert accepts(wrong) is None or wrong.replace("-", "") == text.replace("-", "")


@given(st.text(max_size=300))
@settings(max_examples=200)
def test_any_text_is_a_token_or_a_token_error(text):
    accepts(text)


@pytest.mark.parametrize("length", [0, 19, 21])
def test_other_secret_lengths_are_refused(length):
    with pytest.raises(ValueError):
        JoinToken(bytes(length))
