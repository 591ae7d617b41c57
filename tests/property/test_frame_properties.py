"""The frame codec under any chunking and any garbage."""

import tracemalloc

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmd.transport.frames import (
    HELLO_LIMITS,
    PRELUDE,
    Envelope,
    Flow,
    FrameDecoder,
    FrameError,
    Limits,
    encode_head,
)

SMALL = Limits(header=4096, payload=64 * 1024)
bodies = st.one_of(st.none(), st.integers(-(2**40), 2**40), st.binary(max_size=300), st.lists(st.text(max_size=5)))
frames = st.tuples(
    st.sampled_from(Flow),
    st.integers(0, 2**62),
    bodies,
    st.one_of(st.binary(max_size=50), st.integers(0, 60_000).map(lambda n: bytes(i % 251 for i in range(n)))),
)


def encode(flow: Flow, frame_id: int, body: object, payload: bytes) -> bytes:
    return encode_head(Envelope(flow, frame_id, msgspec.Raw(msgspec.msgpack.encode(body))), len(payload)) + payload


def feed(decoder: FrameDecoder, data: bytes, sizes: list[int]):
    """Everything the decoder says about `data` when it comes in pieces of `sizes`, repeated."""
    found, position, turn = [], 0, 0
    while True:
        while (frame := decoder.next_frame()) is not None:
            found.append((frame.envelope.flow, frame.envelope.id, bytes(frame.envelope.body), bytes(frame.payload)))
        if position == len(data):
            return found
        view = decoder.buffer()
        assert len(view) > 0
        count = min(sizes[turn % len(sizes)], len(view), len(data) - position)
        view[:count] = data[position : position + count]
        decoder.advance(count)
        position += count
        turn += 1


@given(st.lists(frames, max_size=6), st.lists(st.integers(1, 20_000), min_size=1, max_size=8))
@settings(max_examples=80, deadline=None)
def test_any_chunking_gives_the_same_frames(sent, sizes):
    data = b"".join(encode(*frame) for frame in sent)
    decoder = FrameDecoder(SMALL)
    expected = [(flow, i, msgspec.msgpack.encode(body), payload) for flow, i, body, payload in sent]
    assert feed(decoder, data, sizes) == expected
    assert not decoder.in_frame


@given(st.lists(frames, min_size=1, max_size=3), st.data())
@settings(max_examples=60, deadline=None)
def test_a_stream_cut_anywhere_waits_and_knows_that_it_is_in_a_frame(sent, data):
    pieces = [encode(*frame) for frame in sent]
    whole = b"".join(pieces)
    cut = data.draw(st.integers(0, len(whole) - 1))
    decoder = FrameDecoder(SMALL)
    found = feed(decoder, whole[:cut], [4096])
    ends = [len(b"".join(pieces[: n + 1])) for n in range(len(pieces))]
    assert len(found) == sum(end <= cut for end in ends)
    assert decoder.in_frame == (cut not in (0, *ends))


@given(st.binary(max_size=400), st.sampled_from([SMALL, HELLO_LIMITS, Limits()]))
@settings(max_examples=400)
def test_garbage_gives_frames_or_waits_or_a_frame_error(data, limits):
    try:
        feed(FrameDecoder(limits), data, [7])
    except FrameError:
        return


@given(st.binary(min_size=1, max_size=200))
@settings(max_examples=400)
def test_garbage_as_a_header_of_the_right_length(header):
    try:
        feed(FrameDecoder(SMALL), PRELUDE.pack(len(header), 0) + header, [64])
    except FrameError:
        return


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_announced_lengths_above_the_limits_allocate_nothing(header, payload):
    within = 0 < header <= SMALL.header and payload <= SMALL.payload
    decoder = FrameDecoder(SMALL)
    tracemalloc.start()
    try:
        feed(decoder, PRELUDE.pack(header, payload), [8])
    except FrameError:
        assert not within
    else:
        assert within
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < SMALL.header + SMALL.payload + 64 * 1024
