"""The dial book under any sequence of events."""

from hypothesis import given, settings
from hypothesis import strategies as st

from swarmd.discovery import dial_book
from swarmd.discovery.dial_book import DialBook
from swarmd.discovery.peers import PeerAddress

nodes = st.integers(0, 5).map(lambda i: f"{i:064x}")
addresses = st.tuples(st.sampled_from(["192.0.2.1", "fd00::2", "nas"]), st.integers(1, 40))
steps = st.lists(
    st.one_of(
        st.tuples(st.just("note_sighting"), nodes, st.lists(addresses, max_size=20)),
        st.tuples(st.just("note_gossip"), nodes, st.lists(addresses, max_size=20)),
        st.tuples(st.just("note_static"), addresses),
        st.tuples(st.just("note_failed"), addresses),
        st.tuples(st.just("note_linked"), nodes, st.one_of(st.none(), addresses)),
        st.tuples(st.just("note_lost"), nodes),
        st.tuples(st.just("due")),
    ),
    max_size=60,
)


@given(steps, st.lists(st.floats(0, 40), min_size=60, max_size=60))
@settings(max_examples=150, deadline=None)
def test_bounded_never_a_linked_node_never_itself_statics_kept(events, gaps):
    book, now = DialBook(f"{0:064x}", dials_per_second=8), 0.0
    linked: set[str] = set()
    statics: set[tuple[str, int]] = set()
    for (name, *arguments), gap in zip(events, gaps, strict=False):
        now += gap
        if name == "note_static":
            statics.add(arguments[0])
            book.note_static(PeerAddress(*arguments[0]), now)
            continue
        if name == "note_linked":
            linked.add(arguments[0])
        if name == "note_lost":
            linked.discard(arguments[0])
        result = getattr(book, name)(*arguments, now)
        if name == "due":
            assert len(result) <= 8
            assert not {candidate.node_id for candidate in result} & {*linked, f"{0:064x}"}
    assert statics == set(book._static)
    assert all(len(node.routes) <= dial_book.MAX_ADDRESSES for node in book._nodes.values())


@given(steps)
@settings(max_examples=60, deadline=None)
def test_whatever_happened_a_static_peer_without_a_link_is_due_in_the_end(events):
    book = DialBook("own")
    book.note_static(PeerAddress("nas", 7000), 0)
    for name, *arguments in events:
        if name == "note_static":
            arguments = [PeerAddress(*arguments[0])]
        getattr(book, name)(*arguments, 1)
    for i in range(6):
        book.note_lost(f"{i:064x}", 2)
    found = [candidate.address for now in range(60, 100) for candidate in book.due(float(now))]
    assert ("nas", 7000) in found
