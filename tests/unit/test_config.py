"""Every option, in every place where it may stand, and what happens when it cannot be used."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from swarmd.node.cli import app as command_line
from swarmd.node.config import ConfigError, Settings, is_loopback, load_settings
from swarmd.node.devices import MemoryCaps
from swarmd.node.options import DEFAULT_LISTEN, DEFAULT_MODEL, OPTIONS, environment_name, flag_name

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"

# One value per option that is not its default: (as text, as TOML, as the settings hold it).
VALUES: dict[str, tuple[str, str, Any]] = {
    "name": ("attic", '"attic"', "attic"),
    "listen": ("[::1]:9000", '"[::1]:9000"', ("::1", 9000)),
    "api_key": ("long-enough", '"long-enough"', "long-enough"),
    "port": ("9001", "9001", 9001),
    "peer": ("kitchen:1", '["kitchen:1"]', ("kitchen:1",)),
    "mdns": ("false", "false", False),
    "memory": ("600MB", '"600MB"', MemoryCaps(600_000_000)),
    "device": ("cpu,cuda:1", '["cpu", "cuda:1"]', ("cpu", "cuda:1")),
    "threads": ("3", "3", 3),
    "model": ("none", '"none"', "none"),
    "context": ("1000", "1000", 1000),
    "split": ("true", "true", True),
    "speculate": ("false", "false", False),
    "draft_model": ("small.gguf", '"small.gguf"', "small.gguf"),
    "kernels": ("torch", '"torch"', "torch"),
    "wire_dtype": ("bf16", '"bf16"', "bf16"),
    "log_level": ("debug", '"debug"', "DEBUG"),
}
BAD = {
    "name": "",
    "data_dir": "",
    "listen": "7475",
    "api_key": "short",
    "port": "70000",
    "peer": "host:port",
    "mdns": "perhaps",
    "memory": "much",
    "device": "abacus",
    "threads": "0",
    "model": "",
    "context": "-1",
    "split": "maybe",
    "speculate": "maybe",
    "draft_model": "",
    "kernels": "fast",
    "wire_dtype": "f8",
    "log_level": "LOUD",
}


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for option in OPTIONS:
        monkeypatch.delenv(environment_name(option), raising=False)
    monkeypatch.setenv(environment_name("data_dir"), str(tmp_path))


@pytest.fixture
def given_on_command_line(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What bare `swarmd` and `swarmd join` were given, in place of a node that starts."""
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr("swarmd.node.cli.serve.serve", lambda given: seen.append(dict(given)) or 0)
    monkeypatch.setattr("swarmd.node.cli.identity.join_swarm", lambda given, token: 0)
    monkeypatch.setattr(command_line, "_start_over", lambda given: seen.append(dict(given)))
    return seen


def held(settings: Settings, option: str) -> Any:
    value = getattr(settings, option)
    return value.get_secret_value() if option == "api_key" else value


def typed(option: str) -> list[str]:
    """The option as a person types it."""
    if OPTIONS[option].value:
        return [flag_name(option), VALUES[option][0]]
    return [flag_name(option) if VALUES[option][2] else f"--no-{option}"]


class TestInStep:
    """The options, the settings, the command line and the page in docs/ tell of the same."""

    def test_settings_and_examples_are_the_options(self):
        assert set(Settings.model_fields) == set(OPTIONS)
        assert set(VALUES) | {"data_dir"} == set(OPTIONS) == set(BAD)

    @pytest.mark.parametrize("command", ["swarmd", "join"])
    def test_command_line(self, command: str):
        group = get_command(command_line.app)
        found = group if command == "swarmd" else group.commands[command]  # pyright: ignore[reportAttributeAccessIssue]
        flags = {name: option.opts + option.secondary_opts for option in found.params if (name := option.name)}
        for name, option in OPTIONS.items():
            expected = [flag_name(name)] if option.value else [flag_name(name), f"--no-{flag_name(name)[2:]}"]
            assert flags[name] == expected

    def test_page(self):
        rows = re.findall(
            r"^\| `(--[^|]*)` \| `(\w+)` \| (?:`(\w+)`|\(lies in it\)) \|", PAGE.read_text(), re.MULTILINE
        )
        expected = []
        for name, option in OPTIONS.items():
            flag = flag_name(name)
            form = f"{flag} {option.value}" if option.value else f"{flag}` / `--no-{flag[2:]}"
            expected.append((form, environment_name(name), "" if name == "data_dir" else name))
        assert rows == expected

    def test_page_and_help_tell_the_same_defaults(self):
        rows = {row.split("`")[1].split()[0]: row for row in PAGE.read_text().splitlines() if row.startswith("| `--")}
        for name, option in OPTIONS.items():
            default = re.search(r"Default: ([\w.:/~%]+?)[,;.]?(?:\s|$)", option.help)
            assert default, name
            assert default[1] in rows[flag_name(name)], name

    def test_defaults_in_the_settings(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.delenv(environment_name("data_dir"))
        monkeypatch.setenv("HOME", "/nowhere")
        settings = load_settings()
        assert settings.data_dir == Path("/nowhere/.swarmd")
        assert (settings.model, settings.listen, settings.mdns) == (DEFAULT_MODEL, None, True)
        assert settings.name
        assert is_loopback(DEFAULT_LISTEN.rpartition(":")[0])


class TestPlaces:
    @pytest.mark.parametrize("option", VALUES)
    def test_command_line(self, option: str, given_on_command_line: list[dict[str, Any]]):
        for words in ([], ["join", "TOKEN"]):
            for order in (typed(option) + words, words + typed(option)):
                result = CliRunner().invoke(command_line.app, order)
                assert result.exit_code == 0, result.output
                assert held(load_settings(**given_on_command_line.pop()), option) == VALUES[option][2]

    @pytest.mark.parametrize("option", VALUES)
    def test_environment(self, option: str, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv(environment_name(option), VALUES[option][0])
        assert held(load_settings(), option) == VALUES[option][2]

    @pytest.mark.parametrize("option", VALUES)
    def test_file(self, option: str, tmp_path: Path):
        (tmp_path / "config.toml").write_text(f"{option} = {VALUES[option][1]}\n")
        assert held(load_settings(), option) == VALUES[option][2]

    def test_data_dir(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        assert load_settings().data_dir == tmp_path
        assert load_settings(data_dir=str(tmp_path / "other")).data_dir == tmp_path / "other"
        monkeypatch.setenv("HOME", str(tmp_path))
        assert load_settings(data_dir="~/x").data_dir == tmp_path / "x"
        monkeypatch.chdir(tmp_path)
        assert load_settings(data_dir="here").data_dir == tmp_path / "here"

    def test_the_file_is_that_of_the_data_dir_that_counts(self, tmp_path: Path):
        for name in ("env", "cli"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "config.toml").write_text(f'name = "{name}"')
        assert load_settings(data_dir=str(tmp_path / "cli")).name == "cli"

    def test_command_line_before_environment_before_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        (tmp_path / "config.toml").write_text('name = "file"\nport = 1\nthreads = 1\n')
        monkeypatch.setenv("SWARMD_NAME", "environment")
        monkeypatch.setenv("SWARMD_PORT", "2")
        settings = load_settings(name="line")
        assert (settings.name, settings.port, settings.threads) == ("line", 2, 1)

    def test_the_place_after_the_command_counts_more(self, given_on_command_line: list[dict[str, Any]]):
        CliRunner().invoke(command_line.app, ["--memory", "1GB", "--name", "a", "join", "T", "--memory", "2GB"])
        assert given_on_command_line == [{"memory": "2GB", "name": "a"}]

    def test_an_empty_variable_is_not_set(self, monkeypatch: pytest.MonkeyPatch):
        for option in VALUES:
            monkeypatch.setenv(environment_name(option), "")
        settings = load_settings()
        assert (settings.memory, settings.device) == (MemoryCaps(), ("auto",))
        assert settings.mdns is True

    def test_several_peers(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        (tmp_path / "config.toml").write_text('peer = ["a", "b:1"]')
        assert load_settings().peer == ("a", "b:1")
        monkeypatch.setenv("SWARMD_PEER", "c, d:2 [::1]:3")
        assert [str(peer) for peer in load_settings().peers] == ["c:7474", "d:2", "[::1]:3"]
        assert load_settings(peer=["e", "f"]).peer == ("e", "f")

    def test_several_devices_and_their_memory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        (tmp_path / "config.toml").write_text('device = "cuda:1, cpu"\nmemory = 1000000\n')
        settings = load_settings()
        assert (settings.device, settings.memory) == (("cuda:1", "cpu"), MemoryCaps(1_000_000))
        monkeypatch.setenv("SWARMD_MEMORY", "cuda:0=20GB, cpu=8GB")
        assert load_settings().memory == MemoryCaps(None, {"cuda:0": 20_000_000_000, "cpu": 8_000_000_000})
        assert load_settings(device=["cpu", "metal,cpu"]).device == ("cpu", "metal")


class TestBadValues:
    @pytest.mark.parametrize("option", BAD)
    def test_the_option_is_named_with_all_its_places(self, option: str):
        with pytest.raises(ConfigError) as caught:
            load_settings(**{option: BAD[option]})
        assert flag_name(option) in str(caught.value)
        assert environment_name(option) in str(caught.value)

    def test_all_are_told_at_once(self):
        with pytest.raises(ConfigError) as caught:
            load_settings(port="x", threads="y")
        assert [line.split()[0] for line in str(caught.value).splitlines()] == ["--port", "--threads"]

    def test_a_secret_is_not_repeated(self):
        with pytest.raises(ConfigError) as caught:
            load_settings(api_key="hunter2")
        assert "hunter2" not in str(caught.value)
        assert "hunter22" not in repr(load_settings(api_key="hunter22"))

    @pytest.mark.parametrize(
        "listen", ["localhost", ":80", "host:", "host:99999", "a b:1", "::1:80:x", "host:-1", "host:٣"]
    )
    def test_addresses_that_are_none(self, listen: str):
        with pytest.raises(ConfigError, match="--listen"):
            load_settings(listen=listen)

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ("name = ", "not valid TOML"),
            ("\xff", "not valid TOML"),
            ('nmae = "x"', "'nmae' is no option; there are name, "),
            ('data_dir = "/x"', "--data-dir or SWARMD_DATA_DIR"),
            ("threads = 0", "threads in config.toml"),
            ("[name]\nx = 1", "name in config.toml"),
        ],
    )
    def test_a_config_file_that_is_wrong(self, tmp_path: Path, content: str, words: str):
        (tmp_path / "config.toml").write_text(content, encoding="latin-1")
        with pytest.raises(ConfigError) as caught:
            load_settings()
        assert words in str(caught.value)
        assert "config.toml" in str(caught.value)

    def test_a_config_file_that_cannot_be_read(self, tmp_path: Path):
        (tmp_path / "config.toml").mkdir()
        with pytest.raises(ConfigError, match="cannot be read"):
            load_settings()


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("attic", False),
        ("localhost.evil", False),
    ],
)
def test_what_only_this_machine_can_reach(host: str, local: bool):
    assert is_loopback(host) is local
