"""This node's own record: counted up when it changes, and only then."""

import time

from msgspec.structs import replace

from swarmd.discovery.records import NodeRecord
from swarmd.node.cluster.own_record import OwnRecord


class Parts:
    """What the record is gathered from."""

    def __init__(self):
        self.record = NodeRecord("a" * 64, "one", "0", counter=0)

    def gather(self):
        return self.record


def test_it_is_counted_up_when_something_changed():
    parts = Parts()
    own = OwnRecord(parts.gather)
    first = own.current
    parts.record = replace(parts.record, leaving=True)
    assert own.current == first, "nothing is published before it is refreshed"
    assert own.refresh()
    assert own.current == replace(parts.record, counter=first.counter + 1)


def test_it_stays_as_it_is_when_nothing_changed():
    parts = Parts()
    own = OwnRecord(parts.gather)
    before = own.current
    parts.record = replace(parts.record, counter=99)
    assert not own.refresh(), "the counter is not the parts' to set"
    assert own.current is before


def test_a_restarted_node_counts_on_above_what_it_has_published(monkeypatch):
    parts = Parts()
    own = OwnRecord(parts.gather)
    for index in range(50):
        parts.record = replace(parts.record, name=f"one {index}")
        own.refresh()
    a_second_later = time.time_ns() + 1_000_000_000
    monkeypatch.setattr(time, "time_ns", lambda: a_second_later)
    assert OwnRecord(parts.gather).current.counter > own.current.counter
