"""Stage processes that are none: a `StageHost` starts them as real ones, and the test says how they fare."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec import Struct

from swarmd.discovery.records import Address
from swarmd.node.serving import stage_host
from swarmd.node.serving.messages import Connect, Connected, EngineLoaded, LoadEngine
from swarmd.node.serving.stage_host import StageHost
from swarmd.transport.link import LinkClosed, RemoteError


class FakeStage:
    """A process and its link with the daemon in one. Of `loading` its layers are not all there until it is set."""

    def __init__(self, pid: int, ticket: str, loading: asyncio.Event) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self.peer = SimpleNamespace(note=ticket)
        self.job: LoadEngine | None = None
        self.next: tuple[Address, ...] | None = None
        self.deaf = False
        self.told: list[Struct] = []
        self.refuses = False
        self._loading = loading
        self._ended = asyncio.Event()

    async def request(self, message: Struct, *, timeout: float | None) -> tuple[Struct, bytes]:
        """What a real one answers."""
        if isinstance(message, LoadEngine):
            if self.refuses:
                raise RemoteError("busy", "this process holds other layers")
            self.job = message
            waiting = [asyncio.ensure_future(event.wait()) for event in (self._loading, self._ended)]
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for one in waiting:
                one.cancel()
            if self.returncode is not None:
                raise LinkClosed("the process is gone")
            return EngineLoaded(7000 + self.pid, 1000), b""
        assert isinstance(message, Connect)
        self.next = message.next_addresses
        return Connected(), b""

    def send_soon(self, message: Struct) -> None:
        """It hears."""
        self.told.append(message)

    def end(self, code: int) -> None:
        """The process ends."""
        if self.returncode is None:
            self.returncode = code
            self._ended.set()

    def terminate(self) -> None:
        """SIGTERM, which a deaf one does not hear."""
        if not self.deaf:
            self.end(-15)

    def kill(self) -> None:
        """SIGKILL."""
        self.end(-9)

    async def wait(self) -> int:
        """The exit code, once there is one."""
        await self._ended.wait()
        assert self.returncode is not None
        return self.returncode


class FakeStages:
    """All stages that were ever started, in order; `loading` is set, or holds back those that load. While `mute` is
    true those that start do not present themselves."""

    def __init__(self) -> None:
        self.all: list[FakeStage] = []
        self.loading = asyncio.Event()
        self.loading.set()
        self.host: StageHost | None = None
        self.mute = False

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Start these in place of processes."""
        monkeypatch.setattr(stage_host.asyncio, "create_subprocess_exec", self._start)

    @property
    def running(self) -> list[FakeStage]:
        """Those whose process has not ended."""
        return [stage for stage in self.all if stage.returncode is None]

    async def _start(self, *arguments: str, **options: object) -> FakeStage:
        stage = FakeStage(len(self.all) + 1, arguments[arguments.index("--ticket") + 1], self.loading)
        self.all.append(stage)
        assert self.host is not None
        link: Any = stage
        if not self.mute:
            asyncio.get_running_loop().call_soon(self.host.on_link, link)
        return stage
