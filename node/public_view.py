"""What a daemon shows of itself over HTTP: an implementation of the API's `NodeView`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec

from swarmd.discovery.records import InstanceRecord, LoadRecord, NodeRecord
from swarmd.node.cluster.membership import MemberState
from swarmd.node.daemon import Daemon
from swarmd.node.metrics import Metrics
from swarmd.node.models.catalog import CATALOG, ModelNameError
from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.progress import Progress
from swarmd.node.serving.gateway import Prepared
from swarmd.node.serving.generation import Ending, GenerationError, GenerationRequest, Piece
from swarmd.node.version import VERSION

log = logging.getLogger("swarmd.api")


class PublicView:
    """The daemon, seen from its endpoint."""

    def __init__(self, daemon: Daemon) -> None:
        self.changed = daemon.changed
        self._daemon = daemon
        self._metrics = Metrics()
        self._first_seen: dict[str, int] = {}
        self._launches: set[asyncio.Task[InstanceRecord]] = set()

    async def prepare(self, request: GenerationRequest) -> Prepared:
        """The gateway's check of a request."""
        return await self._daemon.gateway.prepare(request)

    async def observe(self, prepared: Prepared) -> AsyncGenerator[Piece | Ending]:
        """The gateway's stream, counted."""
        async with (
            aclosing(self._daemon.gateway.stream(prepared)) as items,
            aclosing(self._metrics.observe(prepared.record.model.name, items)) as counted,
        ):
            async for item in counted:
                yield item

    def served_models(self) -> list[tuple[str, int]]:
        """Models with an instance, in the order of their names."""
        names = sorted({record.model.name for _, record in self._daemon.instances.all()})
        for name in names:
            self._first_seen.setdefault(name, int(time.time()))
        return [(name, self._first_seen[name]) for name in names]

    def progress(self) -> tuple[Progress, ...]:
        """Downloads under way here."""
        return self._daemon.progress.current

    def metrics(self) -> bytes:
        """Prometheus' text."""
        nodes = self._daemon.nodes()
        names = {record.id: record.model.name for _, record in self._daemon.instances.all()}
        loads = [(names[load.instance], load) for n in nodes for load in n.loads if load.instance in names]
        return self._metrics.render(loads, len(nodes))

    async def launch(self, name: str) -> str:
        """Have a model served; the name of its instance. A download goes on if the caller leaves."""
        task = asyncio.create_task(self._daemon.launcher.launch(name))
        self._launches.add(task)
        task.add_done_callback(self._launched)
        await asyncio.wait({task})
        try:
            return task.result().model.name
        except ModelNameError as error:
            raise GenerationError("model_not_found", str(error), param="model") from error
        except (ModelFileError, OSError, ValueError) as error:
            raise GenerationError("invalid_request", str(error), param="model") from error

    def _launched(self, task: asyncio.Task[InstanceRecord]) -> None:
        """Also when nobody waits any more, a failure is told."""
        self._launches.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("a model could not be started: %s", error)

    def swarm_state(self) -> dict[str, Any]:
        """Nodes, instances and models as this node sees them."""
        daemon = self._daemon
        own, *_ = daemon.nodes()
        members = daemon.mesh.membership.members.values()
        now = time.monotonic()
        nodes = [self._node(own, "alive", 0.0, None)]
        for member in sorted(members, key=lambda m: (m.record.name, m.record.id)):
            record = member.record
            state = "gone" if member.state is MemberState.GONE else member.state.value
            nodes.append(self._node(record, state, now - member.heard, daemon.mesh.rtt_ms.get(record.id)))
        loads = {load.instance: load for record in daemon.nodes() for load in record.loads}
        return {
            "self": daemon.node_id,
            "swarm": daemon.trust.swarm_tag,
            "version": VERSION,
            "nodes": nodes,
            "rotation": daemon.trust.rotations.phase,
            "evicted": [
                {"id": denial.node, "name": denial.name, "at": denial.at}
                for denial in sorted(daemon.trust.denials.all, key=lambda denial: denial.at)
                if denial.evicted
            ],
            "instances": [
                _instance(owner, record, loads.get(record.id, LoadRecord(record.id)))
                for owner, record in sorted(daemon.instances.all(), key=lambda pair: pair[1].model.name)
            ],
            "models": self._models(),
        }

    def _node(self, record: NodeRecord, state: str, silent: float, rtt_ms: float | None) -> dict[str, Any]:
        trust = self._daemon.trust
        pin = trust.pins.get(record.id)
        return {
            "id": record.id,
            "name": record.name,
            "state": state,
            "self": record.id == self._daemon.node_id,
            "addresses": [f"{a.host}:{a.port}" for a in record.addresses],
            "version": record.version,
            "first_seen": None if pin is None else pin.first_seen,
            "new": trust.pins.is_new(record.id, int(time.time())),
            "trouble": trust.trouble(record.id),
            "devices": [msgspec.structs.asdict(device) for device in record.devices],
            # In steps, so that the feed is quiet while nothing happens.
            "last_seen_s": float(int(silent)) if silent >= 2 else 0.0,
            "rtt_ms": None if rtt_ms is None else float(f"{rtt_ms:.1g}"),
        }

    def _models(self) -> list[dict[str, Any]]:
        here = {model.name: model.size for model in self._daemon.store.entries()}
        known = {entry.name: entry.size for entry in CATALOG} | here
        return [{"name": name, "size": size, "local": name in here} for name, size in sorted(known.items())]


def _instance(owner: str, record: InstanceRecord, load: LoadRecord) -> dict[str, Any]:
    progress = {"done_bytes": record.done_bytes, "total_bytes": record.total_bytes} if record.total_bytes else None
    return {
        "id": record.id,
        "model": record.model.name,
        "context": record.model.context,
        "state": record.state.value,
        "reason": record.reason,
        "epoch": record.epoch,
        "owner": owner,
        "stages": [
            {"node": s.node, "device": s.device, "start": s.start, "end": s.end, "bytes": s.bytes}
            for s in record.stages
        ],
        "explanation": list(record.explanation),
        "progress": progress,
        "load": {
            "running": load.running,
            "waiting": load.waiting,
            "kv_tokens_used": load.kv_tokens_used,
            "kv_tokens": load.kv_tokens,
        },
    }
