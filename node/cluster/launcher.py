"""Bringing models up: from a name to an instance that this node owns, and taking over what an owner left behind."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

from swarmd.discovery.records import InstanceRecord, ModelSummary, NodeRecord
from swarmd.node.cluster.instances import Instances
from swarmd.node.cluster.model_exchange import ModelExchange
from swarmd.node.cluster.signal import Signal
from swarmd.node.models.catalog import ModelNameError, resolve
from swarmd.node.models.checkpoint import open_checkpoint
from swarmd.node.models.costs import model_costs
from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.progress import ProgressCallback
from swarmd.node.models.store import ModelStore
from swarmd.partition.costs import ModelCosts
from swarmd.partition.plan import Promise

log = logging.getLogger("swarmd.instances")

SETTLE_SECONDS = 1.5
RANK_SECONDS = 3.0
RETRY_SECONDS = 15.0
# When its owner is lost, nobody here knows the instance until an heir has it; others still go by the old claim.
HEIR_SECONDS = 10.0
DEFAULT_CONTEXT = 4096
SMALLEST_CONTEXT = 1024


class Launcher:
    """Starts instances.

    `announce` is called when `launching` changes. `context` is the longest sequence to promise, in tokens, None for
    the default; `progress` hears of downloads.
    """

    def __init__(
        self,
        store: ModelStore,
        exchange: ModelExchange,
        instances: Instances,
        changed: Signal,
        announce: Callable[[], None],
        *,
        context: int | None,
        progress: ProgressCallback,
    ) -> None:
        self._store = store
        self._exchange = exchange
        self._instances = instances
        self._changed = changed
        self._announce = announce
        self._context = context
        self._progress = progress
        self._lock = asyncio.Lock()
        self._launching: set[str] = set()
        self._inheriting: set[str] = set()

    @property
    def launching(self) -> tuple[str, ...]:
        """The models that this node is bringing, by the names that were asked for."""
        return tuple(sorted(name[:128] for name in self._launching))

    def find(self, name: str) -> InstanceRecord | None:
        """The instance that serves a model name (or alias, or path), anywhere in the swarm."""
        try:
            ref = resolve(name)
            names = {name, ref.name}
        except ModelNameError:
            names = {name}
        return next((record for _, record in self._instances.all() if record.model.name in names), None)

    def is_claimed(self, name: str) -> bool:
        """Whether anybody serves a model, as far as anybody here has heard."""
        return self.find(name) is not None or any(claim.model == name for claim in self._instances.claims().values())

    async def launch(self, name: str) -> InstanceRecord:
        """The instance of a model, started by this node if nobody serves it yet.

        One that others know of and this node does not is waited for: it changes hands, or is out of reach.
        Raises ModelNameError, ModelFileError, ModelSourceError, OSError.
        """
        await self._until_known(name)
        async with self._lock:
            found = self.find(name)
            if found is not None:
                return found
            if self.is_claimed(name):
                raise ModelFileError(
                    f"{name} is served by a node that this one cannot reach; ask another node, or see `swarmd doctor`"
                )
            self._launching.add(name)
            self._announce()
            try:
                stored = await self._store.ensure(name, self._progress)
                manifest = await self._store.manifest(stored)
                model, costs = await asyncio.to_thread(
                    _read_model, stored.path, stored.name, stored.sha256, stored.size
                )
                return self._instances.own(model, costs, promises(self._context, model.context), manifest)
            finally:
                self._launching.discard(name)
                self._announce()

    async def _until_known(self, name: str) -> None:
        deadline = time.monotonic() + HEIR_SECONDS
        while self.find(name) is None and self.is_claimed(name) and (left := deadline - time.monotonic()) > 0:
            await self._changed.wait(left)

    async def take_over(self) -> None:
        """Become the owner of what lost nodes owned and leaving ones hand over, where that falls to this node."""
        for record in self._instances.orphans():
            if record.id in self._inheriting:
                continue
            self._inheriting.add(record.id)
            try:
                manifest = await self._exchange.manifest(record.model)
                path = await self._exchange.header(manifest, self._progress)
                model, costs = await asyncio.to_thread(
                    _read_model, path, record.model.name, record.model.sha256, record.model.size
                )
                self._instances.take_over(record, costs, promises(self._context, model.context), manifest)
            except (ModelFileError, OSError, ValueError) as error:
                log.warning("%s cannot be taken over: %s", record.model.name, error)
            finally:
                self._inheriting.discard(record.id)

    async def keep_served(self, name: str, nodes: Callable[[], list[NodeRecord]], own_id: str) -> None:
        """See to it that somebody serves a model, for ever.

        Of the `nodes` alive the first in rank acts at once, the others only if it does not.
        """
        await asyncio.sleep(SETTLE_SECONDS)
        missing_since = time.monotonic()
        launched = ""  # the instance's id: one that was launched by a path goes by another name
        while True:
            others = [node for node in nodes() if node.id != own_id]
            there = self.is_claimed(name) or any(record.id == launched for _, record in self._instances.all())
            if there or any(name in node.launching for node in others):
                missing_since = time.monotonic()
            elif time.monotonic() - missing_since >= _rank(name, nodes(), own_id) * RANK_SECONDS:
                try:
                    launched = (await self.launch(name)).id
                except (ModelNameError, ModelFileError, OSError) as error:
                    log.error("%s cannot be served: %s", name, error)
                    await asyncio.sleep(RETRY_SECONDS)
            await self._changed.wait(RANK_SECONDS)


def _rank(name: str, nodes: list[NodeRecord], own_id: str) -> int:
    """A node's place among those that could launch a model: who holds it comes first, then the lower id."""
    ranked = sorted((all(model.name != name for model in node.models), node.id) for node in nodes)
    return [node_id for _, node_id in ranked].index(own_id)


def promises(wanted: int | None, most: int) -> list[Promise]:
    """What to promise, best first: the context wanted, as far as the model goes; by default less while memory is short.

    KV room is for two sequences of full length, or correspondingly more short ones.
    """
    context = min(wanted or DEFAULT_CONTEXT, most)
    made = [Promise(context, 2 * context)]
    while wanted is None and context // 2 >= SMALLEST_CONTEXT:
        context //= 2
        made.append(Promise(context, 2 * context))
    return made


def _read_model(path: Path, name: str, sha256: str, size: int) -> tuple[ModelSummary, ModelCosts]:
    with open_checkpoint(path, sparse=True) as checkpoint:
        spec = checkpoint.spec
        return ModelSummary(name, sha256, size, spec.context_length, spec.architecture), model_costs(checkpoint)
