"""Who may use the endpoint: no web page from elsewhere, and nobody without the key where there is one."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from support.fake_node import FakeNode, serving
from yarl import URL

from swarmd.node.cli.serve import api_key_of
from swarmd.node.config import load_settings
from swarmd.node.data_dir import DataDir

KEY = "correct horse battery"


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


async def test_the_page_and_liveness_need_no_key():
    async with serving(FakeNode(), api_key=KEY) as url:
        assert (await get(url, "/health"))[0] == 200
        assert (await get(url, "/"))[0] == 200


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
