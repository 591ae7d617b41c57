"""Stop strings: nothing of one is shown, and how the stream is cut makes no difference."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmd.node.models.stop_strings import StopMatcher

pieces_of_text = st.lists(st.text("abc", max_size=5), max_size=12)
stop_lists = st.lists(st.text("abc", min_size=1, max_size=4), max_size=4)


def run(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    matcher = StopMatcher(stops)
    shown, stopped = "", False
    for piece in pieces:
        emitted, stopped = matcher.push(piece)
        shown += emitted
    return shown + matcher.flush(), stopped


@given(pieces_of_text, stop_lists)
def test_shown_is_what_stands_before_the_first_complete_stop_string(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    shown, stopped = run(pieces, stops)
    ends = [n for n in range(len(text) + 1) if any(text[:n].endswith(s) for s in stops)]
    assert stopped == bool(ends)
    if not ends:
        assert shown == text
    else:
        longest = max(len(s) for s in stops if text[: ends[0]].endswith(s))
        assert shown == text[: ends[0] - longest]


@given(pieces_of_text, stop_lists)
def test_no_more_is_held_back_than_could_become_a_stop_string(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    pushed = shown = ""
    for piece in pieces:
        emitted, stopped = matcher.push(piece)
        pushed, shown = pushed + piece, shown + emitted
        if stopped:
            return
        held = pushed[len(shown) :]
        assert pushed.startswith(shown)
        assert held == "" or any(s.startswith(held) and s != held for s in stops)


def test_after_the_stop_nothing_more_is_shown() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("one END two") == ("one ", True)
    assert matcher.push("three") == ("", True)
    assert matcher.flush() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopMatcher(["a", ""])
