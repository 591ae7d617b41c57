"""Mutations of bytes: what damage, lies about lengths and spliced files look like. Seeded, so repeatable."""

from __future__ import annotations

from random import Random

INTERESTING = tuple(
    sorted(
        {0, 1, 2, 3, 7, 8, 15, 16, 31, 32, 63, 64, 100, 127, 128, 255, 256, 1000, 1023, 1024, 4095, 4096, 65535, 65536}
        | {(1 << bits) + delta for bits in (20, 24, 26, 31, 32, 48, 62, 63, 64) for delta in (-1, 0, 1)}
    )
)
"""Numbers at which arithmetic and checks change their minds."""

_NESTS = (b"[", b'{"a":', b"\x91", b"\x81\xa1a", b"{%for a in b%}", b"(")
_WIDTHS = (1, 2, 4, 8)
MAX_BYTES = 1 << 16
"""No mutation makes an input longer; the targets' inputs are headers, messages and requests."""


def mutate(random: Random, data: bytes, other: bytes) -> bytes:
    """One to a few mutations of `data`; `other` is spliced in."""
    for _ in range(min(1 + int(random.expovariate(0.8)), 8)):
        data = random.choice(_MUTATIONS)(random, data, other)
    return data[:MAX_BYTES]


def _flip_bit(random: Random, data: bytes, other: bytes) -> bytes:
    if not data:
        return data
    place = random.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << random.randrange(8)]) + data[place + 1 :]


def _set_byte(random: Random, data: bytes, other: bytes) -> bytes:
    if not data:
        return random.randbytes(8)
    place = random.randrange(len(data))
    return (
        data[:place] + bytes([random.choice((0, 1, 0x7F, 0x80, 0xC1, 0xFF, random.randrange(256)))]) + data[place + 1 :]
    )


def _write_number(random: Random, data: bytes, other: bytes) -> bytes:
    """An interesting number over one, two, four or eight bytes, in either order: often a length that lies."""
    width = random.choice(_WIDTHS)
    if len(data) < width:
        return data
    place = random.randrange(len(data) - width + 1)
    number = (random.choice(INTERESTING) * random.choice((1, 1, 1, -1))) % (1 << 8 * width)
    return data[:place] + number.to_bytes(width, random.choice(("little", "big"))) + data[place + width :]


def _nudge_number(random: Random, data: bytes, other: bytes) -> bytes:
    """What may be a length, a little larger or smaller."""
    width = random.choice(_WIDTHS)
    if len(data) < width:
        return data
    place = random.randrange(len(data) - width + 1)
    order = random.choice(("little", "big"))
    number = int.from_bytes(data[place : place + width], order) + random.choice((-8, -2, -1, 1, 2, 8))
    return data[:place] + (number % (1 << 8 * width)).to_bytes(width, order) + data[place + width :]


def _truncate(random: Random, data: bytes, other: bytes) -> bytes:
    return data[: random.randrange(len(data) + 1)]


def _remove(random: Random, data: bytes, other: bytes) -> bytes:
    begin = random.randrange(len(data) + 1)
    return data[:begin] + data[begin + random.choice((1, 2, 4, 8, random.randrange(64))) :]


def _repeat(random: Random, data: bytes, other: bytes) -> bytes:
    begin = random.randrange(len(data) + 1)
    piece = data[begin : begin + random.choice((1, 4, 8, 64, 512))]
    return data[:begin] + piece * random.choice((2, 2, 2, 16)) + data[begin:]


def _insert(random: Random, data: bytes, other: bytes) -> bytes:
    place = random.randrange(len(data) + 1)
    return data[:place] + random.randbytes(random.choice((1, 2, 4, 8, 32))) + data[place:]


def _nest(random: Random, data: bytes, other: bytes) -> bytes:
    place = random.randrange(len(data) + 1)
    return data[:place] + random.choice(_NESTS) * random.choice((4, 64, 3000)) + data[place:]


def _splice(random: Random, data: bytes, other: bytes) -> bytes:
    begin = random.randrange(len(other) + 1)
    piece = other[begin : begin + random.choice((8, 64, 512, 4096))]
    place = random.randrange(len(data) + 1)
    return data[:place] + piece + data[place + random.choice((0, len(piece))) :]


def _swap(random: Random, data: bytes, other: bytes) -> bytes:
    if len(data) < 3:
        return data
    a, b, c = sorted(random.randrange(len(data) + 1) for _ in range(3))
    return data[:a] + data[b:c] + data[a:b] + data[c:]


_MUTATIONS = (
    _flip_bit,
    _flip_bit,
    _set_byte,
    _set_byte,
    _write_number,
    _write_number,
    _write_number,
    _nudge_number,
    _nudge_number,
    _truncate,
    _remove,
    _repeat,
    _insert,
    _nest,
    _splice,
    _splice,
    _swap,
)
