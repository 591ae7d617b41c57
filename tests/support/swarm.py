"""Real daemons for tests: started as processes, watched through their public feed and their log, never by sleeping."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import psutil
from support.answers import MODEL, Answer, Stream, answer_of, chat_body
from support.host_faults import stages_of
from support.netns import connect

from swarmd.node.models.store import ModelStore

START_SECONDS = 60.0


class Refusal(AssertionError):
    """A request was answered with an error status: that, its headers and its JSON body."""

    def __init__(self, request: str, status: int, headers: dict[str, str], body: Any) -> None:
        super().__init__(f"{request}: {status} {body!r}")
        self.status, self.headers, self.body = status, headers, body


class _Connection(http.client.HTTPConnection):
    """HTTP from within a namespace."""

    def __init__(self, namespace: str | None, host: str, port: int, timeout: float | None) -> None:
        super().__init__(host, port, timeout=timeout)
        self._namespace = namespace

    def connect(self) -> None:
        self.sock = connect(self._namespace, self.host, self.port, self.timeout)


class Node:
    """One daemon. `output` collects its log; the process is ended when the test leaves.

    `living` lists the nodes that no test has left yet, dead ones among them.
    """

    living: ClassVar[list[Node]] = []

    def __init__(
        self, data_dir: Path, *options: str, namespace: str | None = None, environment: dict[str, str] | None = None
    ) -> None:
        self.data_dir = data_dir
        self.name = data_dir.name
        self.namespace = namespace
        self.output: list[str] = []
        self._url = ""
        self._said = threading.Condition()
        self._ended = False
        command = [sys.executable, "-m", "swarmd.node.cli.app", "--data-dir", str(data_dir), "--name", self.name]
        if "--listen" not in options:
            command += ["--listen", "127.0.0.1:0"]
        if "--port" not in options:
            command += ["--port", "0"]
        prefix = ["ip", "netns", "exec", namespace] if namespace else []
        clean = {key: value for key, value in os.environ.items() if not key.startswith("SWARMD_")}
        self.process = subprocess.Popen(
            [*prefix, *command, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            env=clean | {"PYTHONUNBUFFERED": "1"} | (environment or {}),
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.living.append(self)

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.living.remove(self)

    @property
    def url(self) -> str:
        """Where it answers; waits until it says so."""
        with self._said:
            if not self._said.wait_for(lambda: self._url or self._ended, START_SECONDS) or not self._url:
                raise AssertionError(f"the node did not come up:\n{self.log}")
        return self._url

    @property
    def running(self) -> bool:
        """Whether the daemon has not ended."""
        return self.process.poll() is None

    @property
    def is_up(self) -> bool:
        """Whether it runs and has said where it answers."""
        return self.running and bool(self._url)

    @property
    def log(self) -> str:
        """All that it has said."""
        return "".join(self.output)

    @cached_property
    def id(self) -> str:
        """Its node id."""
        return self.get("/api/swarm")["self"]

    @cached_property
    def link_port(self) -> int:
        """The port on which it accepts links."""
        [own] = [node for node in self.get("/api/swarm")["nodes"] if node["self"]]
        return int(own["addresses"][0].rpartition(":")[2])

    def token(self) -> str:
        """The join token of the swarm that it founded; waits until it is up."""
        assert self.url
        [token] = re.findall(r"swarmd1-\S+", self.command("token"))
        return token

    def command(self, *arguments: str) -> str:
        """What `swarmd ARGUMENTS` on this node's data dir prints."""
        command = [sys.executable, "-m", "swarmd.node.cli.app", "--data-dir", str(self.data_dir), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def stage_process(self) -> psutil.Process:
        """Its stage process; there must be exactly one."""
        [stage] = stages_of(self.process.pid)
        return stage

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it, gently by default, and wait."""
        if self.process.poll() is None:
            self.process.send_signal(number)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(5)
        self._reader.join(5)

    def kill(self) -> None:
        """SIGKILL: no goodbye."""
        self.process.kill()
        self.process.wait(5)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """All its processes stand still, as on a machine that hangs or is cut off: its connections stay, silent."""
        daemon = psutil.Process(self.process.pid)
        processes = [daemon, *daemon.children()]
        for process in processes:
            process.suspend()
        try:
            yield
        finally:
            for process in processes:
                process.resume()

    def request(
        self, method: str, path: str, body: object = None, timeout: float | None = 60
    ) -> http.client.HTTPResponse:
        """An HTTP request; `body` is sent as JSON, bytes as they are. Closing the response closes the connection."""
        parts = urlsplit(self.url)
        connection = _Connection(self.namespace, parts.hostname or "", parts.port or 0, timeout)
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request(method, path, data, {"Content-Type": "application/json", "Connection": "close"})
        return connection.getresponse()

    def get(self, path: str) -> Any:
        """The JSON at a path."""
        return json.loads(self.request("GET", path).read())

    def post(self, path: str, body: object, timeout: float | None = 120) -> tuple[int, Any]:
        """(status, JSON answer)."""
        response = self.request("POST", path, body, timeout)
        return response.status, json.loads(response.read())

    def events(
        self, method: str, path: str, body: object = None, timeout: float | None = 60
    ) -> Iterator[tuple[str, Any]]:
        """Server-sent events as (event, data), until `[DONE]` or the end; `timeout` is for each read.

        Closing the iterator closes the connection. Raises Refusal for an error status.
        """
        event = ""
        with self.request(method, path, body, timeout) as response:
            if response.status != 200:
                refused, headers = json.loads(response.read()), dict(response.getheaders())
                raise Refusal(f"{method} {path}", response.status, headers, refused)
            for raw in response:
                line = raw.decode().rstrip("\n")
                if line.startswith("event: "):
                    event = line[7:]
                elif line == "data: [DONE]":
                    yield "done", None
                    return
                elif line.startswith("data: "):
                    yield event, json.loads(line[6:])

    def until(self, wanted: Callable[[dict[str, Any]], object], seconds: float = 60) -> dict[str, Any]:
        """The first state of the swarm, as this node's feed tells it, that `wanted` accepts."""
        deadline = time.monotonic() + seconds
        state: dict[str, Any] = {}
        try:
            for event, data in self.events("GET", "/api/events", timeout=seconds):
                if event == "swarm":
                    state = data
                    if wanted(state):
                        return state
                if time.monotonic() > deadline:
                    break
        except TimeoutError:
            pass
        raise AssertionError(f"not within {seconds} s; last state:\n{json.dumps(state, indent=1)}\n{self.log}")

    def until_ready(self, stages: int | None = None, seconds: float = 90) -> dict[str, Any]:
        """The instance, once one is ready (with so many stages, if given)."""

        def ready(instance: dict[str, Any]) -> bool:
            return instance["state"] == "ready" and (stages is None or len(instance["stages"]) == stages)

        state = self.until(lambda state: any(map(ready, state["instances"])), seconds)
        return next(filter(ready, state["instances"]))

    def until_members(self, count: int, seconds: float = 30) -> dict[str, Any]:
        """The state once so many nodes, itself included, are alive."""
        return self.until(lambda s: sum(n["state"] == "alive" for n in s["nodes"]) >= count, seconds)

    def until_load(self, wanted: Callable[[dict[str, int]], object], seconds: float = 20) -> None:
        """Wait until the load of the one instance, as this node's feed tells it, is as wanted."""
        self.until(lambda state: any(wanted(instance["load"]) for instance in state["instances"]), seconds)

    def until_said(self, pattern: str, seconds: float = 30) -> str:
        """The first line of its log, early or late, that the regular expression is found in."""

        def line() -> str | None:
            return next((line for line in self.output if re.search(pattern, line)), None)

        with self._said:
            self._said.wait_for(lambda: line() or self._ended, seconds)
        found = line()
        assert found is not None, f"no line like {pattern!r} within {seconds} s:\n{self.log}"
        return found

    def serve(self, model: str | Path = MODEL) -> None:
        """Have it start an instance of a model."""
        status, answer = self.post("/api/instances", {"model": str(model)})
        assert status == 202, answer

    def chat(self, prompt: str, timeout: float | None = 120, **options: Any) -> Any:
        """The JSON of a chat completion, greedy unless told otherwise; raises AssertionError for an error status."""
        status, answer = self.post("/v1/chat/completions", chat_body(prompt, **options), timeout)
        assert status == 200, answer
        return answer

    def text(self, prompt: str, **options: Any) -> str:
        """The text of a chat completion."""
        return self.chat(prompt, **options)["choices"][0]["message"]["content"]

    def answer(self, prompt: str, timeout: float | None = 120, **options: Any) -> Answer:
        """The answer to a question, not streamed; greedy unless told otherwise."""
        return answer_of(self.chat(prompt, timeout, **options))

    def stream(self, prompt: str, timeout: float = 60, **options: Any) -> Stream:
        """The answer to a question as a stream; `timeout` is the longest silence allowed, in seconds."""
        asked = chat_body(prompt, stream=True, stream_options={"include_usage": True}, **options)
        return Stream(self.events("POST", "/v1/chat/completions", asked, timeout))

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._said:
                self.output.append(line)
                if "dashboard:" in line:
                    self._url = line.split()[-1]
                self._said.notify_all()
        with self._said:
            self._ended = True
            self._said.notify_all()


def join(token: str, data_dir: Path, *options: str, namespace: str | None = None) -> Node:
    """A daemon that joins a swarm."""
    return Node(data_dir, *options, "join", namespace=namespace, environment={"SWARMD_TOKEN": token})


def give_model(data_dir: Path, model: Path) -> None:
    """Register a model file in the store of a node that does not run yet, by reference: nothing is copied."""
    data_dir.mkdir(mode=0o700, exist_ok=True)
    asyncio.run(ModelStore(data_dir / "models").ensure(str(model), lambda progress: None))
