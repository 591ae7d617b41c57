"""Who may use the endpoint: no web page from elsewhere, and nobody without the key where there is one."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp.test_utils import make_mocked_request
from support.fake_node import FakeNode, serving
from yarl import URL

from swarmd.node.api import key_guard
from swarmd.node.cli import app, serve
from swarmd.node.cli.serve import api_key_of
from swarmd.node.config import load_settings
from swarmd.node.data_dir import DataDir

KEY = "correct horse battery"


@pytest.fixture(autouse=True)
def quick_refusals(monkeypatch: pytest.MonkeyPatch):
    """Wrong keys are answered at once, except where that is what is tested."""
    monkeypatch.setattr(key_guard, "WRONG_KEY_SECONDS", 0)


async def get(url: str, path: str = "/api/swarm", **headers: str) -> tuple[int, Any]:
    async with (
        aiohttp.ClientSession() as session,
        session.get(URL(url + path, encoded=True), headers=headers) as response,
    ):
        body = await response.json() if response.content_type == "application/json" else await response.text()
        return response.status, body


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1:7475", "localhost:1", "localhost", "LOCALHOST", "[::1]:7475", "192.168.1.5:7475", "Attic.local:1"],
)
async def test_own_names_and_addresses_are_welcome(host: str):
    async with serving(FakeNode(), known_hosts=frozenset({"attic.local"})) as url:
        assert (await get(url, Host=host))[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example:80", "127.0.0.1.evil.example", "attic", "[evil]:1", ":1"]
)
async def test_a_page_that_rebinds_its_dns_name_gets_nothing(host: str):
    async with serving(FakeNode()) as url:
        status, body = await get(url, Host=host)
    assert status == 403
    assert body["error"]["code"] == "foreign_host"
    assert "--listen" in body["error"]["message"]


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1", "http://localhost", ""])
async def test_a_page_of_another_origin_cannot_act(origin: str):
    node = FakeNode()
    async with serving(node) as url, aiohttp.ClientSession() as session:
        headers = {"Origin": origin, "Content-Type": "text/plain"}
        async with session.post(f"{url}/api/instances", data=b'{"model": "m"}', headers=headers) as response:
            assert response.status == 403
            assert (await response.json())["error"]["code"] == "foreign_origin"
    assert node.launched == []


async def test_the_nodes_own_page_can_act():
    node = FakeNode()
    async with (
        serving(node) as url,
        aiohttp.ClientSession() as session,
        session.post(f"{url}/api/instances", json={"model": "m"}, headers={"Origin": url}) as response,
    ):
        assert response.status == 202
    assert node.launched == ["m"]


@pytest.mark.parametrize("path", ["/api/swarm", "/api/events", "/v1/models", "/metrics"])
@pytest.mark.parametrize(
    "given", [None, "Bearer wrong", KEY, f"Basic {KEY}", f"Bearer {KEY}x", "Bearer ", "Bearer \u00e9"]
)
async def test_without_the_key_nothing_is_told(path: str, given: str | None):
    async with serving(FakeNode(), api_key=KEY) as url:
        status, body = await get(url, path, **({} if given is None else {"Authorization": given}))
    assert status == 401
    assert (body["error"]["type"], body["error"]["code"]) == ("authentication_error", "invalid_api_key")
    assert KEY not in str(body)


@pytest.mark.parametrize("given", [f"Bearer {KEY}", f"bearer {KEY}", f"Bearer  {KEY} "])
async def test_with_the_key_everything_is_there(given: str):
    async with serving(FakeNode(), api_key=KEY) as url:
        for path in ("/api/swarm", "/v1/models", "/metrics"):
            assert (await get(url, path, Authorization=given))[0] == 200


async def test_the_page_and_liveness_need_no_key_and_say_nothing_of_the_swarm():
    node = FakeNode()
    node.state["instances"] = [{"model": "my-secret-model", "state": "ready"}]
    async with serving(node, api_key=KEY) as url:
        assert await get(url, "/health") == (200, {"status": "ok"})
        assert (await get(url, "/"))[0] == 200
        authorized = await get(url, "/health", Authorization=f"Bearer {KEY}")
        assert authorized == (200, {"status": "ok", "ready": ["my-secret-model"]})
        assert (await get(url, "/health", Authorization="Bearer wrong"))[0] == 401


@pytest.mark.parametrize("path", ["//api/swarm", "/api//swarm", "/%61pi/swarm", "/assets/../api/swarm", "/./api/swarm"])
async def test_no_spelling_of_a_path_goes_around_the_key(path: str):
    node = FakeNode()
    node.state["secret"] = "state-of-the-swarm"
    async with serving(node, api_key=KEY) as url:
        status, body = await get(url, path)
    assert status in (401, 404)
    assert "state-of-the-swarm" not in str(body)


async def test_a_key_that_is_no_text_is_a_wrong_key():
    async with serving(FakeNode(), api_key=KEY) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", URL(url).port)
        writer.write(b"GET /api/swarm HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer \xff\xfe\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 401")
        writer.close()


async def test_guesses_are_slow_however_many_come_together(monkeypatch: pytest.MonkeyPatch):
    """Four wrong keys wait; while they do nothing of that address is compared, not even the right one."""
    monkeypatch.setattr(key_guard, "WRONG_KEY_SECONDS", 3600)
    async with serving(FakeNode(), api_key=KEY) as url, asyncio.TaskGroup() as group:
        wrong = [
            group.create_task(get(url, Authorization=f"Bearer wrong-{n}"))
            for n in range(key_guard.MOST_PER_ADDRESS + 3)
        ]
        for finished in [task async for task in _first(wrong, 3)]:
            status, body = finished
            assert (status, body["error"]["code"]) == (429, "too_many_keys")
        assert (await get(url, Authorization=f"Bearer {KEY}"))[0] == 429
        assert (await get(url))[0] == 401, "no key is no guess"
        for task in wrong:
            task.cancel()


async def _first(tasks: list[asyncio.Task[tuple[int, Any]]], count: int) -> AsyncIterator[tuple[int, Any]]:
    for n, done in enumerate(asyncio.as_completed(tasks), 1):
        yield await done
        if n == count:
            return


async def test_what_is_kept_of_guesses_is_bounded_and_forgotten(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(key_guard, "WRONG_KEY_SECONDS", 3600)
    guard = key_guard.KeyGuard(KEY)

    def guess(address: str) -> asyncio.Task[None]:
        request = make_mocked_request("GET", "/", headers={"Authorization": "Bearer wrong"})
        return asyncio.create_task(guard.check(request.clone(remote=address)))

    tasks = [guess(f"2001:db8:{n:x}::1") for n in range(1000)]
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    assert len(pending) == key_guard.MOST_TOGETHER
    assert len(guard._waiting) == key_guard.MOST_TOGETHER
    assert {str(task.exception()) for task in done} == {"too many wrong API keys; try again in a moment"}
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    assert not guard._waiting


async def test_one_network_of_ipv6_counts_as_one_guesser(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(key_guard, "WRONG_KEY_SECONDS", 3600)
    assert key_guard._address("2001:db8::1") == key_guard._address("2001:db8::ffff:2%eth0")
    assert key_guard._address("2001:db8::1") != key_guard._address("2001:db8:0:1::1")
    assert key_guard._address("192.168.1.1") != key_guard._address("192.168.1.2")
    assert key_guard._address("::ffff:192.168.1.1") != key_guard._address("::ffff:192.168.1.2")


async def test_wrong_keys_are_logged_sparingly_and_never_quoted(caplog: pytest.LogCaptureFixture):
    async with serving(FakeNode(), api_key=KEY) as url:
        for n in range(5):
            await get(url, Authorization=f"Bearer almost-{KEY}{n}")
    assert caplog.text.count("refused wrong API keys: 1, the last from 127.0.0.1") == 1
    assert KEY not in caplog.text


@pytest.mark.parametrize(
    ("typed", "kept", "key"),
    [
        (["--api-key", KEY, "--name", "a"], ["--name", "a"], KEY),
        (["run", f"--api-key={KEY}", "model"], ["run", "model"], KEY),
        (["--api-key", "first-key", "--api-key", KEY], [], KEY),
        (["status"], ["status"], None),
        (["--api-key"], ["--api-key"], None),
        (["--api-key", ""], ["--api-key", ""], None),
        (["--api-key="], ["--api-key="], None),
        (["run", "--", "--api-key", KEY], ["run", "--", "--api-key", KEY], None),
    ],
)
def test_a_key_leaves_the_command_line(typed: list[str], kept: list[str], key: str | None):
    assert app._hide_api_key(typed) == (kept, key)


@pytest.mark.parametrize("listen", [None, "127.0.0.1:0", "localhost:0"])
def test_on_loopback_no_name_that_a_neighbour_can_claim_is_ours(tmp_path: Path, listen: str | None):
    assert serve._own_names(load_settings(data_dir=str(tmp_path), listen=listen)) == frozenset()


def test_a_node_on_the_network_knows_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("platform.node", lambda: "Attic.home.example")
    names = serve._own_names(load_settings(data_dir=str(tmp_path), listen="Swarm.Home.example:7475"))
    assert names == {"attic.home.example", "attic", "attic.local", "swarm.home.example"}


async def test_a_key_does_not_excuse_a_foreign_host():
    async with serving(FakeNode(), api_key=KEY) as url:
        assert (await get(url, Host="evil.example", Authorization=f"Bearer {KEY}"))[0] == 403


@pytest.mark.parametrize(
    "path",
    ["/assets/..%2f..%2fpyproject.toml", "/assets/%2e%2e", "/assets/../index.html", "/assets/.", "/assets/none.js"],
)
async def test_no_path_leads_out_of_the_pages_folder(path: str):
    async with serving(FakeNode()) as url:
        status, _ = await get(url, path)
    assert status == 404


class TestWhichKey:
    def dir(self, path: Path) -> DataDir:
        data_dir = DataDir(path / "node")
        data_dir.create()
        return data_dir

    @pytest.mark.parametrize("listen", [None, "127.0.0.1:0", "127.0.0.9:0", "localhost:0", "[::1]:0"])
    def test_loopback_wants_none(self, tmp_path: Path, listen: str | None):
        settings = load_settings(data_dir=str(tmp_path), listen=listen)
        assert api_key_of(settings, self.dir(tmp_path)) == (None, False)

    @pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "192.168.1.5:7475", "attic.local:7475"])
    def test_listening_wider_makes_one_once_and_keeps_it_private(self, tmp_path: Path, listen: str):
        settings, data_dir = load_settings(data_dir=str(tmp_path), listen=listen), self.dir(tmp_path)
        key, fresh = api_key_of(settings, data_dir)
        assert fresh
        assert len(key or "") >= 32
        assert api_key_of(settings, data_dir) == (key, False)
        assert stat.S_IMODE(data_dir.api_key_path.stat().st_mode) == 0o600

    def test_a_damaged_key_file_never_means_no_key(self, tmp_path: Path):
        settings, data_dir = load_settings(data_dir=str(tmp_path), listen="0.0.0.0:0"), self.dir(tmp_path)
        for damage in ("", "\n", "short"):
            data_dir.api_key_path.write_text(damage)
            key, fresh = api_key_of(settings, data_dir)
            assert fresh
            assert len(key or "") >= 32

    def test_a_key_of_ones_own_is_used_on_loopback_too(self, tmp_path: Path):
        settings = load_settings(data_dir=str(tmp_path), api_key=KEY)
        assert api_key_of(settings, self.dir(tmp_path)) == (KEY, False)
        assert KEY not in repr(settings)
