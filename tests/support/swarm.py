"""Real daemons for tests: started as processes, watched through their public feed, never by sleeping."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from support.netns import connect

START_SECONDS = 60.0


class _Connection(http.client.HTTPConnection):
    """HTTP from within a namespace."""

    def __init__(self, namespace: str | None, host: str, port: int, timeout: float | None) -> None:
        super().__init__(host, port, timeout=timeout)
        self._namespace = namespace

    def connect(self) -> None:
        self.sock = connect(self._namespace, self.host, self.port, self.timeout)


class Node:
    """One daemon. `output` collects its log; the process is killed when the test leaves."""

    def __init__(
        self, data_dir: Path, *options: str, namespace: str | None = None, environment: dict[str, str] | None = None
    ) -> None:
        self.data_dir = data_dir
        self.namespace = namespace
        self.output: list[str] = []
        self._url = ""
        self._has_url = threading.Event()
        command = [sys.executable, "-m", "swarmd.node.cli.app", "--data-dir", str(data_dir), "--name", data_dir.name]
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

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Where it answers; waits until it says so."""
        if not self._has_url.wait(START_SECONDS) or not self._url:
            raise AssertionError(f"the node did not come up:\n{self.log}")
        return self._url

    @property
    def log(self) -> str:
        """All that it has said."""
        return "".join(self.output)

    @property
    def id(self) -> str:
        """Its node id."""
        return self.get("/api/swarm")["self"]

    @property
    def link_port(self) -> int:
        """The port on which it accepts links."""
        [own] = [node for node in self.get("/api/swarm")["nodes"] if node["self"]]
        return int(own["addresses"][0].rpartition(":")[2])

    def token(self) -> str:
        """The join token of the swarm that it founded; waits until it is up."""
        assert self.url
        command = [sys.executable, "-m", "swarmd.node.cli.app", "--data-dir", str(self.data_dir), "token"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]

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

    def request(self, method: str, path: str, body: object = None, timeout: float | None = 60) -> http.client.HTTPResponse:
        """An HTTP request; `body` is sent as JSON, bytes as they are."""
        parts = urlsplit(self.url)
        connection = _Connection(self.namespace, parts.hostname or "", parts.port or 0, timeout)
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request(method, path, data, {"Content-Type": "application/json"})
        return connection.getresponse()

    def get(self, path: str) -> Any:
        """The JSON at a path."""
        return json.loads(self.request("GET", path).read())

    def post(self, path: str, body: object, timeout: float | None = 120) -> tuple[int, Any]:
        """(status, JSON answer)."""
        response = self.request("POST", path, body, timeout)
        return response.status, json.loads(response.read())

    def events(self, method: str, path: str, body: object = None, timeout: float | None = 60) -> Iterator[tuple[str, Any]]:
        """Server-sent events as (event, data), until `[DONE]` or the end; `timeout` is for each read."""
        response = self.request(method, path, body, timeout)
        event = ""
        for raw in response:
            line = raw.decode().rstrip("\n")
            if line.startswith("event: "):
                event = line[7:]
            elif line == "data: [DONE]":
                yield "done", None
                return
            elif line.startswith("data: "):
                yield event, json.loads(line[6:])

    def until(self, wanted: Callable[[dict[str, Any]], bool], seconds: float = 60) -> dict[str, Any]:
        """The first state of the swarm, as this node's feed tells it, that `wanted` accepts."""
        deadline = time.monotonic() + seconds
        state: dict[str, Any] = {}
        for event, data in self.events("GET", "/api/events", timeout=seconds):
            if event == "swarm":
                state = data
                if wanted(state):
                    return state
            if time.monotonic() > deadline:
                break
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

    def chat(self, prompt: str, timeout: float | None = 120, **options: Any) -> Any:
        """The JSON of a chat completion, greedy unless told otherwise; raises AssertionError for an error status."""
        body = {"model": "smollm2:135m", "messages": [{"role": "user", "content": prompt}], "temperature": 0}
        status, answer = self.post("/v1/chat/completions", body | options, timeout)
        assert status == 200, answer
        return answer

    def text(self, prompt: str, **options: Any) -> str:
        """The text of a chat completion."""
        return self.chat(prompt, **options)["choices"][0]["message"]["content"]

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output.append(line)
            if "dashboard:" in line:
                self._url = line.split()[-1]
                self._has_url.set()
        self._has_url.set()


def join(token: str, data_dir: Path, *options: str, namespace: str | None = None) -> Node:
    """A daemon that joins a swarm."""
    return Node(data_dir, *options, "join", namespace=namespace, environment={"SWARMD_TOKEN": token})
