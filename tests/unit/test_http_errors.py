"""Whatever goes wrong, the client gets JSON in OpenAI's shape, the right status and a sentence that helps."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest
from support.fake_node import MODEL, FakeNode, piece, serving
from support.link_fakes import eventually

from swarmd.node.api.server import MAX_BODY_BYTES, HttpServer, make_app
from swarmd.node.config import ConfigError
from swarmd.node.serving.generation import Ending, GenerationError

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
JSON = {"Content-Type": "application/json"}


async def call(url: str, method: str, path: str, **options: Any) -> tuple[int, Any, Any]:
    async with aiohttp.ClientSession() as session, session.request(method, url + path, **options) as response:
        assert response.content_type == "application/json"
        body = await response.json()
        if response.status >= 400:
            assert set(body) == {"error"}
            assert set(body["error"]) == {"message", "type", "param", "code"}
        return response.status, body, response.headers


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/api/instances"])
@pytest.mark.parametrize(
    ("body", "code"),
    [(b"{", "invalid_json"), (b"", "invalid_json"), (b"[1]", "invalid_value"), (b"\xff\xfe", "invalid_json")],
)
async def test_a_body_that_is_no_request(path: str, body: bytes, code: str):
    async with serving(FakeNode()) as url:
        status, answer, _ = await call(url, "POST", path, data=body, headers=JSON)
    assert (status, answer["error"]["code"]) == (400, code)
    assert answer["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", CHAT | {"max_tokens": -5}, "max_tokens"),
        ("/v1/chat/completions", CHAT | {"temperature": "warm"}, "temperature"),
        ("/v1/chat/completions", CHAT | {"tools": [{"type": "function"}]}, "tools"),
        ("/v1/completions", {"model": MODEL, "prompt": {"text": "hi"}}, "prompt"),
        ("/api/instances", {"model": 3}, "model"),
        ("/api/instances", {}, "model"),
        ("/api/instances", {"model": "m", "where": "here"}, "where"),
    ],
)
async def test_a_parameter_at_fault_is_named(path: str, body: dict[str, object], param: str):
    node = FakeNode()
    async with serving(node) as url:
        status, answer, _ = await call(url, "POST", path, json=body)
    assert (status, answer["error"]["param"]) == (400, param)
    assert param in answer["error"]["message"]
    assert node.requests == node.launched == []


async def test_a_body_that_is_too_large():
    async with serving(FakeNode()) as url:
        status, answer, _ = await call(
            url, "POST", "/v1/chat/completions", data=b" " * (MAX_BODY_BYTES + 1), headers=JSON
        )
    assert (status, answer["error"]["code"]) == (413, "too_large")
    assert "16 MiB" in answer["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/nothing", "/api", "/v2/chat/completions", "/v1/models/"])
async def test_a_path_where_nothing_is(path: str):
    async with serving(FakeNode()) as url:
        status, answer, _ = await call(url, "GET", path)
    assert (status, answer["error"]["code"]) == (404, "not_found")
    assert path in answer["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("GET", "/v1/chat/completions", "POST"), ("DELETE", "/v1/models", "GET"), ("PUT", "/api/instances", "POST")],
)
async def test_a_method_that_a_path_does_not_know(method: str, path: str, allowed: str):
    async with serving(FakeNode()) as url:
        status, answer, headers = await call(url, method, path)
    assert (status, answer["error"]["code"]) == (405, "method_not_allowed")
    assert allowed in answer["error"]["message"]
    assert allowed in headers["Allow"]


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("model_not_found", 404, "invalid_request_error"),
        ("context_length_exceeded", 400, "invalid_request_error"),
        ("overloaded", 429, "rate_limit_error"),
        ("model_loading", 503, "server_error"),
        ("not_enough_memory", 503, "server_error"),
        ("node_lost", 503, "server_error"),
        ("engine_error", 500, "server_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("when", ["prepare", "first token"])
async def test_what_the_swarm_refuses_keeps_its_status(code: str, status: int, kind: str, stream: bool, when: str):
    error = GenerationError(code, "not now, because", param="messages", retry_after=7)
    node = FakeNode(error)
    node.refusal = error if when == "prepare" else None
    async with serving(node) as url:
        given, answer, headers = await call(url, "POST", "/v1/chat/completions", json=CHAT | {"stream": stream})
    assert (given, answer["error"]["type"], answer["error"]["code"]) == (status, kind, code)
    assert (answer["error"]["message"], answer["error"]["param"]) == ("not now, because", "messages")
    assert headers["Retry-After"] == "7"


async def test_an_error_in_the_middle_of_a_stream_is_its_last_event():
    node = FakeNode(piece("Pa"), GenerationError("node_lost", "a node was lost"))
    async with (
        serving(node) as url,
        aiohttp.ClientSession() as session,
        session.post(f"{url}/v1/chat/completions", json=CHAT | {"stream": True}) as response,
    ):
        assert response.status == 200
        lines = [line for line in (await response.text()).split("\n\n") if line]
    assert "[DONE]" not in lines[-1]
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "node_lost"
    assert json.loads(lines[1].removeprefix("data: "))["choices"][0]["delta"] == {"content": "Pa"}


async def test_what_nobody_foresaw_is_an_internal_error_without_details(caplog: pytest.LogCaptureFixture):
    async with serving(FakeNode(KeyError("a secret detail"))) as url:
        status, answer, _ = await call(url, "POST", "/v1/chat/completions", json=CHAT)
    assert (status, answer["error"]["code"]) == (500, "internal")
    assert "secret" not in str(answer)
    assert "/v1/chat/completions failed" in caplog.text


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_cancels_its_generation(stream: bool):
    node = FakeNode(piece("Pa"), piece("ris"), Ending("stop", 1, 2))
    node.hold.clear()
    async with serving(node) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        body = json.dumps(CHAT | {"stream": stream}).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        if stream:
            await reader.readuntil(b"Pa")
        else:
            await eventually(lambda: bool(node.requests))
        writer.transport.abort()
        async with asyncio.timeout(10):
            await node.left.wait()


async def test_an_address_in_use_is_named_with_its_option():
    async with serving(FakeNode()) as url:
        port = int(url.rpartition(":")[2])
        server = HttpServer(make_app(FakeNode(), api_key=None, known_hosts=frozenset()))
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{port} is in use; .*--listen"):
            await server.start(("127.0.0.1", port))
        await server.close()


async def test_without_a_wish_for_a_port_a_second_node_finds_a_free_one():
    servers = [HttpServer(make_app(FakeNode(), api_key=None, known_hosts=frozenset())) for _ in range(2)]
    for server in servers:
        await server.start(None)
    assert servers[0].url != servers[1].url
    assert all(server.url.startswith("http://127.0.0.1:") for server in servers)
    for server in servers:
        await server.close()


async def test_an_address_of_another_machine_is_named_with_its_option():
    server = HttpServer(make_app(FakeNode(), api_key=None, known_hosts=frozenset()))
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1:7475 cannot be used .*--listen"):
        await server.start(("192.0.2.1", 7475))
    await server.close()


async def test_bytes_that_are_no_http_leave_one_line_in_the_log(caplog: pytest.LogCaptureFixture):
    async with serving(FakeNode()) as url:
        for _ in range(5):
            reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
            writer.write(b"GET /health HTTP/9\r\n\r\n")
            assert (await reader.read()).startswith(b"HTTP/1.0 400 ")
            writer.close()
    lines = [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert [line.getMessage().partition(" (")[0] for line in lines] == ["a client sent what is not HTTP"]
    assert lines[0].exc_info is None


async def test_a_body_that_is_not_compressed_as_it_says():
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
    async with serving(FakeNode()) as url:
        status, answer, _ = await call(url, "POST", "/v1/chat/completions", data=b"{}", headers=headers)
    assert (status, answer["error"]["code"]) == (400, "invalid_body")
