"""The join token: a person types it, so every slip has its own sentence."""

import pytest

from swarmd.transport.token import JoinToken, TokenError

SECRET = bytes(range(20))
TEXT = str(JoinToken(SECRET))
ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


def test_text_form_is_stable():
    # A change here would lock every existing swarm out.
    assert TEXT == "swarmd1-000G4-0R40M-30E20-9185G-R38E1-W8124-GKBV9-C3X5M"
    assert JoinToken(SECRET).swarm_tag == "522ed0d78c850f49"


@pytest.mark.parametrize(
    "typed",
    [
        TEXT,
        TEXT.lower(),
        TEXT.upper(),
        f"  {TEXT}\n",
        TEXT.replace("-", "- "),
        "swarmd1-" + TEXT.removeprefix("swarmd1-").replace("-", ""),
        TEXT.replace("0", "O"),
    ],
)
def test_ways_of_typing_it_that_are_accepted(typed):
    assert JoinToken.parse(typed).secret == SECRET


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("", "not a join token"),
        ("hello", "not a join token"),
        ("swarmd1", "not a join token"),
        ("x" * 10_000, "not a join token"),
        ("swarmd1-\u0131" + "0" * 39, "not a join token"),
        (TEXT.replace("swarmd1", "swarmd2"), "version 2"),
        (TEXT[:-1], "mistyped: 39 symbols"),
        (TEXT + "0", "mistyped: 41 symbols"),
        (TEXT.replace("W", "U"), "mistyped: symbol 26"),
        (TEXT[:-1] + "N", "mistyped: its checksum"),
    ],
)
def test_each_slip_has_its_own_sentence(typed, says):
    with pytest.raises(TokenError, match=says) as caught:
        JoinToken.parse(typed)
    assert len(typed) < 30 or typed not in str(caught.value)


def test_every_two_symbol_error_is_recognised():
    # The checksum is linear, so this is a proof and not a sample: if no two different one-symbol errors
    # change the checksum in the same way, then no text with one or two wrong symbols is a token.
    def symbols(token: JoinToken) -> list[int]:
        return [ALPHABET.index(s) for s in str(token).removeprefix("swarmd1-").replace("-", "")]

    zero = symbols(JoinToken(bytes(20)))
    syndromes = set()
    for position in range(32):
        for value in range(1, 32):
            secret = (value << 5 * (31 - position)).to_bytes(20, "big")
            check = symbols(JoinToken(secret))[32:]
            syndromes.add(tuple(a ^ b for a, b in zip(check, zero[32:], strict=True)))
    for position in range(8):
        for value in range(1, 32):
            syndromes.add(tuple(value if i == position else 0 for i in range(8)))
    assert len(syndromes) == 40 * 31
    assert (0,) * 8 not in syndromes


def test_repr_hides_the_secret_and_tokens_differ():
    token = JoinToken.generate()
    assert str(token)[8:13] not in repr(token)
    assert repr(token) == "JoinToken(hidden)"
    assert token != JoinToken.generate()
    assert token == JoinToken.parse(str(token))
    assert token.swarm_tag != JoinToken.generate().swarm_tag


def test_secret_length_is_checked():
    with pytest.raises(ValueError, match="20 bytes"):
        JoinToken(b"short")
