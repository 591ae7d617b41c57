"""What the driver's speculation counts, and that guesses follow the price of a row."""

import pytest

from swarmd.node.serving.drafting import NgramDrafter, PreparedDrafts
from swarmd.node.serving.messages import StepTimes
from swarmd.node.serving.speculation import Speculation

TEXT = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12] * 3


def guessed(compute_us: int, row_us: int, link_us: int, *, alone: bool = True) -> int:
    """Tokens guessed for a text that repeats, after steps with such times."""
    speculation = Speculation(NgramDrafter())
    for rows in (1, 5) * 100:
        times = StepTimes(compute_us + (rows - 1) * row_us)
        speculation.on_decoded(rows, 1, times, times.compute_us + link_us, alone=alone)
    return len(speculation.propose(1, TEXT, 12))


def test_what_was_guessed_and_what_was_right_is_counted():
    speculation = Speculation(NgramDrafter())
    first = speculation.propose(1, TEXT, 12)
    assert first == [1, 2, 3, 4, 5, 6, 7, 8][: len(first)]
    speculation.observe(1, 4, 3)
    speculation.observe(2, 2, 0)
    assert (speculation.drafted, speculation.accepted) == (6, 3)


def test_guesses_are_longer_where_links_are_slow():
    assert 0 < guessed(5000, 1500, 0) < guessed(5000, 1500, 60_000)
    assert guessed(5000, 1500, 60_000, alone=False) == guessed(5000, 1500, 0), "the others use the time"


def test_nothing_is_guessed_where_a_row_costs_a_step():
    assert guessed(5000, 5000, 0) == 0


def test_an_ended_sequence_is_forgotten():
    drafter = NgramDrafter()
    speculation = Speculation(drafter)
    speculation.propose(1, TEXT, 12)
    speculation.forget(1)
    assert len(drafter) == 0


@pytest.mark.parametrize("prepared", [False, True])
def test_it_says_whether_guesses_must_be_prepared(prepared):
    drafter = PreparedDrafts(NgramDrafter(), NgramDrafter()) if prepared else NgramDrafter()
    assert Speculation(drafter).prepared is (drafter if prepared else None)
