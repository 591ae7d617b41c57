"""The bytes of several files as one sequence, for any files and any ranges."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from swarmd.node.models.address_space import AddressSpace, Span

files = st.lists(st.integers(0, 40).flatmap(lambda size: st.tuples(st.just(size), st.integers(0, size))), max_size=8)


@given(files, st.data())
def test_every_range_is_found_where_it_lies(sizes: list[tuple[int, int]], data: st.DataObject) -> None:
    """Against the sequence written out."""
    contents = [bytes((number * 41 + at) % 256 for at in range(size)) for number, (size, _) in enumerate(sizes)]
    heads = b"".join(content[:head] for content, (_, head) in zip(contents, sizes, strict=True))
    tails = b"".join(content[head:] for content, (_, head) in zip(contents, sizes, strict=True))
    space = AddressSpace(sizes)
    assert (space.size, space.head_bytes) == (len(heads + tails), len(heads))

    offset = data.draw(st.integers(0, space.size))
    length = data.draw(st.integers(0, space.size - offset))
    spans = space.spans(offset, length)
    assert all(span.length for span in spans)
    assert (
        b"".join(contents[s.file][s.offset : s.offset + s.length] for s in spans)
        == (heads + tails)[offset : offset + length]
    )
    back = space.ranges(spans)
    assert sum(size for _, size in back) == length
    assert b"".join((heads + tails)[at : at + size] for at, size in back) == (heads + tails)[offset : offset + length]


@given(files.filter(bool), st.data())
def test_a_range_of_a_file_is_one_or_two_ranges_of_the_sequence(sizes, data: st.DataObject) -> None:
    space = AddressSpace(sizes)
    file = data.draw(st.integers(0, len(sizes) - 1))
    offset = data.draw(st.integers(0, sizes[file][0]))
    length = data.draw(st.integers(0, sizes[file][0] - offset))
    found = space.ranges([Span(file, offset, length)])
    assert len(found) <= 2
    assert [span for at, size in found for span in space.spans(at, size)] == [
        span
        for span in (
            Span(file, offset, min(length, max(0, sizes[file][1] - offset))),
            Span(file, max(offset, sizes[file][1]), length - min(length, max(0, sizes[file][1] - offset))),
        )
        if span.length
    ]


@given(files, st.integers(-3, 400), st.integers(-3, 400))
def test_what_lies_outside_is_refused(sizes: list[tuple[int, int]], offset: int, length: int) -> None:
    space = AddressSpace(sizes)
    inside = offset >= 0 and length >= 0 and offset + length <= space.size
    try:
        space.spans(offset, length)
    except ValueError:
        assert not inside
    else:
        assert inside
