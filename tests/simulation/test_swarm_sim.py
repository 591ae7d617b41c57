"""Whole swarms in virtual time, through seeded faults: one live epoch per instance, and no request without an end.

`make simulate` runs as many schedules as one likes; here are a few, and what is said of swarms whose rules are broken.
"""

from contextlib import ExitStack
from unittest.mock import patch

import pytest
from support.virtual_swarm.schedule import run

from swarmd.node.cluster.ledger import Ledger
from swarmd.node.cluster.stage_orders import StageOrders
from swarmd.node.serving.driver import Driver
from swarmd.node.serving.recovery import Recovery


@pytest.mark.parametrize(("seed", "nodes"), [(seed, 20 + seed) for seed in range(1, 9)])
def test_a_swarm_comes_to_rest_with_one_epoch_per_instance_and_every_request_ends(seed, nodes):
    result = run(seed, nodes)
    assert result.wrong == [], result.events
    assert result.outcomes["done"] > 0, "some answers are whole"
    assert result.faults["part"]
    assert result.faults["loss"]


def test_so_does_a_swarm_of_two_hundred_nodes():
    result = run(2, 200)
    assert result.wrong == [], result.events
    assert result.outcomes["done"] > 0, "some answers are whole"
    assert result.counts["links made again"] > 200


def test_a_schedule_is_the_same_again():
    first, again = run(7, 20), run(7, 20)
    assert (first.events, first.outcomes, first.counts) == (again.events, again.outcomes, again.counts)


async def nothing_ends(*_):
    """Instead of `prune`."""


@pytest.mark.parametrize(
    ("rules", "complaint"),
    [
        ([(Ledger, "yield_to_winners", lambda *_: [])], ": owned by ["),
        ([(StageOrders, "prune", nothing_ends)], ": stages ["),
        ([(Driver, "fail", lambda *_: None), (Recovery, "abandon", lambda *_: False)], " hung at "),
    ],
    ids=["owners never yield", "stages are never pruned", "nobody hears of a driver's end"],
)
def test_a_rule_that_is_broken_is_noticed(rules, complaint):
    with ExitStack() as broken:
        for where, name, instead in rules:
            broken.enter_context(patch.object(where, name, instead))
        assert any(complaint in line for seed in range(1, 13) for line in run(seed, 20).wrong)
