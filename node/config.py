"""The settings of a node: command line, environment and `config.toml`, checked into one typed record."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from swarmd.discovery.peers import PeerAddress, parse_peer
from swarmd.node.options import (
    DEFAULT_DATA_DIR,
    DEFAULT_LINK_PORT,
    DEFAULT_LISTEN,
    DEFAULT_MODEL,
    environment_name,
    flag_name,
)
from swarmd.partition.units import parse_bytes

LOOPBACK_HOSTS = frozenset({"127.0.0.1", "::1", "localhost"})


class ConfigError(Exception):
    """A setting that cannot be used; the message names it and says what is accepted."""


def _parse_listen(value: object) -> object:
    if isinstance(value, str):
        peer = parse_peer(value, 0)
        if not peer.port and not value.endswith(":0"):
            raise ValueError(f"{value!r} has no port; write HOST:PORT, like {DEFAULT_LISTEN}")
        return (peer.host, peer.port)
    return value


def _parse_listen_any(value: object) -> object:
    """Port 0 is no address of a peer, but a fine one to listen on."""
    if isinstance(value, str) and value.endswith(":0"):
        return (parse_peer(value[:-1] + "1", 0).host, 0)
    return _parse_listen(value)


def _parse_memory(value: object) -> object:
    return parse_bytes(value) if isinstance(value, str) else value


def _split_peers(value: object) -> object:
    return value.replace(",", " ").split() if isinstance(value, str) else value


class Settings(BaseSettings):
    """One node's settings. `node/options.py` says what each means; None stands for a default found at run time."""

    model_config = SettingsConfigDict(env_prefix="SWARMD_", extra="forbid", frozen=True)

    name: Annotated[str, Field(min_length=1, max_length=64)] = Field(default_factory=lambda: _host_name())
    data_dir: Path = Path(DEFAULT_DATA_DIR)
    listen: Annotated[tuple[str, int] | None, NoDecode, BeforeValidator(_parse_listen_any)] = None
    api_key: Annotated[SecretStr, Field(min_length=8, max_length=256)] | None = None
    port: Annotated[int, Field(ge=0, le=65535)] | None = None
    peer: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_peers)] = ()
    mdns: bool = True
    memory: Annotated[int, Field(gt=0), BeforeValidator(_parse_memory)] | None = None
    device: Literal["auto", "cpu"] = "auto"
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    model: str = DEFAULT_MODEL
    context: Annotated[int, Field(ge=16, le=1 << 20)] | None = None
    split: bool = False
    wire_dtype: Literal["bf16", "f32"] = "bf16"
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    @field_validator("data_dir")
    @classmethod
    def _expand(cls, value: Path) -> Path:
        return value.expanduser().absolute()

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
        given = init_settings().get("data_dir") or os.environ.get("SWARMD_DATA_DIR") or DEFAULT_DATA_DIR
        file = Path(given).expanduser() / "config.toml"
        return (init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml_file=file))


def load_settings(**given: Any) -> Settings:
    """The settings with what the command line gave (None: not given). Raises ConfigError."""
    try:
        return Settings(**{key: value for key, value in given.items() if value is not None})
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            option = str(problem["loc"][0]) if problem["loc"] else "settings"
            where = f"{flag_name(option)} (or {environment_name(option)}, or {option} in config.toml)"
            lines.append(f"{where}: {problem['msg'].removeprefix('Value error, ')}")
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"the config file cannot be used: {error}") from None


def _host_name() -> str:
    return (platform.node() or "node").split(".")[0][:64]
