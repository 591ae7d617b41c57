"""As much of daemons as real stage processes need, in the test's own process."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec import Struct

from swarmd.discovery.records import Address
from swarmd.node.cluster.signal import Signal
from swarmd.node.data_dir import DataDir
from swarmd.node.engine.sampling_params import SamplingParams
from swarmd.node.serving.messages import DATA_MESSAGES, Connect, Generate, LoadEngine, Token
from swarmd.node.serving.stage_host import StageHost, StageStatus
from swarmd.transport.endpoint import Endpoint
from swarmd.transport.identity import issue_credentials, save_credentials
from swarmd.transport.link import PROTOCOL_VERSION, Hello, Link, Vocabulary
from swarmd.transport.token import JoinToken

HERE = "127.0.0.1"


class StageDaemon:
    """A node: links from its own stages, and to drivers. `lost` gets (epoch, index, reason) of each loss; `heard` fires
    at each report of a stage.
    """

    def __init__(
        self, data_dir: Path, token: JoinToken, lost: asyncio.Queue[tuple[int, int, str]], heard: Signal
    ) -> None:
        DataDir(data_dir).create()
        self.credentials = issue_credentials(Ed25519PrivateKey.generate(), token)
        save_credentials(data_dir, self.credentials)
        self._heard = heard
        self.port = 0
        self.host = StageHost(
            data_dir,
            data_dir.name,
            lambda: self.port,
            on_lost=lambda job, reason, own_fault: lost.put_nowait((job.epoch, job.index, reason)),
            on_progress=lambda job, done, total: None,
            on_load=lambda: None,
        )
        hello = Hello(PROTOCOL_VERSION, "daemon", "node", "test")
        self.endpoint = Endpoint(self.credentials, Vocabulary(DATA_MESSAGES), self, hello=lambda: hello)

    async def on_link(self, link: Link) -> None:
        assert link.initiator or self.host.on_link(link)

    async def on_message(self, link: Link, message: Struct, payload: bytearray) -> None:
        await self.host.on_message(link, message)
        self._heard.notify()

    async def on_request(self, link: Link, message: Struct, payload: bytearray) -> Struct:
        raise AssertionError(message)

    def on_stream(self, link: Link, message: Struct, payload: bytearray) -> AsyncIterator[Struct]:
        raise AssertionError(message)

    async def on_closed(self, link: Link, reason: str) -> None:
        self.host.on_closed(link, reason)


class StageSwarm:
    """Nodes, each with one stage of an instance, or several. `lost` gets (epoch, index, reason) of each loss."""

    def __init__(self, root: Path, nodes: int) -> None:
        self.token = JoinToken.generate()
        self.ports: list[int] = []  # of the stages that were brought up last
        self.lost: asyncio.Queue[tuple[int, int, str]] = asyncio.Queue()
        self.heard = Signal()
        self.nodes = [StageDaemon(root / f"node{index}", self.token, self.lost, self.heard) for index in range(nodes)]

    @property
    def stages(self) -> list[StageStatus]:
        """The stages of all nodes, in the order of their places."""
        return sorted((stage for node in self.nodes for stage in node.host.stages), key=lambda one: one.job.index)

    async def serve(self, model: Path, instance: str, *cuts: int, epoch: int = 1) -> int:
        """Bring up one stage between each two cuts, on the nodes in turns, and wire them; the driver's port."""
        jobs = [
            LoadEngine(instance, epoch, str(model), False, start, end, 8192, 512, 1, index=index)
            for index, (start, end) in enumerate(itertools.pairwise(cuts))
        ]
        loaded = await asyncio.gather(*(self._node(job.index).host.start(job) for job in jobs))
        self.ports = [one.port for one in loaded]
        for index in range(len(jobs)):
            following = (index + 1) % len(jobs)
            address = Address(HERE, loaded[following].port)
            previous = self._node((index or len(jobs)) - 1).credentials.node_id
            wiring = Connect(len(jobs), self._node(following).credentials.node_id, (address,), "f32", previous)
            await self._node(index).host.connect(instance, epoch, index, wiring)
        return loaded[0].port

    def _node(self, index: int) -> StageDaemon:
        return self.nodes[index % len(self.nodes)]

    async def driver(self, port: int) -> Link:
        """A link to a driver."""
        first = self.nodes[0]
        return await first.endpoint.dial(HERE, port, expect=first.credentials.node_id)

    async def generate(self, instance: str, port: int, *, epoch: int = 1, count: int = 24) -> list[int]:
        """The tokens that a driver answers a fixed prompt with."""
        link = await self.driver(port)
        async with link.stream(ask(instance, epoch, count=count)) as items:
            return [item.token async for item in items if isinstance(item, Token)]

    def process_of(self, index: int) -> psutil.Process:
        """The process of a stage, if there is one instance."""
        [pid] = [stage.pid for stage in self.stages if stage.job.index == index]
        return psutil.Process(pid)

    async def until(self, condition: Callable[[], object], seconds: float = 10) -> None:
        """Wait until reports of stage processes make the condition true."""
        async with asyncio.timeout(seconds):
            while not condition():
                await self.heard.wait()

    async def losses(self, count: int, seconds: float = 20) -> dict[int, str]:
        """Wait for so many losses: stage -> reason."""
        async with asyncio.timeout(seconds):
            return {index: reason for _, index, reason in [await self.lost.get() for _ in range(count)]}


def ask(instance: str, epoch: int, prompt: tuple[int, ...] = (5, 17, 3, 8), count: int = 24) -> Generate:
    """A greedy request for so many tokens."""
    return Generate(instance, epoch, prompt, SamplingParams(temperature=0.0, prompt_tokens=len(prompt)), count, ())


@asynccontextmanager
async def stage_swarm(root: Path, nodes: int = 1) -> AsyncIterator[StageSwarm]:
    """Daemons that listen; their stage processes end with them."""
    swarm = StageSwarm(root, nodes)
    for node in swarm.nodes:
        node.port = await node.endpoint.listen(None, 0)
    try:
        yield swarm
    finally:
        for node in swarm.nodes:
            await node.host.close()
            await node.endpoint.close()
