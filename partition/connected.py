"""Plans whose ring never puts two nodes next to each other that cannot reach each other. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from swarmd.partition.costs import ModelCosts
from swarmd.partition.memory_weighted import plan
from swarmd.partition.plan import Capacity, DoesNotFit, Plan, Promise

Pair = frozenset[str]
"""Two node ids."""

# Each costs two plans; a swarm with more broken links than that inside one ring is left to its own.
MOST_SPLIT_PAIRS = 6


def plan_connected(
    costs: ModelCosts,
    promises: Sequence[Promise],
    capacities: Sequence[Capacity],
    *,
    split: bool = False,
    cut: frozenset[Pair] = frozenset(),
) -> Plan:
    """As `memory_weighted.plan`; of a pair in `cut` that would be neighbours in the ring, one node is left out.

    Of the two ways that one is taken which keeps the better promise, then the one with more memory. Raises DoesNotFit.
    """
    return _plan(costs, promises, capacities, split, cut, MOST_SPLIT_PAIRS)


def _plan(
    costs: ModelCosts,
    promises: Sequence[Promise],
    capacities: Sequence[Capacity],
    split: bool,
    cut: frozenset[Pair],
    depth: int,
) -> Plan:
    made = plan(costs, promises, capacities, split=split)
    bad = neighbours_in(made, cut)
    if bad is None:
        return made
    one, other = sorted(bad)
    if not depth:
        raise DoesNotFit(0, f"too many nodes cannot reach each other, {one[:12]} and {other[:12]} among them")
    found: list[tuple[int, int, Plan]] = []
    lacking: list[DoesNotFit] = []
    for left_out in (one, other):
        rest = [capacity for capacity in capacities if capacity.node != left_out]
        try:
            without = _plan(costs, promises, rest, split, cut, depth - 1)
        except DoesNotFit as error:
            lacking.append(error)
            continue
        found.append((promises.index(without.promise), -sum(capacity.memory for capacity in rest), without))
    if not found:
        least = min(lacking, key=lambda error: error.missing)
        reason = f"{least} (nodes {one[:12]} and {other[:12]} cannot reach each other)"
        raise DoesNotFit(least.missing, reason)
    return min(found, key=lambda way: way[:2])[2]


def neighbours_in(made: Plan, cut: frozenset[Pair]) -> Pair | None:
    """A pair of `cut` that stands next to each other in a plan's ring, or None."""
    nodes = [stage.node for stage in made.stages]
    ring = pairwise([*nodes, nodes[0]])
    return next((pair for pair in map(frozenset, ring) if pair in cut), None)
