"""What a member gone bad says to stage processes and daemons that run: each is refused with one line in the log, and
leaves no trace; what was served before is served on.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from msgspec import Struct
from msgspec.structs import replace
from support.hostile import Mallory
from support.stage_swarm import StageSwarm, ask, stage_swarm
from support.swarm import Node
from support.tiny_gguf import TinyModel, write_tiny_gguf

from swarmd.discovery.records import NodeRecord
from swarmd.node.cluster.messages import (
    GetManifest,
    HeartbeatEcho,
    Manifest,
    ModelChunk,
    Publish,
    StageLost,
    StageProgress,
    StageWired,
    StartStage,
    StopStage,
    WireStage,
)
from swarmd.node.engine.sampling_params import SamplingParams
from swarmd.node.serving.messages import (
    Chunk,
    Connect,
    Connected,
    EngineTrouble,
    JoinRing,
    LoadEngine,
    RingBeat,
    Sampled,
    Step,
    StepFailed,
    TokenChoice,
    TrustChanged,
)
from swarmd.transport.endpoint import LinkRefused
from swarmd.transport.link import Link, LinkClosed, RemoteError
from swarmd.transport.token import JoinToken

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

STEP = Step(1, 0, (), (Chunk(0, 0, (1, 2), 1),), (), "f32")
SAMPLED = Sampled(1, 0, (TokenChoice(0, 4, 7, -0.1),))


async def refused(answer: Awaitable[Any], code: str) -> None:
    """Asked for and denied."""
    with pytest.raises(RemoteError) as caught:
        await answer
    assert caught.value.code == code


async def stream_refused(link: Link, message: Struct, code: str) -> None:
    with pytest.raises(RemoteError) as caught:
        async with link.stream(message) as items:
            await anext(items)
    assert caught.value.code == code


@dataclass
class Ring:
    """A pipeline of two stages, and the links that somebody else has with them."""

    swarm: StageSwarm
    first: Link
    second: Link


async def join_then_send(ring: Ring) -> None:
    await refused(ring.second.request(JoinRing("i", 1)), "no_place")
    await ring.second.send(STEP, bytes(512))


async def flood(ring: Ring) -> None:
    for number in range(500):
        await ring.second.send(replace(STEP, step=number), bytes(512))


RING_ROWS: dict[str, tuple[Callable[[Ring], Awaitable[Any]], str]] = {
    "a step of one who is not in the ring": (lambda r: r.second.send(STEP, bytes(512)), "sent Step without being part"),
    "a step of an old epoch": (lambda r: r.second.send(replace(STEP, epoch=0), bytes(512)), "without being part"),
    "samples": (lambda r: r.first.send(SAMPLED), "sent Sampled without being part"),
    "a failure": (lambda r: r.first.send(StepFailed(1, 0, "x")), "sent StepFailed without being part"),
    "signs of life": (lambda r: r.second.send(RingBeat(True)), "sent RingBeat without being part"),
    "a daemon's word": (lambda r: r.second.send(TrustChanged()), "sent TrustChanged without being part"),
    "trouble of another": (lambda r: r.first.send(EngineTrouble("x")), "sent EngineTrouble without being part"),
    "500 steps": (flood, "sent Step without being part"),
    "joining as a stranger, then a step": (join_then_send, "where it has no place"),
    "joining an old epoch": (
        lambda r: refused(r.second.request(JoinRing("i", 0)), "stale_epoch"),
        "wants to join epoch 0",
    ),
    "joining a coming epoch": (
        lambda r: refused(r.first.request(JoinRing("i", 9)), "stale_epoch"),
        "wants to join epoch 9",
    ),
    "joining another instance": (
        lambda r: refused(r.second.request(JoinRing("j", 1)), "stale_epoch"),
        "wants to join epoch 1 of j",
    ),
    "a request of an old epoch": (lambda r: stream_refused(r.first, ask("i", 0), "stale_epoch"), "refused Generate"),
    "a request of another instance": (
        lambda r: stream_refused(r.first, ask("j", 1), "stale_epoch"),
        "refused Generate",
    ),
    "a request to a stage without a driver": (
        lambda r: stream_refused(r.second, ask("i", 1), "not_driver"),
        "refused Generate",
    ),
    "an order to load": (
        lambda r: refused(r.second.request(LoadEngine("i", 2, "/etc/passwd", False, 0, 1, 1, 1, 1)), "unknown"),
        "refused LoadEngine",
    ),
    "an order to connect": (
        lambda r: refused(r.first.request(Connect(2, "0" * 64, ())), "unknown"),
        "refused Connect",
    ),
    "wishes that are not numbers": (
        lambda r: _closes(r.first, replace(ask("i", 1), sampling=SamplingParams(temperature=math.nan))),
        "broke the protocol",
    ),
    "more alternatives than a frame holds": (
        lambda r: _closes(r.first, replace(ask("i", 1), sampling=SamplingParams(top_logprobs=1 << 40))),
        "broke the protocol",
    ),
}


async def _closes(link: Link, message: Struct) -> None:
    with pytest.raises(LinkClosed):
        async with link.stream(message) as items:
            await anext(items)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", TinyModel(n_layers=2))


@pytest.fixture
async def swarm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> AsyncIterator[StageSwarm]:
    caplog.set_level(logging.INFO)  # which the stage processes take over
    async with stage_swarm(tmp_path) as made:
        yield made


async def test_what_stages_are_told_by_a_member_that_is_not_their_neighbour(
    swarm: StageSwarm, model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """All rows against the same two processes."""
    driver = await swarm.serve(model, "i", 0, 1, 2)
    expected = await swarm.generate("i", driver)
    processes = [(stage.pid, stage.job.epoch) for stage in swarm.stages]
    for what, (act, says) in RING_ROWS.items():
        mallory = Mallory(swarm.token)  # of another name, as far as the limit on log lines goes
        ring = Ring(swarm, await mallory.dial(swarm.ports[0]), await mallory.dial(swarm.ports[1]))
        capfd.readouterr()
        await act(ring)
        for link in (ring.first, ring.second):
            with contextlib.suppress(RemoteError, LinkClosed):
                await link.request(Connected())  # a link is read in order: now all has been dealt with
        assert await swarm.generate("i", driver) == expected, what
        said = [line for line in "".join(capfd.readouterr()).splitlines() if "mallory" in line]
        said = [line for line in said if "refused Connected" not in line]
        assert len(said) == 1, (what, said)
        assert says in said[0], what
        await mallory.endpoint.close()
        assert [(stage.pid, stage.job.epoch) for stage in swarm.stages] == processes, what
        assert swarm.lost.empty(), what


@dataclass
class Victim:
    """A daemon that serves a model, and what it is told of by somebody else."""

    node: Node
    link: Link
    mallory: Mallory
    instance: str
    manifest: Manifest

    def record(self, **changes: Any) -> Publish:
        own = NodeRecord(self.mallory.endpoint.node_id, "mallory", "0", 1)
        return Publish(replace(own, **changes))

    def start(self, **changes: Any) -> StartStage:
        order = StartStage(self.instance, 0, 0, self.manifest.manifest, "cpu", 0, 2, 512, 512)
        return replace(order, **changes)

    def wire(self, **changes: Any) -> WireStage:
        return replace(WireStage(self.instance, 0, 0, 1, self.node.id, (), "f32"), **changes)


async def _breaks_off(victim: Victim, message: Struct) -> None:
    await victim.link.send(message)
    async with asyncio.timeout(10):
        await victim.link.wait_closed()
    assert "protocol" in victim.link.close_reason or "closed the link" in victim.link.close_reason


async def _poses_as_stage(victim: Victim) -> None:
    with contextlib.suppress(LinkRefused):
        link = await victim.mallory.dial(victim.node.link_port, "stage")
        await link.wait_closed()


LIAR = "reports on a stage that it does not hold"
DAEMON_ROWS: dict[str, tuple[Callable[[Victim], Awaitable[Any]], str]] = {
    "a record of another node": (
        lambda v: v.link.send(v.record(id=v.node.id)),
        "mallory sent a record of another node",
    ),
    "a record under no readable name": (lambda v: v.link.send(v.record(name="\x1b[2J")), "under no readable name"),
    "speeds beyond all bounds": (lambda v: _breaks_off(v, v.record(devices=(_device(),))), "broke the protocol"),
    "an echo that is not a number": (lambda v: _breaks_off(v, HeartbeatEcho(math.nan)), "broke the protocol"),
    "an echo from for ever": (lambda v: _breaks_off(v, HeartbeatEcho(math.inf)), "broke the protocol"),
    "an echo from before the time": (lambda v: _breaks_off(v, HeartbeatEcho(-1.0)), "broke the protocol"),
    "a chunk that nobody asked for": (
        lambda v: v.link.send(ModelChunk(), bytes(1 << 20)),
        "sent ModelChunk, which nobody",
    ),
    "an answer that nobody asked for": (lambda v: v.link.send(StageWired()), "sent StageWired, which nobody"),
    "trouble of a stage": (lambda v: v.link.send(EngineTrouble("x")), "sent EngineTrouble, which nobody"),
    "steps": (lambda v: v.link.send(STEP, bytes(512)), "sent Step, which nobody"),
    "an order of an old epoch": (lambda v: refused(v.link.request(v.start()), "stale_epoch"), "refused StartStage"),
    "an order for no device": (
        lambda v: refused(v.link.request(v.start(device="cuda:9", epoch=9)), "no_device"),
        "refused StartStage",
    ),
    "wiring of an old epoch": (lambda v: refused(v.link.request(v.wire()), "stale_epoch"), "refused WireStage"),
    "wiring of a stage that is not there": (
        lambda v: refused(v.link.request(v.wire(index=7)), "stale_epoch"),
        "refused WireStage",
    ),
    "an order for a stage process": (
        lambda v: refused(v.link.request(LoadEngine("i", 2, "/etc/passwd", False, 0, 1, 1, 1, 1)), "unknown"),
        "refused LoadEngine",
    ),
    "a request for tokens": (lambda v: stream_refused(v.link, ask("i", 1), "not_driver"), "refused Generate"),
    "a stage process of another node": (_poses_as_stage, "this node has not started that stage process"),
    # What is late in an honest swarm leaves no line, and no trace either.
    "the end of an old epoch": (lambda v: v.link.request(StopStage(v.instance, 0)), ""),
    "the loss of another's stage long ago": (lambda v: v.link.send(StageLost(v.instance, 0, 0, "gone")), ""),
    "the loss of a stage of no instance": (lambda v: v.link.send(StageLost("i", 1, 0, "gone")), ""),
    "the loss of another's stage": (lambda v: v.link.send(StageLost(v.instance, 1, 0, "gone")), LIAR),
    "the loss of no stage": (lambda v: v.link.send(StageLost(v.instance, 1, 99, "gone")), LIAR),
    "progress of another's stage": (lambda v: v.link.send(StageProgress(v.instance, 1, 0, 9, 9)), LIAR),
}


def _device() -> Any:
    from swarmd.discovery.records import DeviceRecord

    return DeviceRecord("cpu", "cpu", "x", 1, 1, 1, math.inf, 1.0)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Node]:
    with Node(tmp_path_factory.mktemp("tampering") / "victim", "--model", str(model), "--no-mdns") as made:
        made.until_ready()
        # Measuring its speed is over, and with it the process that did it.
        made.until(lambda state: state["nodes"][0]["devices"][0]["compute"])
        yield made


@pytest.fixture(scope="module")
def sha256(model: Path) -> str:
    return hashlib.sha256(model.read_bytes()).hexdigest()


def told(node: Node) -> list[Any]:
    """What must not change: the instances, with their stages."""
    return [
        (one["model"], one["state"], one["epoch"], [(s["node"], s["start"], s["end"]) for s in one["stages"]])
        for one in node.get("/api/swarm")["instances"]
    ]


async def test_what_daemons_are_told_by_a_member_that_has_no_say_in_it(node: Node, sha256: str) -> None:
    """All rows against the same daemon."""
    before, process = told(node), node.stage_process().pid
    text = await asyncio.to_thread(node.text, "hello", model="tiny", max_tokens=8)
    token = JoinToken.parse(node.token())
    for what, (act, says) in DAEMON_ROWS.items():
        mallory = Mallory(token)
        link = await mallory.dial(node.link_port)
        manifest, _ = await link.request(GetManifest(sha256))
        assert isinstance(manifest, Manifest)
        victim = Victim(node, link, mallory, sha256[:16], manifest)
        known = len(node.output)
        await act(victim)
        if not link.closed:
            await link.request(GetManifest(sha256))  # a link is read in order: now all has been dealt with
        assert await asyncio.to_thread(node.text, "hello", model="tiny", max_tokens=8) == text, what
        assert told(node) == before, what
        assert node.stage_process().pid == process, what
        lines = [line for line in node.output[known:] if "mallory" in line or (says and says in line)]
        assert len(lines) == (1 if says else 0), (what, node.output[known:])
        assert all(says in line for line in lines), (what, lines)
        await mallory.endpoint.close()
