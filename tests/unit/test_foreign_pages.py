"""What a web page elsewhere can make a browser send, written directly to the socket: none of it is acted on."""

from __future__ import annotations

import asyncio
import json
from urllib.parse import urlsplit

import pytest
from support.fake_node import MODEL, FakeNode, serving

from swarmd.node.api.foreign import is_own_host
from swarmd.node.api.server import MAX_CONNECTIONS, make_app

BODY = json.dumps({"model": MODEL})
CHAT = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hi"}]})
POST = "POST /api/instances HTTP/1.1"


async def exchange(url: str, request_line: str, headers: list[str], body: str = "") -> tuple[int, str]:
    """One request exactly as it is written; the status and everything that came back."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    lines = [request_line, *(header.replace("SELF", parts.netloc) for header in headers), "Connection: close"]
    lines += [f"Content-Length: {len(body)}"] if body else []
    writer.write(("\r\n".join(lines) + "\r\n\r\n" + body).encode())
    answer = (await reader.read()).decode()
    writer.close()
    return int(answer.split(" ", 2)[1]), answer


FOREIGN = [
    ("no host", POST, []),
    ("two hosts", POST, ["Host: SELF", "Host: evil.example"]),
    ("two hosts, the good one last", POST, ["Host: evil.example", "Host: SELF"]),
    ("a rebound name", POST, ["Host: evil.example:7475"]),
    ("a rebound name with a dot", POST, ["Host: evil.example."]),
    ("a name that begins like ours", POST, ["Host: localhost.evil.example"]),
    ("user info", POST, ["Host: localhost@evil.example"]),
    ("our name as user info", POST, ["Host: 127.0.0.1:80@evil.example"]),
    ("a zone that is a name", POST, ["Host: [fe80::1%evil.example]"]),
    ("a path in the host", POST, ["Host: 127.0.0.1/evil.example"]),
    ("an absolute target", "POST http://evil.example/api/instances HTTP/1.1", ["Host: SELF"]),
    ("our name in an absolute target", "POST http://127.0.0.1/api/instances HTTP/1.1", ["Host: evil.example"]),
    ("a forwarded host", POST, ["Host: evil.example", "X-Forwarded-Host: SELF", "Forwarded: host=SELF"]),
    ("another origin", POST, ["Host: SELF", "Origin: https://evil.example"]),
    ("no origin that one could name", POST, ["Host: SELF", "Origin: null"]),
    ("our host under another scheme", POST, ["Host: SELF", "Origin: moz-extension://SELF"]),
    ("our host as user info of an origin", POST, ["Host: SELF", "Origin: http://SELF@evil.example"]),
    ("another port of this machine", POST, ["Host: SELF", "Origin: http://127.0.0.1:3000"]),
    ("two origins", POST, ["Host: SELF", "Origin: http://SELF", "Origin: https://evil.example"]),
    ("a browser that says so", POST, ["Host: SELF", "Sec-Fetch-Site: cross-site"]),
    ("a page of another port, as browsers say", POST, ["Host: SELF", "Sec-Fetch-Site: same-site"]),
]


@pytest.mark.parametrize(("request_line", "headers"), [row[1:] for row in FOREIGN], ids=[row[0] for row in FOREIGN])
async def test_a_foreign_request_changes_nothing_and_is_told_nothing(request_line: str, headers: list[str]):
    node = FakeNode()
    node.state["secret"] = "state-of-the-swarm"
    async with serving(node) as url:
        status, answer = await exchange(url, request_line, [*headers, "Content-Type: application/json"], BODY)
        reading = request_line.replace("POST", "GET").replace("/api/instances", "/api/swarm")
        read_status, read = await exchange(url, reading, headers)
    assert status in (400, 403)
    assert read_status in (400, 403)
    assert node.launched == []
    assert "state-of-the-swarm" not in read
    assert "access-control" not in answer.lower()


# What a cross-site form, fetch with mode no-cors or sendBeacon can send; an old browser adds no Origin to it.
@pytest.mark.parametrize(
    "content_type",
    [
        "text/plain",
        "text/plain; charset=application/json",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/jsonp",
        "",
    ],
)
@pytest.mark.parametrize(
    ("path", "body"), [("/api/instances", BODY), ("/v1/chat/completions", CHAT), ("/v1/completions", CHAT)]
)
async def test_a_body_that_a_form_could_send_is_not_read(path: str, body: str, content_type: str):
    node = FakeNode()
    headers = ["Host: SELF"] + ([f"Content-Type: {content_type}"] if content_type else [])
    async with serving(node) as url:
        status, answer = await exchange(url, f"POST {path} HTTP/1.1", headers, body)
    assert status == 415
    assert "Content-Type: application/json" in answer
    assert node.launched == node.requests == []


@pytest.mark.parametrize("path", ["/api/instances", "/v1/chat/completions", "/api/swarm", "/"])
async def test_a_preflight_allows_nothing(path: str):
    asked = ["Access-Control-Request-Method: POST", "Access-Control-Request-Headers: content-type,authorization"]
    async with serving(FakeNode()) as url:
        headers = ["Host: SELF", "Origin: https://evil.example", "Access-Control-Request-Private-Network: true", *asked]
        status, answer = await exchange(url, f"OPTIONS {path} HTTP/1.1", headers)
        assert status == 403
        assert "access-control" not in answer.lower()
        status, answer = await exchange(url, f"OPTIONS {path} HTTP/1.1", ["Host: SELF", *asked])
        assert status == 405
        assert "access-control" not in answer.lower()


async def test_a_web_socket_is_not_opened():
    upgrade = ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAA"]
    async with serving(FakeNode()) as url:
        for origin, expected in (("https://evil.example", 403), ("http://SELF", 200)):
            line = "GET /api/swarm HTTP/1.1"
            status, answer = await exchange(url, line, ["Host: SELF", f"Origin: {origin}", *upgrade])
            assert status == expected
            assert "101" not in answer.split("\r\n", 1)[0]


async def test_a_link_from_elsewhere_leads_to_the_page_and_to_nothing_else():
    async with serving(FakeNode()) as url:
        for path, expected in (("/", 200), ("/api/swarm", 403), ("/metrics", 403), ("/v1/models", 403)):
            headers = ["Host: SELF", "Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate"]
            assert (await exchange(url, f"GET {path} HTTP/1.1", headers))[0] == expected


async def test_the_page_itself_and_programs_are_welcome():
    node = FakeNode()
    own = ["Host: SELF", "Content-Type: application/json; charset=utf-8"]
    async with serving(node) as url:
        for more in ([], ["Origin: http://SELF", "Sec-Fetch-Site: same-origin"], ["Sec-Fetch-Site: none"]):
            assert (await exchange(url, POST, own + more, BODY))[0] == 202
    assert node.launched == [MODEL] * 3


@pytest.mark.parametrize(
    ("host", "own"),
    [
        ("localhost", True),
        ("LOCALHOST.:80", True),
        ("localhost..", False),
        ("127.0.0.1.", True),
        ("[::1]", True),
        ("[::ffff:127.0.0.1]:1", True),
        ("::1", False),
        ("[127.0.0.1]", False),
        ("[::1]x", False),
        ("[fe80::1%25eth0]", False),
        ("127.1", False),
        ("0x7f.0.0.1", False),
        ("2130706433", False),
        ("127.0.0.1:", False),
        ("127.0.0.1:99999999", False),
        ("\u0661\u0662\u0667.0.0.1", False),
        ("loc\u0430lhost", False),
        ("attic.local", True),
        ("attic.local.", True),
        ("attic.local.evil.example", False),
        ("xattic.local", False),
        ("localhost\x00", False),
        (" localhost", False),
        ("localhost,evil.example", False),
    ],
)
def test_what_names_this_node(host: str, own: bool):
    assert is_own_host(host, frozenset({"attic.local"})) is own


def test_no_get_can_change_anything():
    """Every route that changes something is a POST; this list is to be looked at when it grows."""
    routes = {
        (route.method, route.resource.canonical)
        for route in make_app(FakeNode(), api_key=None, known_hosts=frozenset()).router.routes()
        if route.resource is not None
    }
    assert {path for method, path in routes if method == "POST"} == {
        "/v1/chat/completions",
        "/v1/completions",
        "/api/instances",
    }
    assert {method for method, _ in routes} == {"GET", "HEAD", "POST"}


@pytest.mark.parametrize("path", ["/", "/api/swarm", "/v1/models", "/metrics", "/nothing", "/assets/none.js"])
async def test_every_answer_forbids_embedding_and_guessing(path: str):
    async with serving(FakeNode()) as url:
        _, answer = await exchange(url, f"GET {path} HTTP/1.1", ["Host: SELF"])
    head = answer.partition("\r\n\r\n")[0].lower()
    assert "x-content-type-options: nosniff" in head
    assert "cross-origin-resource-policy: same-origin" in head
    assert "default-src 'none'" in head
    assert "frame-ancestors 'none'" in head
    assert "unsafe" not in head


async def test_a_flood_of_connections_is_cut_off_and_the_rest_go_on():
    async with serving(FakeNode()) as url:
        parts = urlsplit(url)
        held = [await asyncio.open_connection(parts.hostname, parts.port) for _ in range(MAX_CONNECTIONS)]
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        (answer,) = await asyncio.gather(reader.read(), return_exceptions=True)
        assert answer == b"" or isinstance(answer, ConnectionError)
        held[0][1].write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await held[0][0].readline()).startswith(b"HTTP/1.1 200")
        for _, each in held:
            each.close()
