"""One node of a virtual swarm: the daemon's parts, put together as `node/daemon.py` does.

What would be done for nothing is left out, since most of many nodes carry nothing: a node that owns, carries, serves
and inherits nothing looks at the swarm again only when something has changed that could concern it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, cast

from msgspec import Struct
from msgspec.structs import replace
from support.virtual_swarm.network import VirtualLink
from support.virtual_swarm.stages import VirtualHost
from support.virtual_swarm.stub_models import VirtualExchange, VirtualStore
from support.virtual_swarm.watcher import Watcher

from swarmd.discovery.records import NodeRecord
from swarmd.node.cluster.admission import Admission
from swarmd.node.cluster.instances import Instances
from swarmd.node.cluster.launcher import Launcher
from swarmd.node.cluster.ledger import View
from swarmd.node.cluster.membership import MemberChange, MemberState
from swarmd.node.cluster.messages import StageLost, StageProgress
from swarmd.node.cluster.order_limits import OrderLimits
from swarmd.node.cluster.signal import Signal
from swarmd.node.cluster.stage_orders import StageOrders
from swarmd.node.serving.gateway import Gateway
from swarmd.node.serving.recovery import Patience
from swarmd.transport.link import RemoteError

if TYPE_CHECKING:
    from support.virtual_swarm.world import World

TICK = 0.5
# What a request may take, from the time at which its model is ready.
DEADLINE_SECONDS = 90.0


class VirtualNode(Watcher):
    """A daemon at work, from its start to its end; a restarted one is another object with the same id."""

    def __init__(self, world: World, node_id: str, models: set[str], keep: str) -> None:
        super().__init__(world, node_id)
        self.leaving = False
        self.models, self.keep = models, keep
        self.changed = Signal()
        self._tasks: dict[asyncio.Task[Any], None] = {}
        self._asleep: list[Callable[[], None]] = []
        self._reacting: asyncio.TimerHandle | None = None
        self._ticking: asyncio.TimerHandle | None = None
        self._phase = world.rng.uniform(0, TICK)
        self._changes: list[MemberChange] = []
        self.waits = True
        self._build()
        self.record = replace(self._gather(), counter=round(world.loop.time() * 1000))

    def _build(self) -> None:
        world = self.world
        exchange = cast(Any, VirtualExchange(self))
        self.orders = StageOrders(
            self.id,
            lambda: cast(Any, self),
            exchange,
            devices=lambda: ("cpu",),
            threads=1,
            kernels="auto",
            speculate=False,
            hosts=lambda: ["192.0.2.1"],
            deliver=self._deliver,
        )
        self.host = self.orders.host = VirtualHost(self, self.refresh, world.loop.time)
        limits = OrderLimits(lambda: {"cpu": world.devices[self.id].memory_limit})
        self.orders.admission = Admission(limits, exchange)
        self.instances = Instances(
            self.id, self.view, self._order, self.refresh, wire_dtype="f32", split=world.split(self.id)
        )
        self.launcher = Launcher(
            cast(Any, VirtualStore(self)),
            exchange,
            self.instances,
            self.changed,
            self.refresh,
            context=None,
            progress=lambda progress: None,
        )
        self.gateway = Gateway(
            self.launcher.find,
            self.launcher.launch,
            cast(Any, world.drivers(self)),
            cast(Any, world.front),
            self.changed,
            Patience(request=DEADLINE_SECONDS),
        )

    # Life and tasks

    def start(self) -> None:
        """Begin; the links are the network's affair."""
        if self.keep:
            self.spawn(self.launcher.keep_served(self.keep, self.nodes, self.id))
        self._keep_ticking()

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """A task that ends with the daemon."""
        task = asyncio.ensure_future(work)
        self._tasks[task] = None
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        del self._tasks[task]
        if not task.cancelled() and (error := task.exception()) is not None:
            self.world.errors.append(error)

    def end(self) -> None:
        """The daemon is gone, with all that it runs."""
        self.closed = True
        for _, process in self.host.processes:
            process.end(-9)
        for task in (*self._tasks, *sorted(self.instances._tasks, key=lambda task: int(task.get_name()[5:]))):
            task.cancel()
        for timer in (self._timer, self._reacting, self._arming, self._ticking):
            if timer is not None:
                timer.cancel()

    def when_awake(self, work: Callable[[], None]) -> None:
        """Do it now, or when the node is no longer frozen."""
        if self.closed:
            return
        if self.frozen:
            self._asleep.append(work)
        else:
            work()

    def wake(self) -> None:
        """The node goes on, and finds how much time has passed."""
        self.frozen = False
        asleep, self._asleep = self._asleep, []
        self.look()
        for work in asleep:
            work()

    async def leave(self) -> None:
        """Drain and go, as SIGTERM has it done, within half a minute."""
        self.leaving = self.gateway.leaving = True
        self.refresh()
        self.instances.reconsider()
        deadline = self.world.loop.time() + 30.0
        while self._ties() and self.world.loop.time() < deadline:
            await self.changed.wait(0.5)
        self.world.end_node(self.id, gently=True)

    def _ties(self) -> bool:
        held = any(
            not record.missing_bytes and (owner == self.id or any(stage.node == self.id for stage in record.stages))
            for owner, record in self.instances.all()
        )
        return held or bool(self.gateway.streams)

    # As the daemon's

    def nodes(self) -> list[NodeRecord]:
        self.catch_up()
        return [self.record, *self.membership.alive()]

    def view(self) -> View:
        return View(self.nodes(), self.membership.suspects(), self.membership.gone())

    def link_to(self, node: str) -> None:
        """Addresses of stage processes need no order here."""

    def _gather(self) -> NodeRecord:
        world = self.world
        return NodeRecord(
            id=self.id,
            name=self.id[:6],
            version="1",
            counter=0,
            devices=(world.devices[self.id],),
            models=tuple(world.summary(name) for name in sorted(self.models)),
            instances=self.instances.owned,
            loads=self.host.loads,
            launching=self.launcher.launching,
            leaving=self.leaving,
            follows=self.instances.follows([m.record for m in self.owners() if m.state is not MemberState.GONE]),
            cut_off=self.membership.cut_off(),
        )

    def refresh(self) -> None:
        if self.closed:
            return
        fresh = replace(self._gather(), counter=self.record.counter)
        if fresh != self.record:
            self.record = replace(fresh, counter=fresh.counter + 1)
            self.world.board.publish(self)
        self._keep_ticking()
        self.changed.notify()

    def _keep_ticking(self) -> None:
        """Look at the swarm twice a second while anything could come of it."""
        if self._ticking is None and not self.closed and self.is_concerned:
            ticks = int((self.world.loop.time() - self._phase) / TICK + 1e-6) + 1
            self._ticking = self.world.loop.call_at(self._phase + ticks * TICK, self._tick)

    def _tick(self) -> None:
        self._ticking = None
        if not self.frozen and self.is_concerned:
            self.refresh()
            self._reconsider()
            if self.host.jobs or self.orders._wanted or self.orders._lost:
                self.spawn(self.orders.prune(self.instances.claims(), self.world.loop.time()))
        self._keep_ticking()

    def _reconsider(self) -> None:
        """Who owns nothing and is no heir would not do anything."""
        self.waits = self.may_inherit(self.models)
        if self.waits or self.instances._ledger._owned:
            self.instances.reconsider()
        if self.waits and self.instances.orphans():
            self.spawn(self.launcher.take_over())

    @property
    def is_concerned(self) -> bool:
        """Whether a look at the swarm could lead to anything."""
        orders = self.orders
        held = self.host._children or orders._wanted or orders._starting
        return bool(self.waits or held or self.instances._ledger._owned)

    @property
    def is_attentive(self) -> bool:
        """Whether anything that any node publishes could matter at once."""
        return bool(self._ticking is not None or self.keep or self.world.curious(self.id))

    async def _order(self, node: str, order: Struct, seconds: float | None) -> Struct:
        if node == self.id:
            async with asyncio.timeout(seconds):
                return await self.orders.carry_out(self.id, order)
        return await self.network.request(self, node, order, seconds)

    async def serve(self, link: VirtualLink, sender: str, order: Struct, answer: Callable[[Any], None]) -> None:
        """A request arrived."""
        self.world.loop.call_soon(self._keep_ticking)
        try:
            outcome: Any = await self.orders.carry_out(sender, order)
        except RemoteError as error:
            outcome = error
        self.when_awake(lambda: self.network.send(link, self.id, lambda: answer(outcome)))

    def _deliver(self, owner: str, report: Struct) -> None:
        assert isinstance(report, StageProgress | StageLost)
        if owner == self.id:
            self.instances.on_report(self.id, report)
        elif (link := self.links.get(owner)) is not None:
            there = self.network.nodes.get
            self.network.send(
                link, self.id, lambda: node.instances.on_report(self.id, report) if (node := there(owner)) else None
            )

    def react(self, changes: Sequence[MemberChange]) -> None:
        """Changes of one moment are acted on together."""
        self._changes += changes
        if self._reacting is None:
            delay = 0.005 if self.is_concerned else 0.05
            self._reacting = self.world.loop.call_later(delay, self._react)

    def _react(self) -> None:
        self._reacting = None
        if self.frozen:
            self._asleep.append(self._react)
            return
        changes, self._changes = self._changes, []
        for change in changes:
            if change.heard_again:
                self.instances.on_heard_again(change.node_id)
            if change.state is MemberState.GONE:
                member = self.membership.get(change.node_id)
                if member is not None and not member.record.leaving:
                    self.instances.on_gone(change.node_id)
                self.world.hang_up(self, change.node_id)
            self._note_claims(change)
        self._reconsider()
        if any(self.shows(change) for change in changes):
            self.refresh()
        else:
            self.changed.notify()

    def _note_claims(self, change: MemberChange) -> None:
        """What a look at the swarm would make of a record, where it can make nothing else of it."""
        member = self.membership.get(change.node_id)
        if change.state is MemberState.SUSPECT or member is None:
            return
        highest = self.instances._ledger._highest
        for owned in member.record.instances:
            highest[owned.id] = max(highest.get(owned.id, 0), owned.epoch)
        for claim in member.record.follows:
            highest[claim.instance] = max(highest.get(claim.instance, 0), claim.epoch)
