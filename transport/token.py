"""The join token: the one secret that makes a swarm.

Text form: ``swarmd1-`` followed by 40 symbols in groups of five. The symbols are Crockford's base 32; the
first 32 carry the 160-bit secret, most significant bit first, and the last eight are a BCH checksum over
GF(32): the 40-bit code of the CashAddr specification (same generator), computed over the prefix and the
secret. Its minimum distance is above two, so every single mistyped symbol and every swap of two neighbours is
recognised, not merely nearly every one.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from functools import cached_property

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

SECRET_BYTES = 20
PREFIX = "swarmd1"
TAG_INFO = b"swarmd/1 swarm tag"

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_VALUES = {symbol: value for value, symbol in enumerate(_ALPHABET)}
_LOOK_ALIKES = str.maketrans("OIL", "011")
_SECRET_SYMBOLS = 32
_CHECK_SYMBOLS = 8
_GENERATOR = (0x98F2BC8E61, 0x79B76D99E2, 0xF33E5FB3C4, 0xAE2EABE2A8, 0x1E4F43E470)
_MAX_TEXT = 256


class TokenError(ValueError):
    """The text is not a usable join token; the message says why, and never repeats the text."""


class JoinToken:
    """A 160-bit secret shared by the members of one swarm. Its `repr` never shows it."""

    __slots__ = ("__dict__", "_secret")

    def __init__(self, secret: bytes):
        """Wrap `secret`, exactly 20 bytes; `ValueError` for any other length."""
        if len(secret) != SECRET_BYTES:
            raise ValueError(f"a join token's secret has {SECRET_BYTES} bytes, not {len(secret)}")
        self._secret = bytes(secret)

    @classmethod
    def generate(cls) -> JoinToken:
        """Make a new token from the operating system's random source."""
        return cls(secrets.token_bytes(SECRET_BYTES))

    @classmethod
    def parse(cls, text: str) -> JoinToken:
        """Read a token as typed or pasted by a person.

        White space and hyphens between the symbols are ignored, case does not matter, and O, I and L are read
        as 0, 1 and 1. Raises `TokenError`, which tells apart text that is no token, a token of another
        version, and a token with a typing error.
        """
        if len(text) > _MAX_TEXT or not text.isascii():
            raise TokenError("this is not a join token; a token begins with swarmd1- and `swarmd token` shows it")
        prefix, hyphen, body = "".join(text.split()).partition("-")
        version = re.fullmatch(r"swarmd(\d{1,3})", prefix.lower())
        if version is None or not hyphen:
            raise TokenError("this is not a join token; a token begins with swarmd1- and `swarmd token` shows it")
        if prefix.lower() != PREFIX:
            raise TokenError(
                f"this join token has version {version[1]}, this node reads version 1; "
                "install the same swarmd on both machines"
            )
        return cls(_decode_body(body.replace("-", "").upper().translate(_LOOK_ALIKES)))

    @property
    def secret(self) -> bytes:
        """The 20 secret bytes; input of every key derivation, never to be logged or sent."""
        return self._secret

    @cached_property
    def swarm_tag(self) -> str:
        """16 hex digits that name the swarm in public.

        HKDF-SHA256 with its own info string, so they tell nothing.
        """
        return derive(self._secret, TAG_INFO, 8).hex()

    def __str__(self) -> str:
        """The text to type on the next machine: this is the secret itself."""
        number = int.from_bytes(self._secret, "big")
        values = [number >> (5 * (_SECRET_SYMBOLS - 1 - i)) & 31 for i in range(_SECRET_SYMBOLS)]
        symbols = "".join(_ALPHABET[value] for value in values + _checksum(values))
        groups = (symbols[i : i + 5] for i in range(0, len(symbols), 5))
        return "-".join((PREFIX, *groups))

    def __repr__(self) -> str:
        return "JoinToken(hidden)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, JoinToken) and secrets.compare_digest(self._secret, other._secret)

    def __hash__(self) -> int:
        return hash(self._secret)


def derive(secret: bytes, info: bytes, length: int) -> bytes:
    """`length` bytes from the token's secret by HKDF-SHA256 (RFC 5869), no salt, `info` naming the use."""
    return HKDF(algorithm=hashes.SHA256(), length=length, salt=None, info=info).derive(secret)


def _decode_body(symbols: str) -> bytes:
    expected = _SECRET_SYMBOLS + _CHECK_SYMBOLS
    if len(symbols) != expected:
        raise TokenError(
            f"the join token is mistyped: {len(symbols)} symbols follow swarmd1-, a whole one has {expected}"
        )
    values = [_VALUES.get(symbol, -1) for symbol in symbols]
    if -1 in values:
        raise TokenError(
            f"the join token is mistyped: symbol {values.index(-1) + 1} after swarmd1- is none of a token's"
        )
    if _checksum(values[:_SECRET_SYMBOLS]) != values[_SECRET_SYMBOLS:]:
        raise TokenError("the join token is mistyped: its checksum is wrong; compare it with `swarmd token`")
    number = 0
    for value in values[:_SECRET_SYMBOLS]:
        number = number << 5 | value
    return number.to_bytes(SECRET_BYTES, "big")


def _polymod(values: Iterable[int]) -> int:
    remainder = 1
    for value in values:
        top = remainder >> 35
        remainder = (remainder & 0x07FFFFFFFF) << 5 ^ value
        for bit, generator in enumerate(_GENERATOR):
            if top >> bit & 1:
                remainder ^= generator
    return remainder ^ 1


def _checksum(values: list[int]) -> list[int]:
    prefix = [ord(character) & 31 for character in PREFIX]
    remainder = _polymod([*prefix, 0, *values, *([0] * _CHECK_SYMBOLS)])
    return [remainder >> (5 * (_CHECK_SYMBOLS - 1 - i)) & 31 for i in range(_CHECK_SYMBOLS)]
