"""Whom to dial, when, and how often at most."""

from swarmd.discovery import dial_book
from swarmd.discovery.dial_book import Candidate, DialBook
from swarmd.discovery.peers import PeerAddress

A, B = "a" * 64, "b" * 64
ONE, TWO = ("192.0.2.1", 7000), ("192.0.2.2", 7000)


def test_a_sighting_is_dialled_at_once_on_all_its_addresses_and_not_again_meanwhile():
    book = DialBook("own")
    book.note_sighting(A, [ONE, TWO], 0)
    assert book.due(0) == [Candidate(*ONE, A), Candidate(*TWO, A)]
    assert book.due(1) == []


def test_failures_back_off_up_to_half_a_minute():
    book = DialBook("own")
    book.note_gossip(A, [ONE], 0)
    now, waits = 0.0, []
    assert book.due(now) == [Candidate(*ONE, A)]
    for _ in range(9):
        book.note_failed(ONE, now)
        start = now
        while not book.due(now):
            now += 0.25
        waits.append(now - start)
    assert waits == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]


def test_a_new_sighting_cuts_a_back_off_short_and_gossip_does_not():
    book = DialBook("own")
    book.note_sighting(A, [ONE], 0)
    for now in (0, 1, 3):
        assert book.due(now)
        book.note_failed(ONE, now)
    book.note_gossip(A, [ONE], 3.1)
    assert book.due(3.1) == []
    book.note_sighting(A, [ONE], 3.2)
    assert book.due(3.2) == [Candidate(*ONE, A)]


def test_linked_nodes_are_left_alone_and_lost_ones_dialled_at_once():
    book = DialBook("own")
    book.note_sighting(A, [ONE], 0)
    book.note_static(PeerAddress(*TWO), 0)
    assert set(book.due(0)) == {Candidate(*TWO, None), Candidate(*ONE, A)}
    book.note_linked(A, TWO, 0)
    assert book.due(100) == []
    book.note_lost(A, 100)
    assert set(book.due(100)) == {Candidate(*TWO, None), Candidate(*ONE, A)}


def test_a_node_that_dialled_us_is_linked_too():
    book = DialBook("own")
    book.note_linked(A, None, 0)
    book.note_gossip(A, [ONE], 0)
    assert book.due(0) == []
    book.note_lost(A, 5)
    assert book.due(5) == [Candidate(*ONE, A)]


def test_static_peers_are_dialled_for_ever_and_others_forgotten():
    book = DialBook("own")
    book.note_static(PeerAddress("nas.local", 7), 0)
    book.note_sighting(A, [ONE], 0)
    for address in (("nas.local", 7), ONE):
        book.note_failed(address, 0)
    assert book.due(10_000) == [Candidate("nas.local", 7, None)]


def test_this_node_itself_is_no_candidate():
    book = DialBook(A)
    book.note_sighting(A, [ONE], 0)
    assert book.due(0) == []


def test_dials_are_bounded_per_second_and_real_nodes_come_first():
    book = DialBook("own", dials_per_second=5)
    book.note_sighting(B, [TWO], 0)
    book.due(0)
    book.note_linked(B, TWO, 0)
    for i in range(500):
        book.note_sighting(f"{i:064x}", [("192.0.2.3", i + 1)], 1)
    book.note_lost(B, 1)
    first = book.due(1)
    assert len(first) == 5
    assert first[0] == Candidate(*TWO, B)
    assert book.due(1) == []
    assert len(book.due(1.5)) == 2
    assert len(book.due(100)) == 5


def test_an_unreported_dial_is_tried_again():
    book = DialBook("own")
    book.note_sighting(A, [ONE], 0)
    assert book.due(0)
    assert book.due(29) == []
    assert book.due(30) == [Candidate(*ONE, A)]


def test_inventions_cannot_push_out_what_is_proven():
    book = DialBook("own")
    book.note_sighting(A, [ONE], 0)
    book.note_linked(A, ONE, 0)
    book.note_lost(A, 0)
    for i in range(100):
        book.note_sighting(A, [("192.0.2.9", i + 1)], i)
    for i in range(2 * dial_book.MAX_NODES):
        book.note_sighting(f"{i:064x}", [TWO], 100)
    assert len(book._nodes) == dial_book.MAX_NODES
    assert len(book._nodes[A].routes) == dial_book.MAX_ADDRESSES
    assert ONE in book._nodes[A].routes


def test_an_evicted_node_is_not_dialled_and_its_addresses_wait_for_its_return():
    book = DialBook("own")
    book.note_sighting(A, [ONE], 0)
    book.refuse([A])
    assert book.due(0) == []
    book.note_sighting(A, [ONE], 1)
    assert book.due(1) == []
    book.refuse([])
    assert book.due(2) == [Candidate(*ONE, A)]


def test_who_says_that_this_node_is_evicted_is_not_asked_again_for_minutes():
    book = DialBook("own")
    book.note_sighting(A, [ONE], 0)
    assert book.due(0)
    book.note_failed(ONE, 0, evicted=True)
    book.note_sighting(A, [ONE], 1)
    assert book.due(dial_book.EVICTED_BACKOFF - 1) == []
    assert book.due(dial_book.EVICTED_BACKOFF) == [Candidate(*ONE, A)]
