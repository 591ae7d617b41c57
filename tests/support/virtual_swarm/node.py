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

from swarmd.discovery.records import NodeRecord
from swarmd.node.cluster.admission import Admission
from swarmd.node.cluster.instances import Instances
from swarmd.node.cluster.launcher import Launcher
from swarmd.node.cluster.ledger import View
from swarmd.node.cluster.membership import (
    FORGET_SECONDS,
    GONE_SECONDS,
    SUSPECT_SECONDS,
    MemberChange,
    Membership,
    MemberState,
)
from swarmd.node.cluster.messages import StageLost, StageProgress
from swarmd.node.cluster.order_limits import OrderLimits
from swarmd.node.cluster.signal import Signal
from swarmd.node.cluster.stage_orders import StageOrders
from swarmd.node.serving.gateway import Gateway
from swarmd.transport.link import RemoteError

if TYPE_CHECKING:
    from support.virtual_swarm.world import World

TICK = 0.25


class VirtualNode:
    """A daemon at work, from its start to its end; a restarted one is another object with the same id."""

    def __init__(self, world: World, node_id: str, models: set[str], keep: str) -> None:
        self.world, self.network, self.id = world, world.network, node_id
        self.frozen = self.leaving = self.closed = False
        self.models, self.keep = models, keep
        self.links: dict[str, VirtualLink] = {}
        self.quiet: set[str] = set()
        self.membership = Membership()
        self.changed = Signal()
        self.late: dict[str, NodeRecord] = {}
        self._tasks: dict[asyncio.Task[Any], None] = {}
        self._asleep: list[Callable[[], None]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._reacting: asyncio.TimerHandle | None = None
        self._arming: asyncio.TimerHandle | None = None
        self._changes: list[MemberChange] = []
        self.streams: dict[object, str] = {}
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
        )

    # Life and tasks

    def start(self) -> None:
        """Begin; the links are the network's affair."""
        if self.keep:
            self.spawn(self.launcher.keep_served(self.keep, self.nodes, self.id))
        self.spawn(self._tick())

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
        for task in (*self._tasks, *sorted(self.instances._tasks, key=_number)):
            task.cancel()
        for timer in (self._timer, self._reacting, self._arming):
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
        self._look()
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
        self._flush()
        return [self.record, *self.membership.alive()]

    def view(self) -> View:
        return View(self.nodes(), self.membership.suspects(), self.membership.gone())

    def link_to(self, node: str) -> None:
        """Addresses of stage processes need no order here."""
        return

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
            follows=self.instances.follows(self.membership.alive()),
            cut_off=self.membership.cut_off(),
        )

    def refresh(self) -> None:
        if self.closed:
            return
        fresh = replace(self._gather(), counter=self.record.counter)
        if fresh != self.record:
            self.record = replace(fresh, counter=fresh.counter + 1)
            self.world.publish(self)
        self.changed.notify()

    async def _tick(self) -> None:
        await asyncio.sleep(self.world.rng.uniform(0, 0.5))
        while True:
            if not self.frozen and self.is_concerned:
                self.refresh()
                self.instances.reconsider()
                self.waits = bool(self.instances.orphans())
                self.spawn(self.launcher.take_over())
                await self.orders.prune(self.instances.claims(), self.world.loop.time())
            await asyncio.sleep(0.5)

    @property
    def is_concerned(self) -> bool:
        """Whether a look at the swarm could lead to anything."""
        return bool(self.instances.owned or self.host._children or self.waits or self.orders._wanted)

    async def _order(self, node: str, order: Struct, seconds: float | None) -> Struct:
        if node == self.id:
            async with asyncio.timeout(seconds):
                return await self.orders.carry_out(self.id, order)
        return await self.network.request(self, node, order, seconds)

    async def serve(self, link: VirtualLink, sender: str, order: Struct, answer: Callable[[Any], None]) -> None:
        """A request arrived."""
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

    # Membership

    def on_linked(self, peer: str, link: VirtualLink) -> None:
        self.links[peer] = link
        self.report(self.membership.on_linked(peer, self.world.loop.time()))
        self.touch(peer)

    def on_unlinked(self, peer: str, link: VirtualLink) -> None:
        if self.links.get(peer) is link:
            del self.links[peer]
            self.late.pop(peer, None)
        self.report(self.membership.on_unlinked(peer, self.world.loop.time()))
        self.touch(peer)

    def on_refused(self, peer: str) -> None:
        self.report(self.membership.on_refused(peer, self.world.loop.time()))

    def receive(self, record: NodeRecord) -> None:
        """A record came over the link with its node."""
        known = self.membership.get(record.id)
        if known is not None and known.state is MemberState.ALIVE and not self.matters(known.record, record):
            self.late[record.id] = record
            return
        self.late.pop(record.id, None)
        self.report(self.membership.on_record(record, self.world.loop.time()))

    def matters(self, old: NodeRecord, new: NodeRecord) -> bool:
        """Whether a change could lead to anything here."""
        if self.is_concerned or self.keep or self.gateway.streams or self.world.curious(self.id):
            return True
        if old.leaving != new.leaving or (old.models is not new.models and old.models != new.models):
            return True
        if old.instances is not new.instances and _claims(old) != _claims(new):
            return True
        seen = self.membership.get
        return any((owner := seen(c.owner)) is None or owner.state is MemberState.GONE for c in new.follows)

    def _flush(self) -> None:
        if self.late:
            late, self.late = self.late, {}
            for record in late.values():
                self.membership.on_record(record, self.world.loop.time())

    def report(self, changes: Sequence[MemberChange]) -> None:
        """As the mesh: hang up on who is gone, and tell the daemon; changes of one moment are told together."""
        for change in changes:
            if change.state is MemberState.GONE:
                link = self.links.get(change.node_id)
                if link is not None:
                    self.world.loop.call_soon(self.network.close_end, link, self.id)
        if changes:
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
            if change.state is MemberState.GONE:
                member = self.membership.get(change.node_id)
                if member is not None and not member.record.leaving:
                    self.instances.on_gone(change.node_id)
                self.world.hang_up(self, change.node_id)
        if self.is_concerned or any(self._concerns(change) for change in changes):
            self.instances.reconsider()
            self.waits = bool(self.instances.orphans())
            if self.waits:
                self.spawn(self.launcher.take_over())
        self.refresh()

    def _concerns(self, change: MemberChange) -> bool:
        if change.state is MemberState.SUSPECT:
            return False
        member = self.membership.get(change.node_id)
        return member is None or bool(member.record.instances or member.record.follows or member.record.leaving)

    def touch(self, *peers: str) -> None:
        """Heartbeats of these members may have begun to pass, or ended."""
        now = self.world.loop.time()
        for peer in peers:
            if self.membership.get(peer) is None:
                self.quiet.discard(peer)
            elif self.network.flows(self.id, peer):
                self.quiet.discard(peer)
                self.report(self.membership.on_heard(peer, now))
            elif peer not in self.quiet:
                self.quiet.add(peer)
                self.membership.on_heard(peer, now - self.world.rng.uniform(0, 0.5))
        if self._arming is None and self.quiet:
            self._arming = self.world.loop.call_later(0.01, self._arm)

    def _arm(self) -> None:
        """Set the time at which silence is noticed next."""
        self._arming = None
        now, due = self.world.loop.time(), []
        for peer in list(self.quiet):
            member = self.membership.get(peer)
            if member is None:
                self.quiet.discard(peer)
            elif member.state is MemberState.ALIVE:
                due.append(member.heard + SUSPECT_SECONDS)
            elif member.state is MemberState.SUSPECT:
                due.append(member.since + GONE_SECONDS)
            elif peer not in self.links:
                due.append(member.since + FORGET_SECONDS)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if due:
            self._timer = self.world.loop.call_at(max(min(due), now) + self.world.rng.uniform(0.01, TICK), self._look)

    def _look(self) -> None:
        if self.frozen or self.closed:
            return
        now = self.world.loop.time()
        for peer, member in self.membership._members.items():
            if peer not in self.quiet:
                member.heard = now  # a heartbeat has come in the meantime
        self.report(self.membership.tick(now))
        self._arm()


def _claims(record: NodeRecord) -> list[tuple[str, int, int]]:
    return [(one.id, one.epoch, one.term) for one in record.instances]


def _number(task: asyncio.Task[None]) -> int:
    return int(task.get_name().rpartition("-")[2])
