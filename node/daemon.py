"""The daemon: the one place where the concrete parts of a node are put together."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
from collections.abc import Coroutine, Sequence

from msgspec import Struct

from swarmd.discovery.addresses import advertised, usable_addresses
from swarmd.discovery.mdns import MdnsDiscovery
from swarmd.discovery.records import InstanceRecord, ModelSummary, NodeRecord
from swarmd.node.cluster.instances import Instances
from swarmd.node.cluster.launcher import Launcher
from swarmd.node.cluster.link_router import LinkRouter
from swarmd.node.cluster.membership import MemberChange, MemberState
from swarmd.node.cluster.mesh import Mesh
from swarmd.node.cluster.messages import DAEMON_MESSAGES, StageLost, StageProgress
from swarmd.node.cluster.model_exchange import ModelExchange
from swarmd.node.cluster.own_record import OwnRecord
from swarmd.node.cluster.signal import Signal
from swarmd.node.cluster.stage_orders import StageOrders, deliver_over_link, reachable_first
from swarmd.node.cluster.trust import Trust
from swarmd.node.config import ConfigError, Settings
from swarmd.node.data_dir import DataDir
from swarmd.node.devices import DeviceError
from swarmd.node.hardware import Hardware
from swarmd.node.models.catalog import ModelNameError
from swarmd.node.models.draft import bring_draft
from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.store import ModelStore
from swarmd.node.models.text_process import ModelText
from swarmd.node.models.wheel_source import ModelSourceError
from swarmd.node.options import DEFAULT_LINK_PORT
from swarmd.node.progress_board import ProgressBoard
from swarmd.node.serving.driver_links import DriverLinks
from swarmd.node.serving.gateway import Gateway
from swarmd.node.serving.messages import TrustChanged
from swarmd.node.serving.stage_host import StageHost
from swarmd.node.version import VERSION
from swarmd.transport.endpoint import Endpoint
from swarmd.transport.identity import Credentials
from swarmd.transport.link import PROTOCOL_VERSION, Hello, LinkClosed, Vocabulary

log = logging.getLogger("swarmd")

TICK_SECONDS = 0.5


class Daemon:
    """One node at work. `start`, then `close`; the HTTP server is given the daemon's public parts."""

    def __init__(self, settings: Settings, data_dir: DataDir, credentials: Credentials) -> None:
        self.settings = settings
        self.node_id = credentials.node_id
        self.swarm_tag = credentials.swarm_tag
        self.changed = Signal()
        self.progress = ProgressBoard(self.changed)
        self.hardware = Hardware(memory=settings.memory, threads=settings.threads, kernels=settings.kernels)
        self.store = ModelStore(data_dir.models)
        self.link_port = 0
        self._data_dir = data_dir
        self._credentials = credentials
        self._fronts: dict[str, ModelText] = {}
        self._stored: tuple[ModelSummary, ...] = ()
        self._leaving = False
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
        )
        self.orders.host = self.host

    def _build_instances(self) -> None:
        settings = self.settings
        self.instances = Instances(
            self.node_id,
            self.nodes,
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
        self._own = OwnRecord(self._gather)

    def _build_links(self) -> None:
        router = LinkRouter(self.node_id, self.host, self.orders, self.exchange, self.instances)
        self.endpoint = Endpoint(self._credentials, Vocabulary(DAEMON_MESSAGES), router, hello=self._hello)
        self.mesh = Mesh(self.endpoint, self.swarm_tag, lambda: self._own.current, self._on_members)
        router.mesh = self.mesh
        self.trust = router.trust = Trust(
            self._data_dir.path,
            self._credentials,
            self.endpoint,
            self.mesh,
            name=self.settings.name,
            on_changed=lambda: self.host.tell(TrustChanged()),
        )
        self._driver_links = DriverLinks(
            self.endpoint, lambda node, found: reachable_first(self.node_id, self.mesh, node, found)
        )
        self.gateway = Gateway(
            self.launcher.find, self.launcher.launch, self._driver_links.get, self._front, self.changed
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
        self.link_port = await self._listen()
        self.mesh.add_static(self.settings.peers)
        if self.settings.mdns:
            self._mdns = MdnsDiscovery(
                self.node_id, self.swarm_tag, PROTOCOL_VERSION, self.link_port, self.mesh.on_sighting
            )
            await self._mdns.start()
        self._refresh()
        self._run(self.mesh.run())
        self._run(self._tick())
        self._run(self._calibrate())
        if self.settings.model != "none":
            self._run(self.launcher.keep_served(self.settings.model, self.nodes, self.node_id))

    def leave(self) -> None:
        """From now on nothing is planned any more, whatever ends; `close` follows."""
        self._leaving = True

    async def close(self) -> None:
        """Tell the members, end the stages, and close everything; also after a start that failed half-way."""
        self.leave()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._own.refresh()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):
                await self.mesh.publish()
        await self.instances.close()
        if self._mdns is not None:
            await self._mdns.close()
        await self.host.close()
        await asyncio.gather(*(front.close() for front in self._fronts.values()))
        await self.mesh.close()
        await self.endpoint.close()

    def nodes(self) -> list[NodeRecord]:
        """The records of all nodes that are alive, this one first."""
        return [self._own.current, *self.mesh.membership.alive()]

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

    async def _listen(self) -> int:
        wanted = self.settings.port
        try:
            return await self.endpoint.listen(None, DEFAULT_LINK_PORT if wanted is None else wanted)
        except OSError as error:
            if wanted is None and error.errno in (errno.EADDRINUSE, errno.EACCES):
                return await self.endpoint.listen(None, 0)
            raise ConfigError(f"{error}; choose another with --port, or 0 for any") from None

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
        )

    def _refresh(self) -> None:
        """Something that this node publishes may have changed: tell the members and whoever waits here."""
        if self._own.refresh():
            self._run(self.mesh.publish())
        self.changed.notify()

    def _on_members(self, changes: Sequence[MemberChange]) -> None:
        if self._leaving:
            return
        self.trust.on_members(changes)
        self.instances.reconsider()
        gone = [change.node_id for change in changes if change.state is MemberState.GONE]
        for node_id in gone:
            self._run(self._driver_links.hang_up(node_id))
        if gone:
            # Of all that are gone, not only of the latest: an heir may have died before it took over.
            for member in self.mesh.membership.members.values():
                if member.state is MemberState.GONE:
                    self._run(self.launcher.take_over(member.record))
        self.changed.notify()

    async def _tick(self) -> None:
        while True:
            self._stored = tuple(ModelSummary(m.name, m.sha256, m.size, 0, "") for m in self.store.entries()[:256])
            self.trust.tick()
            self._refresh()
            self.instances.reconsider()
            await self.orders.prune({record.id: (owner, record.epoch) for owner, record in self.instances.all()})
            await asyncio.sleep(TICK_SECONDS)

    async def _calibrate(self) -> None:
        await self.hardware.calibrate(self._data_dir.path)
        self._refresh()

    async def _order(self, node: str, order: Struct, seconds: float | None) -> Struct:
        if node == self.node_id:
            async with asyncio.timeout(seconds):
                return await self.orders.carry_out(self.node_id, order)
        link = self.mesh.link_to(node)
        if link is None:
            raise LinkClosed("no link with that node at present")
        reply, _ = await link.request(order, timeout=seconds)
        return reply

    def _deliver(self, owner: str, report: Struct) -> None:
        if owner != self.node_id:
            self._run(deliver_over_link(self.mesh, owner, report))
        elif isinstance(report, StageProgress | StageLost) and not self._leaving:
            self.instances.on_report(self.node_id, report)

    async def _front(self, record: InstanceRecord) -> ModelText:
        front = self._fronts.get(record.model.sha256)
        if front is None:
            manifest = await self.exchange.manifest(record.model)
            path = await self.exchange.header(manifest, self.progress.report)
            front = self._fronts[record.model.sha256] = await ModelText.open(path)
        return front

    def _run(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a task of the daemon failed", exc_info=error)
