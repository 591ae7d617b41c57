"""The settings of a node: command line, environment and `config.toml`, checked into one typed record."""

from __future__ import annotations

import ipaddress
import platform
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from swarmd.discovery.peers import PeerAddress, parse_peer
from swarmd.discovery.records import WireWish
from swarmd.node.devices import AUTO, MemoryCaps, parse_devices, parse_memory
from swarmd.node.options import (
    DEFAULT_DATA_DIR,
    DEFAULT_LINK_PORT,
    DEFAULT_LISTEN,
    DEFAULT_MODEL,
    OPTIONS,
    environment_name,
    flag_name,
)

MIN_API_KEY = 8
CONFIG_FILE = "config.toml"


class ConfigError(Exception):
    """A setting that cannot be used; the message names it and says what is accepted."""


def _parse_listen(value: object) -> object:
    """`HOST:PORT` -> (host, port). Port 0, any free one, is fine here."""
    if not isinstance(value, str):
        return value
    host, colon, port = value.strip().rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{value!r} is no address to listen on; write HOST:PORT, like {DEFAULT_LISTEN}")
    return parse_peer(host, 0).host, int(port)


def _parse_memory(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    return parse_memory(value) if isinstance(value, str) else value


def _parse_device(value: object) -> object:
    """Devices may be given one by one, or several in one text."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        return value
    return parse_devices(texts)


def _split_peers(value: object) -> object:
    """Peers may be given one by one, or several in one text with commas or blanks between them."""
    if not isinstance(value, str | list | tuple):
        return value
    texts = [value] if isinstance(value, str) else value
    return [peer for text in texts for peer in (text.replace(",", " ").split() if isinstance(text, str) else [text])]


def _folder(value: str | Path) -> Path:
    if value == "" or "\0" in str(value):
        raise ValueError("the name of a folder is wanted")
    try:
        return Path(value).expanduser().absolute()
    except RuntimeError as error:
        raise ValueError(f"{str(value)!r} is no folder: {error}") from None


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


class Settings(BaseSettings):
    """One node's settings. `node/options.py` says what each means; None stands for a default found at run time."""

    model_config = SettingsConfigDict(
        env_prefix="SWARMD_", env_ignore_empty=True, extra="forbid", frozen=True, hide_input_in_errors=True
    )

    name: Annotated[str, Field(min_length=1, max_length=64)] = Field(default_factory=lambda: _host_name())
    data_dir: Path = Path(DEFAULT_DATA_DIR)
    listen: Annotated[tuple[str, int] | None, NoDecode, BeforeValidator(_parse_listen)] = None
    api_key: Annotated[SecretStr, Field(min_length=MIN_API_KEY, max_length=256)] | None = None
    port: Annotated[int, Field(ge=0, le=65535)] | None = None
    peer: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_peers)] = ()
    mdns: bool = True
    memory: Annotated[MemoryCaps, NoDecode, BeforeValidator(_parse_memory)] = MemoryCaps()
    device: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_parse_device)] = (AUTO,)
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    model: Annotated[str, Field(min_length=1, max_length=4096)] = DEFAULT_MODEL
    context: Annotated[int, Field(ge=16, le=1 << 20)] | None = None
    split: bool = False
    speculate: bool = True
    draft_model: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    kernels: Literal["auto", "native", "torch"] = "auto"
    wire_dtype: WireWish = "auto"
    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(_upper)] = "INFO"

    @field_validator("data_dir", mode="before")
    @classmethod
    def _expand(cls, value: object) -> object:
        return _folder(value) if isinstance(value, str | Path) else value

    @field_validator("name")
    @classmethod
    def _printable(cls, value: str) -> str:
        if not value.isprintable():
            raise ValueError("a name must be printable")
        return value

    @field_validator("peer")
    @classmethod
    def _peers_parse(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for peer in value:
            parse_peer(peer, DEFAULT_LINK_PORT)
        return value

    @property
    def peers(self) -> list[PeerAddress]:
        """The static peers."""
        return [parse_peer(peer, DEFAULT_LINK_PORT) for peer in self.peer]

    @property
    def config_file(self) -> Path:
        """Where the config file of these settings is, if there is one."""
        return self.data_dir / CONFIG_FILE

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Command line, then environment, then the data dir's config.toml."""
        given = init_settings().get("data_dir", env_settings().get("data_dir", DEFAULT_DATA_DIR))
        kept = InitSettingsSource(settings_cls, _file_values(_folder(given) / CONFIG_FILE))
        return (init_settings, env_settings, kept)


def load_settings(**given: Any) -> Settings:
    """The settings with what the command line gave (None: not given). Raises ConfigError, which names every option
    that has a value it cannot have, and never shows a value that may be a secret."""
    try:
        return Settings(**{key: value for key, value in given.items() if value is not None})
    except ValueError as error:
        if not isinstance(error, ValidationError):
            # Found while looking for the config file, before any validation.
            raise ConfigError(f"{flag_name('data_dir')} (or {environment_name('data_dir')}): {error}") from None
        lines = []
        for problem in error.errors():
            option = str(problem["loc"][0]) if problem["loc"] else "settings"
            where = f"{flag_name(option)} (or {environment_name(option)}, or {option} in {CONFIG_FILE})"
            lines.append(f"{where}: {problem['msg'].removeprefix('Value error, ')}")
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _file_values(path: Path) -> dict[str, Any]:
    """What a config file holds, checked for its form and its keys; nothing if it is not there. Raises ConfigError."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    for key in content:
        if key == "data_dir":
            raise ConfigError(
                f"{path} sets data_dir, but lies in the data dir itself; use --data-dir or {environment_name(key)}"
            )
        if key not in OPTIONS:
            raise ConfigError(f"{path}: {key[:64]!r} is no option; there are {', '.join(OPTIONS)}")
    return content


def _host_name() -> str:
    return (platform.node() or "node").split(".")[0][:64]
