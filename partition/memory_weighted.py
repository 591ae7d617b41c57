"""Divide a model's layers among devices in proportion to their memory, within hard limits.

Pure: the same inputs, in any order, give the same plan. For each order of the devices the cuts are exact. Of the orders
those are searched that differ in who is first (it holds the embedding) and who is last (it holds the head); where the
others stand matters only if layers differ in size, and is searched for few devices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise, permutations

from swarmd.partition.costs import ModelCosts
from swarmd.partition.explain import explain_single, explain_split, explain_too_small
from swarmd.partition.plan import Capacity, DoesNotFit, Plan, PlannedStage, Promise

# 120 orders, some milliseconds, and only when nothing else fits.
MOST_PERMUTED = 5
# Two measurements of one machine differ by as much: a device that is that near to the fastest is as fast.
ABOUT_AS_FAST = 0.75


def plan(
    costs: ModelCosts, promises: Sequence[Promise], capacities: Sequence[Capacity], *, split: bool = False
) -> Plan:
    """The plan for the first of `promises` (best first) that the devices can hold.

    One device that holds the whole model is preferred, unless `split` asks for as many stages as make sense: an
    accelerator before a processor, then the one that reads its memory fastest, then the one with the most memory.
    Otherwise layers go in proportion to `memory`, the devices of one node next to each other wherever that fits; a
    device whose share is under one layer is left out when the others can do without it. Raises DoesNotFit, with the
    bytes missing for the last promise.
    """
    devices = sorted((c for c in capacities if c.memory > 0), key=lambda c: (-c.memory, c.node, c.device))
    for promise in promises:
        need = _Need(costs, promise)
        found = _plan_for(need, devices, split)
        if found is not None:
            stages, whole = found
            explain = explain_single if whole else explain_split
            return Plan(stages, promise, explain(stages, devices, promise, shrunk=promise != promises[0]))
    need = _Need(costs, promises[-1])
    missing = _missing_bytes(need, devices)
    raise DoesNotFit(missing, explain_too_small(need.whole(), missing, devices, promises[-1]))


class _Need:
    """Bytes that layers [start, end) need on one device, for one promise."""

    def __init__(self, costs: ModelCosts, promise: Promise) -> None:
        self.n_layers = costs.n_layers
        self._costs = costs
        kv = costs.kv_bytes_per_token * promise.kv_tokens
        self._before = [0, *accumulate(size + kv for size in costs.layer_bytes)]

    def __call__(self, start: int, end: int) -> int:
        first, last = start == 0, end == self.n_layers
        total = self._before[end] - self._before[start] + self._costs.workspace_bytes
        total += self._costs.embedding_bytes * first + self._costs.head_bytes * last
        return total - self._costs.shared_bytes * (first and last)

    def whole(self) -> int:
        return self(0, self.n_layers)

    def furthest_end(self, start: int, memory: int, stop: int) -> int:
        """The largest end in [start, stop] such that layers [start, end) fit; `start` itself when not even one does."""
        end = start
        while end < stop and self(start, end + 1) <= memory:
            end += 1
        # The head makes the last layer dearer than the ones before it, so stopping there once is right.
        return end

    def nearest_start(self, end: int, memory: int, stop: int) -> int:
        """The smallest start in [stop, end] such that layers [start, end) fit."""
        start = end
        while start > stop and self(start - 1, end) <= memory:
            start -= 1
        return start


def _plan_for(need: _Need, devices: list[Capacity], split: bool) -> tuple[tuple[PlannedStage, ...], bool] | None:
    all_of_it = need.whole()
    able = [device for device in devices if all_of_it <= device.memory]
    whole = (_stage(need, fastest(able), 0, need.n_layers),) if able else ()
    if whole and not split:
        return whole, True
    for group in _groups(need, devices):
        for order in _orders(group):
            cuts = _cuts(need, order)
            if cuts is not None:
                pairs = zip(order, cuts, cuts[1:], strict=False)
                return tuple(_stage(need, device, start, end) for device, start, end in pairs), False
    return (whole, True) if whole else None


def fastest(able: Sequence[Capacity]) -> Capacity:
    """Of devices that hold the whole model (most memory first) the one to use. A speed that is not known is no reason
    against a device.
    """
    rivals = [device for device in able if device.accelerator] or able
    enough = ABOUT_AS_FAST * max(device.bandwidth for device in rivals)
    return next(device for device in rivals if not device.bandwidth or device.bandwidth >= enough)


def _stage(need: _Need, device: Capacity, start: int, end: int) -> PlannedStage:
    return PlannedStage(device.node, device.device, start, end, need(start, end))


def _groups(need: _Need, devices: list[Capacity]) -> Iterator[list[Capacity]]:
    """Which devices to try together: all whose share is a layer or more, then fewer, then the weak ones as well."""
    total = sum(device.memory for device in devices)
    strong = sum(1 for device in devices if device.memory * need.n_layers >= total)
    most = min(len(devices), need.n_layers)
    strong = min(strong, most)
    for size in [*range(strong, 1, -1), *range(max(strong, 1) + 1, most + 1)]:
        yield devices[:size]


def _orders(group: list[Capacity]) -> Iterator[list[Capacity]]:
    """Most memory first; when that fails, other devices take the first and the last place, and then any place.

    Those orders come first in which the devices of each node stand together: between them nothing crosses the network.
    """
    for together in (True, False):
        for order in _orders_by_ends(group):
            if _nodes_stand_together(order) == together:
                yield order
        if len(group) <= MOST_PERMUTED:
            for order in permutations(group):
                if _nodes_stand_together(order) == together:
                    yield list(order)


def _orders_by_ends(group: list[Capacity]) -> Iterator[list[Capacity]]:
    """Every choice of the first and the last device; between them most memory first, each node's devices together."""
    size = len(group)
    for last in reversed(range(size)):
        for first in range(size):
            if first != last:
                middle = [device for index, device in enumerate(group) if index not in (first, last)]
                yield _with_mates(group[first], middle, group[last])


def _with_mates(first: Capacity, middle: Sequence[Capacity], last: Capacity) -> list[Capacity]:
    """The devices of one node next to each other, as far as the ends allow that."""
    nodes = [first.node, *(device.node for device in middle if device.node != last.node), last.node]
    place = {node: index for index, node in enumerate(dict.fromkeys(nodes))}
    return [first, *sorted(middle, key=lambda device: place[device.node]), last]


def _nodes_stand_together(order: Sequence[Capacity]) -> bool:
    runs = 1 + sum(1 for one, following in pairwise(order) if one.node != following.node)
    return runs == len({device.node for device in order})


def _cuts(need: _Need, order: list[Capacity]) -> list[int] | None:
    """Boundaries [0, ..., n_layers] nearest to the memory-weighted ones that keep every stage within its memory."""
    count, n_layers = len(order), need.n_layers
    lowest = _lowest_ends(need, order)
    if lowest is None:
        return None
    total = sum(device.memory for device in order)
    cuts, share = [0], 0
    for index, device in enumerate(order[:-1]):
        share += device.memory
        ideal = round(n_layers * share / total)
        low = max(lowest[index], cuts[-1] + 1)
        high = need.furthest_end(cuts[-1], device.memory, n_layers - (count - 1 - index))
        if low > high:
            return None
        cuts.append(min(max(ideal, low), high))
    return [*cuts, n_layers]


def _lowest_ends(need: _Need, order: list[Capacity]) -> list[int] | None:
    """For each stage but the last, the smallest end that leaves no more than the stages after it can hold."""
    ends, end = [], need.n_layers
    for index in range(len(order) - 1, 0, -1):
        start = need.nearest_start(end, order[index].memory, index)
        if start == end:
            return None
        ends.append(start)
        end = start
    return ends[::-1]


def _missing_bytes(need: _Need, devices: list[Capacity]) -> int:
    """How many bytes of the model are left over when the devices are filled, largest first, the head coming last."""
    start = 0
    for device in devices:
        start = need.furthest_end(start, device.memory, need.n_layers)
    if start == need.n_layers:
        # Filled only because a stage was left without room for its one layer: that layer is what is missing.
        start -= 1
    return need(start, need.n_layers)
