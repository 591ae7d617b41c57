"""Plans around pairs of nodes that cannot reach each other, against every way of leaving nodes out."""

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmd.partition.connected import neighbours_in, plan_connected
from swarmd.partition.costs import ModelCosts
from swarmd.partition.memory_weighted import plan
from swarmd.partition.plan import Capacity, DoesNotFit, Promise

MB = 1_000_000
COSTS = ModelCosts((10 * MB,) * 6, 0, 0, 0, 0)
PROMISES = [Promise(4096, 8192)]


def capacities(sizes):
    return [Capacity(name, "cpu", size * MB, name) for name, size in zip("abcde", sizes, strict=False)]


def pairs(*names):
    return frozenset(frozenset(name) for name in names)


def test_of_two_that_cannot_be_neighbours_the_smaller_stays_out():
    made = plan_connected(COSTS, PROMISES, capacities([40, 30, 25]), split=True, cut=pairs("ab"))
    assert [stage.node for stage in made.stages] == ["a", "c"]


def test_nobody_is_left_out_who_is_no_neighbour():
    made = plan(COSTS, PROMISES, capacities([40, 30, 25, 20]), split=True)
    order = [stage.node for stage in made.stages]
    far = pairs((order[0], order[2]))
    assert plan_connected(COSTS, PROMISES, capacities([40, 30, 25, 20]), split=True, cut=far) == made


def test_the_first_and_the_last_stage_are_neighbours_too():
    made = plan(COSTS, PROMISES, capacities([40, 30, 25]), split=True)
    assert neighbours_in(made, pairs((made.stages[0].node, made.stages[-1].node))) is not None


def test_if_nobody_can_be_spared_the_reason_names_the_pair():
    with pytest.raises(DoesNotFit, match="nodes a and b cannot reach each other") as caught:
        plan_connected(COSTS, PROMISES, capacities([40, 30]), cut=pairs("ab"))
    assert caught.value.missing == 20 * MB


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(10, 60), min_size=2, max_size=5),
    st.sets(st.sampled_from(list(combinations("abcde", 2))), max_size=3),
    st.booleans(),
)
def test_a_plan_has_no_bad_neighbours_and_is_found_if_one_exists(sizes, cut, split):
    there, bad = capacities(sizes), frozenset(frozenset(pair) for pair in cut)
    possible = []
    for count in range(1, len(there) + 1):
        for chosen in combinations(there, count):
            try:
                made = plan(COSTS, PROMISES, chosen, split=split)
            except DoesNotFit:
                continue
            if neighbours_in(made, bad) is None:
                possible.append(made)
    try:
        made = plan_connected(COSTS, PROMISES, there, split=split, cut=bad)
    except DoesNotFit:
        assert not possible
        return
    assert neighbours_in(made, bad) is None
    assert made.stages[0].start == 0
    assert made.stages[-1].end == 6
