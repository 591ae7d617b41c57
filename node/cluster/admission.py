"""Whether this node carries out an order: looks into the model's header before anything large is fetched or started."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from pathlib import Path

from swarmd.node.cluster.messages import StartStage
from swarmd.node.cluster.model_exchange import ModelExchange
from swarmd.node.cluster.order_limits import OrderLimits, Place
from swarmd.node.models.checkpoint import open_checkpoint
from swarmd.node.models.costs import model_costs
from swarmd.node.models.progress import ProgressCallback
from swarmd.node.serving.stage_host import StageKey
from swarmd.partition.costs import ModelCosts

_MOST_KNOWN = 16


class Admission:
    """Checks orders against `limits`, with the costs that the models' headers show."""

    def __init__(self, limits: OrderLimits, exchange: ModelExchange) -> None:
        self._limits = limits
        self._exchange = exchange
        self._costs: dict[str, ModelCosts] = {}

    async def check(
        self, key: StageKey, order: StartStage, present: Callable[[], Collection[StageKey]], progress: ProgressCallback
    ) -> None:
        """Raises OrderRefusedError when the order asks for too much, ModelFileError or OSError when the model cannot be
        looked into. `present` are the stages that run or start here; those that the order replaces do not count."""
        self._limits.check_numbers(order, {_place(other) for other in present() if other != key})
        costs = await self._costs_of(order, progress)
        others = [other for other in present() if other != key]
        staying = {_place(other) for other in others if order.beside or not key.replaces(other)}
        # What is only fetched will be started by another order, once there is room.
        self._limits.admit(order, costs, map(_place, [key, *others]), () if order.fetch_only else staying)

    async def _costs_of(self, order: StartStage, progress: ProgressCallback) -> ModelCosts:
        sha256 = order.model.sha256
        if sha256 not in self._costs:
            path = await self._exchange.header(order.model, progress)
            self._costs[sha256] = await asyncio.to_thread(_costs, path)
            while len(self._costs) > _MOST_KNOWN:
                del self._costs[next(iter(self._costs))]
        return self._costs[sha256]


def _costs(path: Path) -> ModelCosts:
    with open_checkpoint(path, sparse=True) as checkpoint:
        return model_costs(checkpoint)


def _place(key: StageKey) -> Place:
    return Place(key.instance, key.epoch, key.place)
