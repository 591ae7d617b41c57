"""One node with two stages of one model: real stage processes, wired to each other over loopback."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec import Struct
from support.swarm import Node
from support.tiny_gguf import TinyModel, write_tiny_gguf

from swarmd.discovery.records import Address
from swarmd.node.data_dir import DataDir
from swarmd.node.engine.computes import require_backend
from swarmd.node.engine.sampling_params import SamplingParams
from swarmd.node.serving.messages import DATA_MESSAGES, Connect, Generate, LoadEngine, Token
from swarmd.node.serving.stage_host import StageHost
from swarmd.transport.endpoint import Endpoint
from swarmd.transport.identity import issue_credentials, save_credentials
from swarmd.transport.link import PROTOCOL_VERSION, Hello, Link, Vocabulary
from swarmd.transport.token import JoinToken

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

LAYERS = 4
HERE = "127.0.0.1"


class Daemon:
    """As much of a daemon as stage processes need: links from its own stages, and to their driver."""

    def __init__(self, data_dir: Path) -> None:
        DataDir(data_dir).create()
        self.credentials = issue_credentials(Ed25519PrivateKey.generate(), JoinToken.generate())
        save_credentials(data_dir, self.credentials)
        self.lost: asyncio.Queue[int] = asyncio.Queue()
        self.port = 0
        self.host = StageHost(
            data_dir,
            "node",
            lambda: self.port,
            on_lost=lambda job, reason: self.lost.put_nowait(job.index),
            on_progress=lambda job, done, total: None,
            on_load=lambda: None,
        )
        hello = Hello(PROTOCOL_VERSION, "daemon", "node", "test")
        self.endpoint = Endpoint(self.credentials, Vocabulary(DATA_MESSAGES), self, hello=lambda: hello)

    async def on_link(self, link: Link) -> None:
        assert link.initiator or self.host.on_link(link)

    async def on_message(self, link: Link, message: Struct, payload: bytearray) -> None:
        await self.host.on_message(link, message)

    async def on_request(self, link: Link, message: Struct, payload: bytearray) -> Struct:
        raise AssertionError(message)

    def on_stream(self, link: Link, message: Struct, payload: bytearray) -> AsyncIterator[Struct]:
        raise AssertionError(message)

    async def on_closed(self, link: Link, reason: str) -> None:
        self.host.on_closed(link, reason)

    async def serve(self, model: Path, instance: str, *cuts: int) -> int:
        """Bring up one stage between each two cuts, and wire them; the driver's port."""
        jobs = [
            LoadEngine(instance, 1, str(model), False, start, end, 256, 256, 1, index=index)
            for index, (start, end) in enumerate(itertools.pairwise(cuts))
        ]
        loaded = await asyncio.gather(*map(self.host.start, jobs))
        for index in range(len(jobs)):
            following = Address(HERE, loaded[(index + 1) % len(jobs)].port)
            wiring = Connect(len(jobs), self.credentials.node_id, (following,), "f32")
            await self.host.connect(instance, 1, index, wiring)
        return loaded[0].port

    async def generate(self, instance: str, port: int) -> list[int]:
        link = await self.endpoint.dial(HERE, port, expect=self.credentials.node_id)
        asked = Generate(instance, 1, (5, 17, 3, 8), SamplingParams(temperature=0.0, prompt_tokens=4), 24, ())
        async with link.stream(asked) as items:
            return [item.token async for item in items if isinstance(item, Token)]


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Daemon]:
    daemon = Daemon(tmp_path / "node")
    daemon.port = await daemon.endpoint.listen(None, 0)
    yield daemon
    await daemon.host.close()
    await daemon.endpoint.close()


async def test_they_answer_as_one_stage_and_the_loss_of_one_is_told(daemon: Daemon, tmp_path: Path):
    model = write_tiny_gguf(tmp_path / "tiny.gguf", TinyModel(n_layers=LAYERS))
    alone = await daemon.serve(model, "alone", 0, LAYERS)
    split = await daemon.serve(model, "split", 0, 1, LAYERS)
    assert [(job.instance, job.index) for job in daemon.host.jobs] == [("alone", 0), ("split", 0), ("split", 1)]
    expected = await daemon.generate("alone", alone)
    assert len(expected) == 24
    assert len(set(expected)) > 1
    assert await daemon.generate("split", split) == expected
    children = [p for p in psutil.Process().children() if "swarmd.node.serving.stage_main" in p.cmdline()]
    max(children, key=lambda process: process.create_time()).kill()
    async with asyncio.timeout(20):
        both = {await daemon.lost.get(), await daemon.lost.get()}
    assert both == {0, 1}, "the one that was killed, and its neighbour in the ring"
    await daemon.host.stop("split", 1)
    assert [job.instance for job in daemon.host.jobs] == ["alone"]
    assert await daemon.generate("alone", alone) == expected, "another instance goes on"


def why_no_mlx() -> str:
    """Why no stage can compute with MLX here; empty if one can."""
    if importlib.util.find_spec("mlx") is None:
        return "MLX is not installed (pip install 'mlx[cpu]')"
    try:
        require_backend("mlx-cpu")
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.skipif(bool(why_no_mlx()), reason=why_no_mlx())
def test_a_node_with_two_devices_has_a_stage_on_each_and_comes_back_after_a_loss(smollm2_path: Path, tmp_path: Path):
    options = ("--device", "cpu,mlx-cpu", "--memory", "cpu=400MB,mlx-cpu=800MB", "--split", "--context", "1024")
    with Node(tmp_path / "both", *options, "--model", str(smollm2_path), "--no-mdns", "--threads", "1") as node:
        instance = node.until_ready(stages=2)
        assert {stage["device"] for stage in instance["stages"]} == {"cpu", "mlx-cpu"}
        [own] = node.get("/api/swarm")["nodes"]
        assert [(d["id"], d["kind"], d["memory_limit"]) for d in own["devices"]] == [
            ("mlx-cpu", "mlx", 400_000_000),  # half: its KV cache is fp32
            ("cpu", "cpu", 400_000_000),
        ]
        before = node.answer("What is the capital of France?", max_tokens=12)
        assert "Paris" in before.text
        printed = node.command("status")
        assert "mlx-cpu" in printed
        children = psutil.Process(node.process.pid).children()
        stages = [child for child in children if "swarmd.node.serving.stage_main" in child.cmdline()]
        assert len(stages) == 2
        stages[0].kill()
        node.until(lambda s: any(i["epoch"] > instance["epoch"] and i["state"] == "ready" for i in s["instances"]), 90)
        assert node.answer("What is the capital of France?", max_tokens=12) == before
