"""Stage processes of a virtual swarm, under the daemon's own `StageHost`, with the driver's own code on the first.

A ring computes with two fake stages, whatever its size, so that the tokens of a request do not depend on the plan.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from msgspec import Struct
from support.fake_pipeline import FakePipeline

from swarmd.node.serving.driver import Driver
from swarmd.node.serving.messages import (
    Connect,
    Connected,
    EngineLoad,
    EngineLoaded,
    EngineTrouble,
    Finished,
    Generate,
    LoadEngine,
    Sampled,
    Token,
)
from swarmd.node.serving.stage_child import Child
from swarmd.node.serving.stage_host import StageHost
from swarmd.node.serving.stage_starts import Started
from swarmd.node.serving.steps import Limits, PlannedStep
from swarmd.transport.link import LinkClosed, RemoteError

if TYPE_CHECKING:
    from support.virtual_swarm.node import VirtualNode

RING_SILENCE_SECONDS = 2.0
FAKE_STAGES = 2
STALL_SECONDS = 0.1


class Processes:
    """All stage processes of the swarm, by port, and the links of their rings."""

    def __init__(self) -> None:
        self.by_port: dict[int, Process] = {}
        self.edges: dict[Edge, None] = {}
        self._next_port = 1024

    def port(self) -> int:
        """A port that nobody has."""
        self._next_port = self._next_port + 1 if self._next_port < 65535 else 1025
        return self._next_port

    def on_paths_changed(self) -> None:
        """A ring whose link carries nothing for too long breaks at both ends."""
        for edge in self.edges:
            edge.watch()


class Edge:
    """The link from one stage of a ring to the next."""

    def __init__(self, one: Process, other: Process) -> None:
        self.ends = (one, other)
        self.epochs = (one.job.epoch, other.job.epoch)
        self._timer: asyncio.TimerHandle | None = None
        one.host.world.processes.edges[self] = None

    def flows(self) -> bool:
        one, other = self.ends
        network = one.host.world.network
        awake = network.awake(one.node.id) and network.awake(other.node.id)
        return awake and one.alive and other.alive and network.reach(one.node.id, other.node.id)

    def watch(self) -> None:
        if self.flows():
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
        elif self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(RING_SILENCE_SECONDS + 0.1, self.close, "a neighbour has said nothing")

    def close(self, reason: str) -> None:
        """Both ends break, as soon as they can know."""
        processes = self.ends[0].host.world.processes
        if self not in processes.edges:
            return
        del processes.edges[self]
        if self._timer is not None:
            self._timer.cancel()
        for process, epoch in zip(self.ends, self.epochs, strict=True):
            process.node.when_awake(lambda p=process, e=epoch: p.break_ring(reason, epoch=e))


class Process:
    """One stage process: what the host sees as its process and as its link."""

    def __init__(self, host: VirtualHost, job: LoadEngine) -> None:
        self.host, self.node, self.job = host, host.node, job
        self.returncode: int | None = None
        self.pid = self.port = host.world.processes.port()
        self.over = True
        self.driver: Driver | None = None
        self.loaded = False
        self._ended = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        host.world.processes.by_port[self.port] = self

    @property
    def alive(self) -> bool:
        return self.returncode is None

    # As asyncio.subprocess.Process:

    async def wait(self) -> int:
        await self._ended.wait()
        assert self.returncode is not None
        return self.returncode

    def terminate(self) -> None:
        asyncio.get_running_loop().call_later(self.host.world.rng.uniform(0.005, 0.1), self.end, 0)

    def kill(self) -> None:
        self.end(-9)

    def end(self, code: int) -> None:
        """The process is over, by itself or not."""
        if self.returncode is None:
            self.returncode = code
            del self.host.world.processes.by_port[self.port]
            self._leave("stage_lost", "the stage process ended")
            self._ended.set()

    # As the host's link with it:

    async def request(self, message: Struct, timeout: float | None = None) -> tuple[Struct, bytearray]:
        async with asyncio.timeout(timeout):
            if isinstance(message, LoadEngine):
                return await self._load(message), bytearray()
            assert isinstance(message, Connect)
            return await self._connect(message), bytearray()

    async def _load(self, job: LoadEngine) -> EngineLoaded:
        world = self.host.world
        self._leave("stale_epoch", "a later epoch has begun")
        if not self.loaded:
            await asyncio.sleep(world.rng.uniform(0.3, 1.5))
            if self.node.id in world.sick and world.rng.random() < world.sick[self.node.id]:
                raise RemoteError("load_failed", "out of memory")
        if not self.alive:
            raise LinkClosed("the stage process ended")
        self.loaded, self.over, self.job = True, False, job
        return EngineLoaded(self.port, 1)

    async def _connect(self, order: Connect) -> Connected:
        world, job = self.host.world, self.job
        await asyncio.sleep(world.rng.uniform(0.002, 0.02))
        if self.over:
            raise RemoteError("stale_epoch", "this stage belongs to no epoch")
        if order.n_stages > 1:
            following = world.processes.by_port.get(order.next_addresses[0].port)
            if following is None or not world.network.reach(self.node.id, following.node.id):
                raise RemoteError("unreachable", "the next stage cannot be reached")
            if not world.network.awake(following.node.id):
                await asyncio.sleep(3.0)
                raise RemoteError("unreachable", "the next stage does not answer")
            if following.over or (following.job.instance, following.job.epoch) != (job.instance, job.epoch):
                raise RemoteError("stale_epoch", "that stage belongs to another epoch")
            Edge(self, following)
        if job.start == 0:
            self._drive(order)
        return Connected()

    def _drive(self, order: Connect) -> None:
        job = self.job
        limits = Limits(n_stages=order.n_stages, kv_tokens=job.kv_tokens, context=job.context)
        pipeline = FakePipeline(Limits(n_stages=FAKE_STAGES, kv_tokens=job.kv_tokens, context=job.context))
        seconds = self.host.world.rng.uniform(0.08, 0.3)
        loop = asyncio.get_running_loop()

        async def run_step(step: PlannedStep) -> None:
            pipeline.begin(step)
            loop.call_later(seconds, come_back)

        def come_back() -> None:
            if self.over or self.driver is not driver:
                return
            if not self.ring_flows():  # nothing is lost: it goes on as soon as the path does, if the ring holds
                loop.call_later(STALL_SECONDS, come_back)
                return
            pipeline.flush()
            while pipeline.answers:
                answer = pipeline.answers.popleft()
                assert isinstance(answer, Sampled)
                driver.on_sampled(answer)

        driver = self.driver = Driver(job.instance, limits, run_step, clock=loop.time)
        self._tasks = [asyncio.create_task(driver.run()), asyncio.create_task(self._report(driver))]

    def ring_flows(self) -> bool:
        """Whether a step comes around now."""
        edges = self.host.world.processes.edges
        mine = (self.job.instance, self.job.epoch)
        return all(e.flows() for e in edges if (e.ends[0].job.instance, e.ends[0].job.epoch) == mine)

    async def _report(self, driver: Driver) -> None:
        told = None
        while True:
            if (load := driver.load) != told:
                self.node.when_awake(lambda load=load: self._tell(EngineLoad(load)))
                told = load
            await asyncio.sleep(0.5)

    def _tell(self, message: Struct) -> None:
        if self.alive:
            self.node.spawn(self.host.on_message(cast(Any, self), message))

    def break_ring(self, reason: str, *, epoch: int) -> None:
        """This epoch is over, once."""
        if not self.over and self.alive and self.job.epoch == epoch:
            self._leave("stage_lost", reason)
            self._tell(EngineTrouble(reason, sound=True))

    def _leave(self, code: str, reason: str) -> None:
        self.over = True
        if self.driver is not None:
            self.driver.fail(code, reason)
            self.driver = None
        for task in self._tasks:
            task.cancel()
        self._tasks = []
        loop, world = asyncio.get_running_loop(), self.host.world
        for edge in [edge for edge in world.processes.edges if self in edge.ends]:
            if edge.flows() or not self.alive:
                loop.call_later(world.network.delay(), edge.close, "a neighbour in the ring was lost")
            else:
                edge.watch()

    def generate(self, message: Generate) -> AsyncGenerator[Token | Finished]:
        """As the stage process's `on_stream`."""
        if self.driver is None:
            raise RemoteError("not_driver", "this process does not drive an instance")
        if (message.instance, message.epoch) != (self.job.instance, self.job.epoch):
            raise RemoteError("stale_epoch", "this driver serves another epoch")
        return self.driver.generate(message)


class VirtualHost(StageHost):
    """The host itself; only the processes are played."""

    def __init__(self, node: VirtualNode, on_load: Callable[[], None], clock: Callable[[], float]) -> None:
        super().__init__(
            Path(node.id),
            node.id[:6],
            lambda: 1,
            on_lost=node.orders.on_lost,
            on_progress=node.orders.on_progress,
            on_load=on_load,
            clock=clock,
        )
        self.node, self.world = node, node.world

    @property
    def processes(self) -> list[tuple[LoadEngine, Process]]:
        """All that take memory here."""
        return [(child.job, cast(Any, child.process)) for child in self._children]

    async def _spawn(self, job: LoadEngine) -> Child:
        process = Process(self, job)
        child = Child(job, cast(Any, process), asyncio.get_running_loop().create_future())
        self._children.append(child)
        self.world.check_memory(self)
        self._by_link[cast(Any, process)] = child
        child.watcher = self.node.spawn(self._watch(child, Started("", cast(Any, process), child.up)))
        await asyncio.sleep(self.world.rng.uniform(0.2, 0.6))
        if not child.up.done():
            child.up.set_result(cast(Any, process))
        return child

    def _attach(self, child: Child, link: Any) -> None:
        """Played processes do not beat."""
