"""What one more row costs, learnt from the times of steps."""

import random

import pytest

from swarmd.node.serving.draft_policy import DEFAULT_ROW_COST
from swarmd.node.serving.step_cost import LEAST_COST, MOST_ROWS, StepCost


def seen(steps, *, sequences=1, beside=0.0, alone=True) -> StepCost:
    cost = StepCost()
    for rows, compute_us in steps:
        cost.observe(rows, sequences, compute_us, compute_us + beside, alone=alone)
    return cost


def test_nothing_is_known_before_the_first_step():
    assert (StepCost().row_us, StepCost().step_us) == (0, 0)
    assert StepCost().row_cost == DEFAULT_ROW_COST


def test_until_steps_differ_in_size_a_row_is_taken_for_a_fifth_of_a_step():
    cost = seen([(1, 5000)] * 20)
    assert cost.row_us == pytest.approx(1000)
    assert cost.row_cost == pytest.approx(0.2)


@pytest.mark.parametrize("row_us", [50, 400, 2500])
def test_the_slope_is_found_in_noise(row_us):
    generator = random.Random(1)
    steps = [(rows, (4000 + rows * row_us) * generator.uniform(0.8, 1.25)) for rows in [1, 1, 3, 1, 9] * 40]
    assert seen(steps).row_us == pytest.approx(row_us, rel=0.25, abs=60)


def test_a_stage_that_stood_still_for_a_moment_changes_little():
    steps = [(rows, 4000 + rows * 400) for rows in [1, 5] * 40]
    assert seen([*steps, (5, 900_000)]).row_us < 700


def test_on_a_slow_link_a_row_costs_a_small_part_of_the_step():
    steps = [(rows, 4000 + rows * 1000) for rows in [1, 5] * 40]
    near, far = seen(steps), seen(steps, beside=20_000)
    assert near.row_cost == pytest.approx(0.2, rel=0.05)
    assert far.step_us == pytest.approx(25_000, rel=0.05)
    assert far.row_cost == pytest.approx(0.04, rel=0.1)


def test_where_steps_overlap_the_link_is_used_by_the_others():
    steps = [(rows, 4000 + rows * 1000) for rows in [1, 5] * 40]
    assert seen(steps, beside=20_000, alone=False).row_cost == pytest.approx(0.2, rel=0.05)


def test_a_row_holds_up_every_sequence_of_its_step():
    """Of four that decode together one gains by its guess, and all four wait for the row."""
    steps = [(rows, 4000 + rows * 1000) for rows in [4, 8] * 40]
    assert seen(steps, sequences=4).row_cost == pytest.approx(4 * 1000 / 8000, rel=0.05)


def test_large_steps_and_impossible_times_are_left_out():
    cost = seen([(1, 5000)] * 5)
    before = cost.row_us
    cost.observe(MOST_ROWS + 1, 1, 90_000, 90_000, alone=True)
    cost.observe(0, 0, 5000, 5000, alone=True)
    cost.observe(1, 1, 0, 5000, alone=True)
    assert cost.row_us == before


def test_a_row_is_never_free():
    cost = seen([(rows, 5000) for rows in [1, 9] * 100])
    assert cost.row_cost == LEAST_COST
