"""How many steps are in flight, how sequences are shared among them, and what the times of steps teach."""

import pytest

from swarmd.node.serving.depth import DepthMeter, pipeline_depth
from swarmd.node.serving.in_flight import StepsInFlight
from swarmd.node.serving.messages import Chunk, StepTimes


@pytest.mark.parametrize(
    ("n_stages", "rounds", "depth"),
    [
        (1, 1.0, 1),
        (1, 1.2, 1),
        (1, 2.0, 2),
        (1, 50.0, 4),
        (2, 2.0, 2),
        (2, 2.2, 2),
        (2, 2.5, 2),
        (2, 2.6, 3),
        (2, 4.0, 4),
        (2, 100.0, 6),
        (4, 1.5, 4),
    ],
)
def test_steps_fill_the_round_of_one_step(n_stages, rounds, depth):
    """At least one for each stage, at most twice that and two; a small gap is not worth one more."""
    assert pipeline_depth(n_stages, rounds) == depth


def test_the_meter_starts_with_one_step_for_each_stage_and_follows_slow_links():
    meter = DepthMeter(2)
    assert meter.depth == 2
    for _ in range(100):
        meter.observe(StepTimes(compute_us=4000, slowest_us=2000, wait_us=500), round_trip_us=10_500)
    assert meter.depth == 5, "4 ms of computing and 6 ms of links make five steps of 2 ms"
    for _ in range(100):
        meter.observe(StepTimes(compute_us=4000, slowest_us=2000, wait_us=0), round_trip_us=4100)
    assert meter.depth == 2


def test_waiting_in_line_is_no_reason_for_more_steps():
    meter = DepthMeter(2)
    for _ in range(100):
        meter.observe(StepTimes(compute_us=4000, slowest_us=2000, wait_us=20_000), round_trip_us=24_200)
    assert meter.depth == 2


def test_one_step_that_something_held_up_changes_nothing():
    meter = DepthMeter(2)
    meter.observe(StepTimes(compute_us=4000, slowest_us=2000, wait_us=0), round_trip_us=3_000_000)
    assert meter.depth == 2


def test_steps_that_nobody_has_timed_teach_nothing():
    meter = DepthMeter(3)
    for _ in range(50):
        meter.observe(StepTimes(), round_trip_us=9e6)
    assert meter.depth == 3


def sampled(count):
    return [Chunk(seq, 5, (1,), 1) for seq in range(count)]


def test_shares_come_out_even_as_steps_return():
    """Ten sequences in four steps: 3, 3, 2, 2."""
    steps = StepsInFlight(4)
    sizes = []
    for _ in range(4):
        sizes.append(steps.share(10))
        steps.begin([], sampled(sizes[-1]), ())
    assert (sizes, steps.full) == ([3, 3, 2, 2], True)


def test_a_lopsided_pipeline_evens_out():
    """Five and one became so as others ended; when the five come back, three go on and two wait for the one."""
    steps = StepsInFlight(2)
    five, one = (steps.begin([], sampled(count), ()).step for count in (5, 1))
    steps.returned(five, StepTimes(), 0.0)
    assert steps.share(6) == 3
    steps.begin([], sampled(3), ())
    steps.returned(one, StepTimes(), 0.0)
    assert steps.share(6) == 3


def test_a_failure_taints_what_was_in_flight_and_nothing_later():
    steps = StepsInFlight(3)
    first, second, third = (steps.begin([], sampled(1), ()).step for _ in range(3))
    assert steps.failed(first) is not None
    later = steps.begin([], sampled(1), ()).step
    steps.returned(second, StepTimes(), 0.0)
    found = steps.failed(third)
    assert found is not None
    assert found[1]
    following = steps.begin([], sampled(1), ()).step
    assert steps.failed(third) is None
    tainted = steps.failed(later)
    untouched = steps.failed(following)
    assert tainted is not None
    assert tainted[1], "it was in flight when the third failed"
    assert untouched is not None
    assert untouched[1]
    fresh = steps.failed(steps.begin([], sampled(1), ()).step)
    assert fresh is not None
    assert not fresh[1]
