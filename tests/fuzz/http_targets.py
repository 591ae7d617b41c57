"""Targets: what HTTP clients send."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from contextlib import AsyncExitStack
from random import Random
from typing import Any, cast

from fuzz.engine import Target
from fuzz.mutate import mutate
from fuzz.trees import change, junk
from support.fake_node import MODEL, FakeNode, serving

from swarmd.node.api import key_guard
from swarmd.node.api.errors import ApiError
from swarmd.node.api.openai_schema import ChatRequest, CompletionRequest, parse
from swarmd.node.api.swarm import InstanceRequest
from swarmd.node.engine.sampling_params import MAX_SCHEMA

CHAT: dict[str, Any] = {
    "model": MODEL,
    "messages": [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "é😀"}], "name": "x"},
        {"role": "assistant", "content": None, "refusal": None},
    ],
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.05,
    "seed": -(2**63),
    "presence_penalty": -2.0,
    "frequency_penalty": 2,
    "repetition_penalty": 1.1,
    "logit_bias": {"15": -100, "0": 3.5},
    "stop": ["\n", "end"],
    "stream": False,
    "stream_options": {"include_usage": True},
    "n": 1,
    "user": "me",
    "metadata": {"a": "b"},
    "store": False,
    "service_tier": "auto",
    "max_tokens": 5,
    "max_completion_tokens": 7,
    "logprobs": True,
    "top_logprobs": 3,
    "response_format": {
        "type": "json_schema",
        "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True},
    },
    "modalities": ["text"],
}
_CHAT_ONLY = ("messages", "max_completion_tokens", "top_logprobs", "response_format", "modalities")
TEXT: dict[str, Any] = {key: value for key, value in CHAT.items() if key not in _CHAT_ONLY} | {
    "prompt": [1, 2, 3],
    "logprobs": 2,
    "echo": False,
    "best_of": 1,
}
BODIES: tuple[dict[str, Any], ...] = (CHAT, TEXT, TEXT | {"prompt": "hi"}, {"model": MODEL})
_KINDS = (ChatRequest, CompletionRequest, InstanceRequest)


def body(random: Random) -> bytes:
    """A request's body with up to three things wrong in it."""
    value: Any = random.choice(BODIES)
    value = {key: item for key, item in value.items() if random.random() < 0.85}
    for _ in range(random.randrange(4)):
        value = change(random, value)
    return json.dumps(value, ensure_ascii=random.random() < 0.5).encode(errors="surrogatepass")


class HttpBodies(Target):
    """Bodies of all POSTs, without a socket. What is taken keeps the bounds that the schema states."""

    name = "http bodies"
    errors = (ApiError,)
    memory_per_byte = 128
    share = 3.0

    def seeds(self) -> list[bytes]:
        return [json.dumps(one).encode() for one in BODIES]

    def make(self, random: Random, pool: list[bytes]) -> bytes:
        if random.random() < 0.3:
            return mutate(random, random.choice(pool), random.choice(pool))
        return body(random)

    def run(self, data: bytes) -> str:
        refusal, outcome = None, ""
        for kind in _KINDS:
            try:
                asked = parse(data, kind)
                outcome += f"{kind.__name__} "
                if not isinstance(asked, InstanceRequest):
                    self._check(asked)
            except ApiError as error:
                assert error.status == 400
                assert error.response().body
                refusal = error
        if not outcome and refusal is not None:
            raise refusal
        return outcome

    def _check(self, asked: ChatRequest | CompletionRequest) -> None:
        wanted = asked.generation()
        assert 0 <= wanted.sampling.temperature <= 2
        assert 0 < wanted.sampling.top_p <= 1
        assert -(2**63) <= wanted.sampling.seed < 2**63
        assert len(wanted.sampling.logit_bias) <= 1024
        assert len(wanted.sampling.json_schema) <= MAX_SCHEMA
        assert len(wanted.stop) <= 8
        assert wanted.max_tokens is None or wanted.max_tokens > 0
        assert wanted.messages is None or 1 <= len(wanted.messages) <= 4096


_TURNS = 60
"""Of the loop without any answer, after which none is to come."""
_HEADERS = (
    "Host: 127.0.0.1",
    "Host: localhost:80",
    "Host: evil.example",
    "Host: [::1",
    "Host:",
    "Origin: http://evil.example",
    "Origin: null",
    "Authorization: Bearer KEY",
    "Authorization: Bearer \xff\xe9",
    "Authorization: ",
    "Content-Type: application/json",
    "Content-Type: multipart/form-data; boundary=x",
    "Content-Encoding: gzip",
    "Content-Encoding: deflate",
    "Content-Encoding: br",
    "Transfer-Encoding: chunked",
    "Content-Length: 0",
    "Content-Length: -1",
    "Content-Length: 99999999999999999999",
    "Expect: 100-continue",
    "Connection: close",
    "Connection: upgrade",
    "Upgrade: websocket",
    "Range: bytes=0-",
    "If-None-Match: *",
    "X: " + "y" * 9000,
)
_PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/api/instances",
    "/v1/models",
    "/v1/models/" + MODEL,
    "/api/swarm",
    "/health",
    "/metrics",
    "/",
    "/assets/../../etc/passwd",
    "/assets/%2e%2e/%2e%2e/etc/passwd",
    "/%ff%00",
    "//",
    "*",
    "http://127.0.0.1/health",
    "/" + "a" * 9000,
)


def request(random: Random) -> bytes:
    """A request, mostly sound in its framing."""
    content = body(random) if random.random() < 0.8 else json.dumps(junk(random)).encode()
    usual = ("Content-Type: application/json", "Authorization: Bearer KEY")
    headers = [random.choice(_HEADERS[:2]), *(h for h in usual if random.random() < 0.9)]
    headers += [h for h in _HEADERS if random.random() < 0.04]
    if random.random() < 0.9:
        headers.append(f"Content-Length: {len(content) + random.choice((0, 0, 0, 0, 1, -1))}")
    method = random.choice(("POST", "POST", "POST", "GET", "HEAD", "OPTIONS", "PUT", "P\0ST", "get"))
    path = random.choice(_PATHS[:3]) if random.random() < 0.6 else random.choice(_PATHS)
    version = random.choice(("1.1", "1.1", "1.1", "1.0", "2.0", "9", "1.1 x"))
    return "\r\n".join([f"{method} {path} HTTP/{version}", *headers, "", ""]).encode("latin-1") + content


class _Client(asyncio.Protocol):
    def __init__(self) -> None:
        self.answer = bytearray()
        self.ended = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.answer += data

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended = True


class HttpBytes(Target):
    """Raw bytes to the real server over loopback, on one connection that is then ended: whatever comes, the answers are
    HTTP, none says 500, nothing is logged as an error, and the next connection is served.
    """

    name = "http server"
    memory = 24 << 20
    share = 0.15

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._stack = AsyncExitStack()
        self._node = FakeNode()
        self._port = 0
        self._troubles: list[str] = []

    def seeds(self) -> list[bytes]:
        if not self._port:
            self._loop.set_exception_handler(lambda _, context: self._troubles.append(f"the loop: {context}"))
            logging.getLogger().addHandler(_Errors(self._troubles))
            key_guard.WRONG_KEY_SECONDS = 0.0
            url = self._loop.run_until_complete(self._stack.enter_async_context(serving(self._node, api_key="KEY")))
            self._port = int(url.rpartition(":")[2])
        return [request(Random(number)) for number in range(30)]

    def make(self, random: Random, pool: list[bytes]) -> bytes:
        if random.random() < 0.5:
            return request(random) * random.choice((1, 1, 1, 3))
        return mutate(random, random.choice(pool), request(random))

    def run(self, data: bytes) -> str:
        self._troubles.clear()
        self._node.requests.clear()
        self._node.launched.clear()
        answer = self._loop.run_until_complete(asyncio.wait_for(self._talk(data), 30))
        assert not self._troubles, self._troubles[0]
        if not answer:
            return "nothing"
        assert answer.startswith(b"HTTP/"), answer[:80]
        status = answer.split(b" ", 2)[1][:3].decode("latin-1")
        assert status != "500" or b"expect:" in data.lower(), answer[:400]  # see node/api/malformed.py
        code = re.search(rb'"code":"?([a-z_]+)', answer)
        return f"{status} {code[1].decode() if code else ''}"

    async def _talk(self, data: bytes) -> bytes:
        """What is answered until the server is at rest: it runs on this same loop, and waits for nothing but us."""
        _, client = await self._loop.create_connection(_Client, "127.0.0.1", self._port)
        client.transport.write(data)
        turns = seen = 0
        while turns < _TURNS and not client.ended:
            await asyncio.sleep(0)
            turns = 0 if len(client.answer) > seen else turns + 1
            seen = len(client.answer)
        client.transport.abort()
        return bytes(client.answer)

    def close(self) -> None:
        for handler in logging.getLogger().handlers:
            if isinstance(handler, _Errors):
                logging.getLogger().removeHandler(handler)
        self._loop.run_until_complete(self._stack.aclose())
        self._loop.close()


class _Errors(logging.Handler):
    def __init__(self, troubles: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._troubles = troubles

    def emit(self, record: logging.LogRecord) -> None:
        self._troubles.append(
            f"the log: {record.name}: {record.getMessage()} {record.exc_info and record.exc_info[1]!r}"
        )
