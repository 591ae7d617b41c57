"""No name that a client, a peer or a file gives leads to a file that it should not."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import pytest
from support.fake_node import FakeNode, serving
from support.model_folders import write_folder
from yarl import URL

from swarmd.node.api import swarm
from swarmd.node.models.catalog import ModelNameError, is_model_name, is_path, resolve
from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.layout import INDEX_NAME, gguf_names, is_layout, layout_of
from swarmd.node.models.manifest import CHUNK_SIZE, ModelManifest, ModelPart

ESCAPES = [
    "../x",
    "..",
    ".",
    "/etc/passwd",
    "//etc/passwd",
    "a/../../x",
    "a/./b",
    "~/x",
    "~root/x",
    "C:\\x",
    "\\\\host\\share",
    "..\\x",
    "a\\..\\x",
    "x\0",
    "\0",
    "x\n",
    "x\r",
    "\x1b[2J",
    "x ",
    " x",
    "",
    "\u2024\u2024/x",  # one dot leaders
    "\uff0e\uff0e\uff0fx",  # full width
    "\u2215etc\u2215passwd",  # division slash
    "x\u202egpj",  # right to left
    "\u00e9",
    "e\u0301",
    "x:y:z",
    ":x",
    "-x",
    "%2e%2e%2fx",
    "$HOME",
    "x|y",
    "x*",
    "n" * 300,
]


@pytest.mark.parametrize("name", ESCAPES)
def test_no_models_name(name: str):
    assert not is_model_name(name)
    manifest = ModelManifest("0" * 64, name, (ModelPart("model.gguf", 10, 1),), CHUNK_SIZE, bytes(16))
    with pytest.raises(ModelFileError, match="impossible name"):
        manifest.check()


@pytest.mark.parametrize("name", [*ESCAPES, "nul", "CON", "com1", "aux.x", "LPT9.a.b"])
@pytest.mark.parametrize("place", ["weights", "template", "metadata"])
def test_no_file_of_a_manifest(name: str, place: str):
    weights, metadata = ["model.safetensors"], ["config.json"]
    match place:
        case "weights":
            weights = [f"{name}.safetensors"]
        case "template":
            metadata.append(f"additional_chat_templates/{name}.jinja")
        case _:
            metadata.append(name)
    assert not is_layout([*metadata, *weights])
    assert not is_layout([*metadata, *weights, name])


@pytest.mark.parametrize(
    "name", ["model.gguf/..", "../model.gguf", "Model.gguf", "model-00001-of-00001.gguf", "x.gguf"]
)
def test_gguf_files_of_a_manifest_have_our_names(name: str):
    assert not is_layout([name])
    assert is_layout(gguf_names(1))


@pytest.mark.parametrize("sha256", ["", "../" * 21 + "x", "0" * 63, "0" * 65, "A" * 64, "0" * 63 + "/", "\uff10" * 64])
def test_a_folder_of_the_store_is_named_by_64_digits(sha256: str):
    manifest = ModelManifest(sha256, "m", (ModelPart("model.gguf", 10, 1),), CHUNK_SIZE, bytes(16))
    with pytest.raises(ModelFileError):
        manifest.check()


@pytest.mark.parametrize("name", [*(n + ".safetensors" for n in ESCAPES), "nul.safetensors", "/dev/zero", "x.bin"])
def test_no_file_of_an_index(name: str, tmp_path: Path):
    folder = write_folder(tmp_path / "model", {"model.safetensors": 10})
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"weight": name}}))
    with pytest.raises(ModelFileError) as caught:
        layout_of(folder)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "name", [n for n in ESCAPES if not is_path(n.strip()) and "/" not in n and not n.startswith("~")]
)
def test_what_is_no_path_is_looked_up_and_never_opened(name: str, monkeypatch: pytest.MonkeyPatch):
    def opened(*_: object) -> None:
        raise AssertionError("the file system was asked")

    for method in ("open", "stat", "exists", "is_file", "resolve"):
        monkeypatch.setattr(Path, method, opened)
    with pytest.raises(ModelNameError):
        resolve(name)


@pytest.mark.parametrize("name", [name for name in ESCAPES if name and "\0" not in name])
@pytest.mark.parametrize("folder", ["/assets/", "/v1/models/", "/"])
async def test_no_path_of_a_request(folder: str, name: str):
    async with serving(FakeNode()) as url, aiohttp.ClientSession() as session:
        for path in (folder + name, folder + "%2e%2e%2f" * 6 + "etc/passwd", folder + "..%5c..%5cx", folder + "%00"):
            parsed = URL(url + path, encoded="%" in path)
            async with session.get(parsed) as response:
                text = await response.text()
        assert response.status in (400, 404) or (folder, response.status) == ("/", 200)
        assert "root:" not in text


@pytest.mark.parametrize(
    ("peer", "own", "headers", "welcome"),
    [
        ("127.0.0.1", "127.0.0.1", {}, True),
        ("::1", "::1", {}, True),
        ("::ffff:127.0.0.1", "::ffff:127.0.0.1", {}, True),
        ("192.168.1.5", "192.168.1.5", {}, True),
        ("192.168.1.6", "192.168.1.5", {}, False),
        ("fe80::2", "fe80::1", {}, False),
        ("127.0.0.1", "127.0.0.1", {"X-Forwarded-For": "203.0.113.9"}, False),
        ("127.0.0.1", "127.0.0.1", {"Forwarded": "for=127.0.0.1"}, False),
        ("127.0.0.1", "127.0.0.1", {"Via": "1.1 proxy"}, False),
    ],
)
def test_who_is_of_this_machine(peer: str, own: str, headers: dict[str, str], welcome: bool):
    known = {"peername": (peer, 1), "sockname": (own, 2)}
    request = SimpleNamespace(headers=headers, transport=SimpleNamespace(get_extra_info=known.get))
    assert swarm._is_of_this_machine(cast(Any, request)) is welcome


@pytest.mark.parametrize("model", ["/etc/passwd", "~/.ssh/id_ed25519", "./x.gguf", "../x", "x.gguf", "~root"])
async def test_a_client_elsewhere_cannot_name_a_path(model: str):
    node = FakeNode()
    async with serving(node) as url, aiohttp.ClientSession() as session:
        proxied = {"X-Forwarded-For": "203.0.113.9"}
        async with session.post(f"{url}/api/instances", json={"model": model}, headers=proxied) as response:
            assert response.status == 403
            assert (await response.json())["error"]["code"] == "path_not_allowed"
        assert node.launched == []
        async with session.post(f"{url}/api/instances", json={"model": "smollm2"}, headers=proxied) as response:
            assert response.status == 202
        async with session.post(f"{url}/api/instances", json={"model": model}) as response:
            assert response.status == 202
    assert node.launched == ["smollm2", model]
