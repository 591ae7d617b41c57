"""The frame codec: bytes on the wire, limits, and what is refused."""

import msgspec
import numpy as np
import pytest

from swarmd.transport.frames import (
    HELLO_LIMITS,
    MAX_HEADER,
    MAX_PAYLOAD,
    Envelope,
    Flow,
    FrameDecoder,
    FrameError,
    Limits,
    encode_head,
    payload_view,
)


def decode(data: bytes, limits: Limits = Limits()):  # noqa: B008 - a constant
    decoder = FrameDecoder(limits)
    decoder.buffer()[: len(data)] = data
    decoder.advance(len(data))
    return decoder.next_frame()


def test_the_bytes_on_the_wire():
    # docs/protocol.md shows this frame.
    head = encode_head(Envelope(Flow.REQUEST, 7, msgspec.Raw(b"\xa2hi")), 3)
    assert head == bytes.fromhex("00000006 00000003 93 02 07 a26869".replace(" ", ""))
    frame = decode(head + b"abc")
    assert frame is not None
    assert frame.envelope == Envelope(Flow.REQUEST, 7, msgspec.Raw(b"\xa2hi"))
    assert frame.payload == bytearray(b"abc")


@pytest.mark.parametrize(
    ("prelude", "says"),
    [
        (b"\x80\x00\x00\x00\x00\x00\x00\x00", "header of 2147483648 bytes"),
        (b"\x00\x00\x00\x05\x80\x00\x00\x00", "payload of 2147483648 bytes"),
        (b"\x00\x00\x00\x00\x00\x00\x00\x00", "header of 0 bytes"),
        (b"GET / HTTP/1.1\r\n", "header of 1195725856 bytes"),
    ],
)
def test_two_gigabytes_are_refused_from_eight_bytes(prelude, says):
    with pytest.raises(FrameError, match=says):
        decode(prelude)


def test_before_the_hello_the_limits_are_small():
    with pytest.raises(FrameError, match="the limit is 4096"):
        decode(b"\x00\x00\x10\x01\x00\x00\x00\x00", HELLO_LIMITS)
    with pytest.raises(FrameError, match="the limit is 0"):
        decode(b"\x00\x00\x00\x05\x00\x00\x00\x01", HELLO_LIMITS)


@pytest.mark.parametrize(
    "header",
    [
        b"\x93\x63\x00\xc0",  # no such flow
        b"\x93\x01\xff\xc0",  # negative id
        b"\x92\x01\x00",  # no body
        b"\x93\x01\x00\xc0\xc0",  # bytes left over
        b"\xc0",
        b"\x93\x01\x00" + b"\x91" * 3000,  # nested too deep
        b"\x93\x01\x00\xdd\xff\xff\xff\xff",  # a body that claims four thousand million items
    ],
)
def test_malformed_headers_are_frame_errors(header):
    with pytest.raises(FrameError, match="malformed"):
        decode(len(header).to_bytes(4, "big") + bytes(4) + header)


def test_the_sender_is_told_what_nobody_would_accept():
    with pytest.raises(FrameError, match="split it"):
        encode_head(Envelope(Flow.ONEWAY, 0, msgspec.Raw(b"\xc0")), MAX_PAYLOAD + 1)
    body = msgspec.Raw(msgspec.msgpack.encode(b"x" * MAX_HEADER))
    with pytest.raises(FrameError, match="send it as payload"):
        encode_head(Envelope(Flow.ONEWAY, 0, body), 0)


def test_payloads_are_views_and_not_copies():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    view = payload_view(array)
    array[0, 0] = 9
    assert np.frombuffer(view, np.float32)[0] == 9
    assert payload_view(np.zeros((0, 4))).nbytes == 0
    with pytest.raises(FrameError, match="contiguous"):
        payload_view(array[:, ::2])
