"""The processes that bench/hop_cost.py measures: an entry process with an HTTP endpoint, and stages without tensors."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import sys
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec import Struct
from support.tiny_tokenizers import byte_level_metadata

from swarmd.discovery.records import Address, InstanceRecord, InstanceState, ModelSummary
from swarmd.node.api.server import HttpServer, make_app
from swarmd.node.cluster.signal import Signal
from swarmd.node.metrics import Metrics
from swarmd.node.models.text_process import ModelText
from swarmd.node.models.tokenizer import Tokenizer
from swarmd.node.serving.gateway import Gateway, Prepared
from swarmd.node.serving.generation import Ending, GenerationRequest, Piece
from swarmd.node.serving.messages import DATA_MESSAGES, Connect, EngineLoaded, LoadEngine
from swarmd.node.serving.prompt_wakeup import wake_promptly
from swarmd.node.serving.stage_process import StageProcess
from swarmd.transport.endpoint import Endpoint
from swarmd.transport.identity import issue_credentials, load_credentials, save_credentials
from swarmd.transport.link import PROTOCOL_VERSION, Hello, Link, Vocabulary
from swarmd.transport.token import JoinToken

MODEL, INSTANCE, EPOCH = "hop", "hop-1", 1
VOCABULARY_SIZE, CONTEXT, KV_TOKENS, HIDDEN = 49152, 4096, 1 << 16, 576


@dataclass
class FakeSample:
    """As the engine's own."""

    seq: int
    position: int
    token: int
    logprob: float = -1.0
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class FakeResult:
    """As the engine's own."""

    payload: memoryview | None
    samples: tuple[FakeSample, ...]


class FakeEngine:
    """An engine in shape only: hidden states of the right size, tokens that never repeat a pattern.

    `burn` bytes are hashed per step: work in one native call, without the interpreter's lock.
    """

    def __init__(self, index: int, stages: int, burn: int) -> None:
        self.first, self.last = index == 0, index == stages - 1
        self.weight_bytes, self.kv_tokens = 0, KV_TOKENS
        self.kernels, self.held = "native", (0, 0)
        self._hidden = memoryview(bytearray(HIDDEN * 2 * 1024))
        self._burn = bytes(burn)

    def open(self, seq: int, sampling: Any, source: int = -1, length: int = 0) -> None:
        """Nothing is kept of a sequence."""

    def free(self, seq: int) -> None:
        """Nothing is kept of a sequence."""

    def step(self, chunks: Any, hidden: Any, dtype: str, out_dtype: str) -> FakeResult:
        """Hidden states of all rows, or a token for each chunk that asks for one."""
        if self._burn:
            hashlib.sha256(self._burn).digest()
        if not self.last:
            return FakeResult(self._hidden[: HIDDEN * 2 * sum(len(chunk.tokens) for chunk in chunks)], ())
        ends = [
            (chunk.seq, chunk.start + len(chunk.tokens) - max(int(chunk.sample) - 1, 0))
            for chunk in chunks
            if chunk.sample
        ]
        return FakeResult(None, tuple(FakeSample(seq, at, 1000 + hash((seq, at)) % 40000) for seq, at in ends))


def pin(core: int) -> None:
    """Run on one core from here on."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[core % len(cores)]})


async def stage(index: int, stages: int, data_dir: Path, daemon_port: int, burn: int) -> None:
    """A stage process as `swarmd` starts it, but for its engine."""
    credentials = load_credentials(data_dir)
    assert credentials is not None
    process = StageProcess(lambda job, report: cast(Any, FakeEngine(index, stages, burn)))
    hello = Hello(PROTOCOL_VERSION, "stage", f"stage {index}", "bench", note=str(index))
    endpoint = Endpoint(credentials, Vocabulary(DATA_MESSAGES), process, hello=lambda: hello)
    wake_promptly()
    await process.serve(endpoint, daemon_port)


@dataclass
class Front:
    """A `ModelText` without a process: it is not what is measured here."""

    tokenizer: Tokenizer

    async def encode_text(self, text: str, limit: int) -> list[int]:
        """Token ids of plain text."""
        return self.tokenizer.encode(text, add_special=True, parse_special=False)


class Entry:
    """The daemon's part: it wires the ring, and its gateway answers HTTP. Handler of its links and the API's view."""

    def __init__(self) -> None:
        self.changed = Signal()
        self.stages: dict[int, Link] = {}
        self.driver: Link | None = None
        self._metrics = Metrics()
        tokens = byte_level_metadata()["tokenizer.ggml.tokens"]
        words = [f"{chr(97 + i % 26)}{i:x}" for i in range(VOCABULARY_SIZE - len(tokens))]
        kinds = byte_level_metadata()["tokenizer.ggml.token_type"] + [1] * len(words)
        changes = {"tokenizer.ggml.tokens": tokens + words, "tokenizer.ggml.token_type": kinds}
        self._front = cast(ModelText, Front(Tokenizer.from_gguf(byte_level_metadata(**changes))))
        summary = ModelSummary(MODEL, "0" * 64, 0, CONTEXT, "none")
        self._record = InstanceRecord(INSTANCE, summary, InstanceState.READY, EPOCH)
        self._gateway = Gateway(lambda _: self._record, _no_launch, self._driver_link, self._load_front, self.changed)

    async def _driver_link(self, record: InstanceRecord) -> Link:
        assert self.driver is not None
        return self.driver

    async def _load_front(self, record: InstanceRecord) -> ModelText:
        return self._front

    async def on_link(self, link: Link) -> None:
        """A stage presents itself."""
        if link.peer.role == "stage" and not link.initiator:
            self.stages[int(link.peer.note)] = link
            self.changed.notify()

    async def on_message(self, link: Link, message: Struct, payload: bytearray) -> None:
        """Reports of stages are not used here."""

    async def on_request(self, link: Link, message: Struct, payload: bytearray) -> Any:
        """Nobody asks."""
        raise RuntimeError("nobody asks this of the bench")

    def on_stream(self, link: Link, message: Struct, payload: bytearray) -> AsyncIterator[Struct]:
        """Nobody asks."""
        raise RuntimeError("nobody asks this of the bench")

    async def on_closed(self, link: Link, reason: str) -> None:
        """The processes end together."""

    async def prepare(self, request: GenerationRequest) -> Prepared:
        """The gateway's check of a request."""
        return await self._gateway.prepare(request)

    async def observe(self, prepared: Prepared) -> AsyncGenerator[Piece | Ending]:
        """The gateway's stream, counted, as the daemon's public view does it."""
        async with (
            aclosing(self._gateway.stream(prepared)) as items,
            aclosing(self._metrics.observe(MODEL, items)) as counted,
        ):
            async for item in counted:
                yield item

    async def wire(self, endpoint: Endpoint, n_stages: int) -> None:
        """Give every stage its layers and its neighbour, as the owner of an instance does."""
        while len(self.stages) < n_stages:
            await self.changed.wait(30)
        ports = []
        for index in range(n_stages):
            job = LoadEngine(INSTANCE, EPOCH, "", False, index, index + 1, KV_TOKENS, CONTEXT, 1)
            loaded, _ = await self.stages[index].request(job)
            assert isinstance(loaded, EngineLoaded)
            ports.append(loaded.port)
        for index in range(n_stages):
            following = Address("127.0.0.1", ports[(index + 1) % n_stages])
            await self.stages[index].request(Connect(n_stages, endpoint.node_id, (following,), "bf16"))
        self.driver = await endpoint.dial("127.0.0.1", ports[0])


async def _no_launch(model: str) -> None:
    raise RuntimeError("nobody asks this of the bench")


async def entry(stages: int, burn: int) -> None:
    """Start everything, say so on standard output, and serve until standard input ends."""
    wake_promptly()
    with tempfile.TemporaryDirectory() as folder:
        credentials = issue_credentials(Ed25519PrivateKey.generate(), JoinToken.generate())
        save_credentials(Path(folder), credentials)
        parts = Entry()
        hello = Hello(PROTOCOL_VERSION, "daemon", "entry", "bench")
        endpoint = Endpoint(credentials, Vocabulary(DATA_MESSAGES), parts, hello=lambda: hello)
        port = await endpoint.listen("127.0.0.1", 0)
        rest = (str(stages), folder, str(port), str(burn))
        children = [
            await asyncio.create_subprocess_exec(sys.executable, __file__, "stage", str(index), *rest)
            for index in range(stages)
        ]
        await parts.wire(endpoint, stages)
        server = HttpServer(make_app(cast(Any, parts), api_key=None, known_hosts=frozenset({"127.0.0.1"})))
        await server.start(("127.0.0.1", 0))
        pids = {"entry": os.getpid()} | {f"stage {i}": child.pid for i, child in enumerate(children)}
        print(msgspec.json.encode({"port": int(server.url.rpartition(":")[2]), "pids": pids}).decode(), flush=True)
        await asyncio.to_thread(sys.stdin.read)
        await server.close()
        await endpoint.close()
        for child in children:
            await child.wait()


def main() -> None:
    """One of the two kinds of process."""
    kind, *rest = sys.argv[1:]
    if kind == "stage":
        index, stages, folder, port, burn = rest
        pin(int(index))
        asyncio.run(stage(int(index), int(stages), Path(folder), int(port), int(burn)))
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("--stages", type=int, required=True)
    parser.add_argument("--burn", type=int, required=True)
    options = parser.parse_args(rest)
    pin(0)
    asyncio.run(entry(options.stages, options.burn))


if __name__ == "__main__":
    main()
