"""The frame codec: bytes in, frames out, no I/O.

A frame is a prelude (header length and payload length, unsigned 32-bit big-endian), a header (an `Envelope`
as a msgpack array) and raw payload bytes. Lengths are checked against `Limits` before anything is allocated
for them.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Annotated, Any, NamedTuple, TypeAlias

import msgspec

MAX_HEADER = 1024 * 1024
MAX_PAYLOAD = 64 * 1024 * 1024
MAX_HELLO_HEADER = 4 * 1024
PRELUDE = struct.Struct(">II")

# One TLS record holds at most 16 KiB of plaintext, so a larger buffer is never filled by one read.
_SCRATCH = 16 * 1024


# Anything that exports its bytes; `Any` adds numpy arrays and the like, which type checkers do not know as
# buffers.
Buffer: TypeAlias = bytes | bytearray | memoryview | Any


class FrameError(Exception):
    """The bytes or the message break the protocol's rules; the link they came from cannot go on."""


class Flow(IntEnum):
    """What a frame is for.

    The ids of REQUEST, STREAM, CANCEL and CREDIT are the asking side's, as are their answers'.
    """

    HELLO = 0
    ONEWAY = 1
    REQUEST = 2
    REPLY = 3
    ERROR = 4
    STREAM = 5
    STREAM_ITEM = 6
    STREAM_END = 7
    CANCEL = 8
    CREDIT = 9
    GOODBYE = 10


class Envelope(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A frame's header. `id` is 0 for flows that are not part of an exchange; `body` is one msgpack value."""

    flow: Flow
    id: Annotated[int, msgspec.Meta(ge=0, le=2**62)]
    body: msgspec.Raw


class Frame(NamedTuple):
    """A whole frame. The payload belongs to the receiver, who may keep or change it."""

    envelope: Envelope
    payload: bytearray


class Limits(NamedTuple):
    """The largest header and payload, in bytes, that a decoder accepts."""

    header: int = MAX_HEADER
    payload: int = MAX_PAYLOAD


HELLO_LIMITS = Limits(header=MAX_HELLO_HEADER, payload=0)

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Envelope)


def encode_head(envelope: Envelope, payload_bytes: int) -> bytes:
    """Prelude and header of a frame; the payload's bytes follow them on the wire unchanged.

    Raises `FrameError` if the header or the payload is larger than any receiver accepts.
    """
    header = _encoder.encode(envelope)
    if len(header) > MAX_HEADER:
        raise FrameError(f"a header of {len(header)} bytes is above the limit of {MAX_HEADER}; send it as payload")
    if payload_bytes > MAX_PAYLOAD:
        raise FrameError(f"a payload of {payload_bytes} bytes is above the limit of {MAX_PAYLOAD}; split it")
    return PRELUDE.pack(len(header), payload_bytes) + header


def payload_view(payload: Buffer) -> memoryview:
    """The bytes of a payload without copying them; `FrameError` if they do not lie in one piece."""
    view = memoryview(payload)
    if not view.c_contiguous:
        raise FrameError("a payload must be contiguous in memory")
    return view.cast("B") if view.nbytes else memoryview(b"")


class FrameDecoder:
    """Cuts a byte stream into frames.

    Read into `buffer()`, say how many bytes came with `advance()`, then take frames with `next_frame()` until
    it returns None. Small frames share one scratch buffer; the rest of a large one is read straight into its
    destination. `limits` may be changed between two frames. After a `FrameError` the decoder is not to be
    used again.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        self._scratch = memoryview(bytearray(_SCRATCH))
        self._start = self._end = 0
        self._target: bytearray | None = None  # the header or payload being filled
        self._filled = 0
        self._envelope: Envelope | None = None  # set while the payload is awaited
        self._payload_bytes = 0

    @property
    def in_frame(self) -> bool:
        """Whether the bytes so far end in the middle of a frame."""
        return self._target is not None or self._envelope is not None or self._start != self._end

    def buffer(self) -> memoryview:
        """Where the next bytes go; never empty once `next_frame` has returned None."""
        if self._target is not None:
            return memoryview(self._target)[self._filled :]
        if self._start:
            self._scratch[: self._end - self._start] = self._scratch[self._start : self._end]
            self._start, self._end = 0, self._end - self._start
        return self._scratch[self._end :]

    def advance(self, count: int) -> None:
        """Say that `count` bytes were written at the start of the last `buffer()`."""
        if self._target is not None:
            self._filled += count
        else:
            self._end += count

    def next_frame(self) -> Frame | None:
        """The next whole frame, or None if more bytes are needed. Raises `FrameError`."""
        if self._target is None:
            if self._end - self._start < PRELUDE.size:
                return None
            header, payload = self._prelude()
            begin = self._start + PRELUDE.size
            middle, end = begin + header, begin + header + payload
            if end <= self._end:  # whole already, as small frames are
                envelope = decode_envelope(bytes(self._scratch[begin:middle]))
                self._consume(end)
                return Frame(envelope, bytearray(self._scratch[middle:end]))
            self._start = begin
            self._payload_bytes = payload
            self._target, self._filled = bytearray(header), 0
        return self._next_part(self._target)

    def _next_part(self, target: bytearray) -> Frame | None:
        """Fill header and payload of a frame that comes in pieces."""
        if not self._fill(target):
            return None
        if self._envelope is None:
            self._envelope = decode_envelope(target)
            target = self._target = bytearray(self._payload_bytes)
            self._filled = 0
            if not self._fill(target):
                return None
        frame = Frame(self._envelope, target)
        self._target = self._envelope = None
        return frame

    def _prelude(self) -> tuple[int, int]:
        """The lengths of header and payload that the scratch buffer announces, within the limits."""
        header, payload = PRELUDE.unpack_from(self._scratch, self._start)
        if not 0 < header <= self.limits.header:
            raise FrameError(f"a frame announces a header of {header} bytes; the limit is {self.limits.header}")
        if payload > self.limits.payload:
            raise FrameError(f"a frame announces a payload of {payload} bytes; the limit is {self.limits.payload}")
        return header, payload

    def _fill(self, target: bytearray) -> bool:
        """Move what the scratch buffer has into `target`; whether it is full."""
        count = min(len(target) - self._filled, self._end - self._start)
        if count:
            target[self._filled : self._filled + count] = self._scratch[self._start : self._start + count]
            self._filled += count
            self._consume(self._start + count)
        return self._filled == len(target)

    def _consume(self, end: int) -> None:
        """The scratch buffer is used up to here; an empty one begins anew."""
        self._start = end
        if self._start == self._end:
            self._start = self._end = 0


def decode_envelope(header: bytes | bytearray) -> Envelope:
    """The envelope in a frame's header; `FrameError` if the bytes are anything else."""
    try:
        return _decoder.decode(header)
    except (ValueError, RecursionError) as error:  # msgspec's errors and bad UTF-8 are ValueErrors
        raise FrameError(f"a frame's header is malformed: {error}") from None
