"""The daemon: the one place where the concrete parts of a node are put together."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine, Sequence

from msgspec import Struct

from swarmd.discovery.addresses import advertised, usable_addresses
from swarmd.discovery.mdns import MdnsDiscovery
from swarmd.discovery.records import ModelSummary, NodeRecord
from swarmd.node.cluster.admission import Admission
from swarmd.node.cluster.instances import Instances
from swarmd.node.cluster.launcher import Launcher
from swarmd.node.cluster.ledger import View
from swarmd.node.cluster.link_router import LinkRouter
from swarmd.node.cluster.membership import MemberChange, MemberState
from swarmd.node.cluster.mesh import Mesh
from swarmd.node.cluster.messages import DAEMON_MESSAGES, StageLost, StageProgress
from swarmd.node.cluster.model_exchange import ModelExchange
from swarmd.node.cluster.model_fronts import ModelFronts
from swarmd.node.cluster.order_limits import OrderLimits
from swarmd.node.cluster.own_record import OwnRecord
from swarmd.node.cluster.signal import Signal
from swarmd.node.cluster.stage_orders import StageOrders, deliver_over_link, order_over_link, reachable_first
from swarmd.node.cluster.trust import Trust
from swarmd.node.config import ConfigError, Settings
from swarmd.node.data_dir import DataDir
from swarmd.node.devices import DeviceError
from swarmd.node.drain import ties
from swarmd.node.hardware import Hardware
from swarmd.node.link_port import listen_for_links
from swarmd.node.models.catalog import ModelNameError
from swarmd.node.models.draft import bring_draft
from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.store import ModelStore
from swarmd.node.models.wheel_source import ModelSourceError
from swarmd.node.progress_board import ProgressBoard
from swarmd.node.serving.driver_links import DriverLinks
from swarmd.node.serving.gateway import Gateway
from swarmd.node.serving.messages import TrustChanged
from swarmd.node.serving.stage_host import StageHost
from swarmd.node.version import VERSION
from swarmd.transport.endpoint import Endpoint
from swarmd.transport.identity import Credentials
from swarmd.transport.link import PROTOCOL_VERSION, Hello, Vocabulary

log = logging.getLogger("swarmd")

TICK_SECONDS = 0.5


class Daemon:
    """One node at work. `start`, then `close`; the HTTP server is given the daemon's public parts."""

    def __init__(self, settings: Settings, data_dir: DataDir, credentials: Credentials) -> None:
        self.settings = settings
        self.node_id = credentials.node_id
        self.changed = Signal()
        self.progress = ProgressBoard(self.changed)
        self.hardware = Hardware(memory=settings.memory, threads=settings.threads, kernels=settings.kernels)
        self.store = ModelStore(data_dir.models)
        self.link_port = 0
        self._data_dir = data_dir
        self._credentials = credentials
        self._stored: tuple[ModelSummary, ...] = ()
        self._leaving = False
        self._closing = False
        self._mdns: MdnsDiscovery | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._build_stages()
        self._build_instances()
        self._build_links()

    def _build_stages(self) -> None:
        settings = self.settings
        self.exchange = ModelExchange(self.store, lambda: self.mesh)
        self.orders = StageOrders(
            self.node_id,
            lambda: self.mesh,
            self.exchange,
            devices=lambda: self.hardware.ids,
            threads=self.hardware.threads,
            kernels=settings.kernels,
            speculate=settings.speculate,
            hosts=usable_addresses,
            deliver=self._deliver,
        )
        self.host = StageHost(
            self._data_dir.path,
            settings.name,
            lambda: self.link_port,
            on_lost=self.orders.on_lost,
            on_progress=self.orders.on_progress,
            on_load=self._refresh,
            keeps_spare=True,
        )
        self.orders.host = self.host
        self.orders.admission = Admission(OrderLimits(lambda: self.hardware.limits), self.exchange)

    def _build_instances(self) -> None:
        settings = self.settings
        self.instances = Instances(
            self.node_id,
            self.view,
            self._order,
            self._refresh,
            wire_dtype=settings.wire_dtype,
            split=settings.split,
        )
        self.launcher = Launcher(
            self.store,
            self.exchange,
            self.instances,
            self.changed,
            self._refresh,
            context=settings.context,
            progress=self.progress.report,
        )

    def _build_links(self) -> None:
        router = LinkRouter(self.node_id, self.host, self.orders, self.exchange, self.instances)
        self.endpoint = Endpoint(self._credentials, Vocabulary(DAEMON_MESSAGES), router, hello=self._hello)
        self.mesh = Mesh(self.endpoint, self._credentials.swarm_tag, lambda: self._own.current, self._on_members)
        router.mesh = self.mesh
        path, name = self._data_dir.path, self.settings.name
        self.trust = router.trust = Trust(
            path, self._credentials, self.endpoint, self.mesh, name=name, on_changed=self._on_trust
        )
        self._own = OwnRecord(self._gather)
        self._driver_links = DriverLinks(
            self.endpoint, lambda node, found: reachable_first(self.node_id, self.mesh, node, found)
        )
        self._fronts = ModelFronts(self.exchange, self.progress.report)
        self.gateway = Gateway(
            self.launcher.find, self.launcher.launch, self._driver_links.get, self._fronts.of, self.changed
        )

    async def start(self) -> None:
        """Listen for links, announce this node and begin to serve.

        Raises ConfigError when a device, a port or the draft model cannot be had.
        """
        try:
            await self.hardware.find(self.settings.device)
        except DeviceError as error:
            raise ConfigError(str(error)) from None
        await self._bring_draft_model()
        self.link_port = await listen_for_links(self.endpoint, self.settings.port)
        self.mesh.add_static(self.settings.peers)
        if self.settings.mdns:
            self._mdns = MdnsDiscovery(
                self.node_id, self.trust.swarm_tag, PROTOCOL_VERSION, self.link_port, self.mesh.on_sighting
            )
            await self._mdns.start()
        self._refresh()
        self._run(self.mesh.run())
        self._run(self._tick())
        self._run(self._calibrate())
        if self.settings.model != "none":
            self._run(self.launcher.keep_served(self.settings.model, self.nodes, self.node_id))

    def leave(self) -> None:
        """Say that this node goes: what runs here is moved, and nothing new is taken."""
        self._leaving = self.gateway.leaving = True
        self._refresh()
        self.instances.reconsider()

    def ties(self) -> str:
        """What still keeps a node that leaves, in words; nothing once it may go."""
        heirs = any(not node.leaving for node in self.mesh.membership.alive())
        return ties(self.node_id, self.instances.all() if heirs else [], self.gateway.streams)

    async def close(self) -> None:
        """Tell the members, end the stages, and close everything; also after a start that failed half-way."""
        self._leaving = self._closing = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._own.refresh()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.mesh.publish(), 1)
        self.trust.tick()  # who was met just now is to be remembered
        await self.instances.close()
        if self._mdns is not None:
            await self._mdns.close()
        await self.trust.close()
        await self.host.close()
        await self._fronts.close()
        await self.mesh.close()
        await self.endpoint.close()

    def nodes(self) -> list[NodeRecord]:
        """The records of all nodes that are alive, this one first."""
        return [self._own.current, *self.mesh.membership.alive()]

    def view(self) -> View:
        """What this node sees of the swarm."""
        membership = self.mesh.membership
        return View(self.nodes(), membership.suspects(), membership.gone())

    async def _bring_draft_model(self) -> None:
        name = self.settings.draft_model
        if name is None or not self.settings.speculate:
            return
        try:
            draft = await bring_draft(self.store, name, self.progress.report)
            self.hardware.take(draft.bytes, "it")
        except (ModelNameError, ModelFileError, ModelSourceError, OSError, MemoryError) as error:
            raise ConfigError(f"--draft-model {name}: {error}") from None
        self.orders.draft_path = draft.path

    def _hello(self) -> Hello:
        return Hello(PROTOCOL_VERSION, "daemon", self.settings.name, VERSION)

    def _gather(self) -> NodeRecord:
        return NodeRecord(
            id=self.node_id,
            name=self.settings.name,
            version=VERSION,
            counter=0,
            addresses=advertised(usable_addresses(), self.link_port) if self.link_port else (),
            devices=self.hardware.devices,
            models=self._stored,
            instances=self.instances.owned,
            loads=self.host.loads,
            launching=self.launcher.launching,
            leaving=self._leaving,
            wire_dtype=self.settings.wire_dtype,
            follows=self.instances.follows(self.mesh.membership.alive()),
            cut_off=self.mesh.membership.cut_off(),
        )

    def _refresh(self) -> None:
        """Something that this node publishes may have changed: tell the members and whoever waits here."""
        if self._own.refresh():
            self._run(self.mesh.publish())
        self.changed.notify()

    def _on_members(self, changes: Sequence[MemberChange]) -> None:
        if self._closing:
            return
        self.trust.on_members(changes)
        for change in changes:
            if change.heard_again:
                self.instances.on_heard_again(change.node_id)
            if change.state is MemberState.GONE:
                if change.node_id in self.mesh.membership.cut_off():
                    self.instances.on_gone(change.node_id)
                self._run(self._driver_links.hang_up(change.node_id))
        self.instances.reconsider()
        self._run(self.launcher.take_over())
        self._refresh()

    def _on_trust(self, members: tuple[str, ...] | None) -> None:
        """Whom this node trusts has changed: its stage processes follow, and so does what it announces."""
        self.host.tell(TrustChanged(members))
        if self._mdns is not None:
            self._mdns.rename(self.trust.swarm_tag)
        self.changed.notify()

    async def _tick(self) -> None:
        while True:
            self._stored = tuple(ModelSummary(m.name, m.sha256, m.size, 0, "") for m in self.store.entries()[:256])
            self.trust.tick()
            self._refresh()
            self.instances.reconsider()
            self._run(self.launcher.take_over())
            await self.orders.prune(self.instances.claims(), time.monotonic())
            await asyncio.sleep(TICK_SECONDS)

    async def _calibrate(self) -> None:
        await self.hardware.calibrate(self._data_dir.path)
        self._refresh()

    async def _order(self, node: str, order: Struct, seconds: float | None) -> Struct:
        if node == self.node_id:
            async with asyncio.timeout(seconds):
                return await self.orders.carry_out(self.node_id, order)
        return await order_over_link(self.mesh, node, order, seconds)

    def _deliver(self, owner: str, report: Struct) -> None:
        if owner != self.node_id:
            self._run(deliver_over_link(self.mesh, owner, report))
        elif isinstance(report, StageProgress | StageLost) and not self._closing:
            self.instances.on_report(self.node_id, report)

    def _run(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a task of the daemon failed", exc_info=error)
