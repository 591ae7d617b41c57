"""What an order may ask of this node, whoever gives it: no more than its user allows. Pure.

An honest owner plans within what members publish, by the same costs, so nothing of this is ever met. It is here for one
that is not honest, or wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

from swarmd.node.cluster.messages import StartStage
from swarmd.partition.costs import ModelCosts
from swarmd.partition.units import format_bytes

MAX_STAGES = 16
"""Stage processes of one node, also those that are being started: each takes some 75 MB beside what is planned."""
MAX_CONTEXT = 1 << 24
MAX_KV_TOKENS = 1 << 28
# Costs are computed alike everywhere; this is for a difference of versions.
SLACK = 1.02


class OrderRefusedError(Exception):
    """An order that this node does not carry out; the message says why."""


class Place(NamedTuple):
    """A stage of a plan, whoever owns the plan."""

    instance: str
    epoch: int
    place: int

    @classmethod
    def of(cls, order: StartStage) -> Place:
        """The stage that an order is to bring about."""
        return cls(order.instance, order.epoch, order.index)


class OrderLimits:
    """Admits orders while they fit.

    `memory`: the bytes that models may take on each device of this node, as it publishes them.
    """

    def __init__(self, memory: Callable[[], Mapping[str, int]]) -> None:
        self._memory = memory
        self._taken: dict[Place, tuple[str, int]] = {}

    def check_numbers(self, order: StartStage, present: Collection[Place]) -> None:
        """Before anything is done for an order. `present` are the stages that run or start here and stay.

        Raises OrderRefusedError.
        """
        if len(present) >= MAX_STAGES:
            raise OrderRefusedError(f"this node has {len(present)} stages and takes no more than {MAX_STAGES}")
        if not 0 <= order.start < order.end:
            raise OrderRefusedError(f"layers {order.start} to {order.end} are no stage")
        if not 0 < order.context <= MAX_CONTEXT or not 0 < order.kv_tokens <= MAX_KV_TOKENS:
            raise OrderRefusedError(
                f"a context of {order.context} tokens and room for {order.kv_tokens} are more than any stage can hold"
            )

    def admit(self, order: StartStage, costs: ModelCosts, present: Iterable[Place], staying: Collection[Place]) -> None:
        """Before weights are fetched, when the model's header is here. `staying` are those of the stages `present` that
        the order does not replace.

        Raises OrderRefusedError.
        """
        limit = self._memory().get(order.device, 0)
        here = set(present)
        self._taken = {place: taken for place, taken in self._taken.items() if place in here}
        if order.end > costs.n_layers:
            raise OrderRefusedError(f"the model has {costs.n_layers} layers, not {order.end}")
        need = costs.stage_bytes(order.start, order.end, order.kv_tokens)
        place = Place.of(order)
        others = sum(
            bytes_
            for other, (device, bytes_) in self._taken.items()
            if other in staying and other != place and device == order.device
        )
        if need + others > limit * SLACK:
            held = f", and other stages take {format_bytes(others)} of it" if others else ""
            raise OrderRefusedError(
                f"the stage needs {format_bytes(need)}; models may take {format_bytes(limit)} on {order.device} of "
                f"this node (--memory){held}"
            )
        if not order.fetch_only:
            self._taken[place] = (order.device, need)
