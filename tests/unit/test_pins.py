"""The nodes that were ever met: a new one is told, a name that changes hands is a warning, and the list is bounded."""

from __future__ import annotations

import pytest

from swarmd.node.cluster.pin_file import load_pins, save_pins
from swarmd.node.cluster.pins import MAX_PINS, NEW_SECONDS, Pin, Pins, find

OWN, A, B = "0" * 64, "a" * 64, "b" * 64


def texts(pins: Pins, node_id: str, name: str, now: int = 0) -> list[str]:
    return [notice.text for notice in pins.meet(node_id, name, now)]


def test_a_node_is_new_once():
    pins = Pins(OWN, "here")
    assert texts(pins, A, "gamer", 100) == ["new node gamer (aaaaaaaaaaaa) joined; it was never seen before"]
    assert texts(pins, A, "gamer", 200) == []
    again = Pins(OWN, "here", pins.file.nodes)
    assert texts(again, A, "gamer", 300) == [], "known from before the restart"
    assert again.is_new(A, 100 + NEW_SECONDS - 1)
    assert not again.is_new(A, 100 + NEW_SECONDS)
    assert not again.is_new(B, 0)


def test_a_known_id_under_another_name_is_told():
    pins = Pins(OWN, "here")
    pins.meet(A, "gamer", 0)
    assert texts(pins, A, "attic", 5) == ["node aaaaaaaaaaaa, known as gamer, now calls itself attic"]
    assert pins.get(A) == Pin(A, "attic", 0, 5)


def test_a_known_name_under_another_key_is_a_warning_until_the_first_is_evicted():
    pins = Pins(OWN, "here")
    pins.meet(A, "gamer", 0)
    new, warning = pins.meet(B, "gamer", 10)
    assert (new.grave, warning.grave) == (False, True)
    assert "gamer was known as aaaaaaaaaaaa, now another key, bbbbbbbbbbbb, says that name" in warning.text
    assert "swarmd evict aaaaaaaaaaaa" in warning.text
    assert pins.trouble(B) == warning.text
    assert pins.trouble(A) == "", "who had the name first is not to blame"
    assert pins.trouble(B, evicted={A}) == ""


def test_this_nodes_own_name_is_taken():
    pins = Pins(OWN, "here")
    assert "says the name of this node itself" in texts(pins, A, "here")[1]
    assert pins.trouble(A)


def test_names_are_one_short_line():
    pins = Pins(OWN, "here")
    [text] = texts(pins, A, "x\n" + "y" * 500)
    assert text.isprintable()
    assert len(text) < 200


def test_who_was_not_seen_for_longest_is_forgotten():
    pins = Pins(OWN, "here", [Pin(f"{n:064x}", f"n{n}", n, n) for n in range(MAX_PINS)])
    pins.meet(A, "gamer", 10**6)
    assert len(pins.file.nodes) == MAX_PINS
    assert pins.get(f"{0:064x}") is None
    assert pins.get(A)


def test_it_is_to_be_kept_when_something_changed_and_seldom_because_of_time():
    pins = Pins(OWN, "here")
    pins.meet(A, "gamer", 0)
    assert pins.changed
    pins.changed = False
    pins.meet(A, "gamer", 60)
    assert not pins.changed
    pins.meet(A, "gamer", 7200)
    assert pins.changed


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [("gamer", [A]), ("aaaa", [A]), ("AAAA", [A]), ("aaa", []), ("twin", [B, "c" * 64]), ("none", [])],
)
def test_a_person_means_a_name_or_the_beginning_of_an_id(wanted, expected):
    pins = [Pin(A, "gamer", 0, 0), Pin(B, "twin", 0, 0), Pin("c" * 64, "twin", 0, 0)]
    assert [pin.id for pin in find(pins, wanted)] == expected


def test_the_file_comes_back_and_a_damaged_one_is_named(tmp_path, caplog):
    pins = Pins(OWN, "here")
    pins.meet(A, "gamer", 7)
    save_pins(tmp_path, pins.file)
    assert load_pins(tmp_path) == pins.file
    assert load_pins(tmp_path / "nowhere").nodes == ()
    for damage in (b"{", b'{"nodes": [{"id": "x"}]}', b"\xff"):
        (tmp_path / "nodes.json").write_bytes(damage)
        assert load_pins(tmp_path).nodes == ()
    assert len([r for r in caplog.records if "every node counts as new" in r.getMessage()]) == 3
