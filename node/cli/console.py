"""What the commands share: settings, errors in one form, and talking to the daemon on this machine."""

from __future__ import annotations

import http.client
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from swarmd.node.config import ConfigError, Settings, load_settings
from swarmd.node.data_dir import DataDir, RunningDaemon

CONNECT_SECONDS = 10.0
USAGE_ERROR = 2
FAILURE = 1


class CommandError(Exception):
    """Ends a command with a message and an exit code."""

    def __init__(self, message: str, code: int = FAILURE) -> None:
        super().__init__(message)
        self.code = code


def settings_of(given: Mapping[str, Any]) -> Settings:
    """The settings of this call. Raises ConfigError."""
    return load_settings(**given)


def guarded(work: Callable[[], int]) -> int:
    """Run a command; what goes wrong in a foreseen way is one message and an exit code."""
    try:
        return work()
    except CommandError as error:
        print(f"swarmd: {error}", file=sys.stderr)
        return error.code
    except ConfigError as error:
        print(f"swarmd: {error}", file=sys.stderr)
        return USAGE_ERROR
    except BrokenPipeError:
        return FAILURE


def running_daemon(settings: Settings) -> RunningDaemon:
    """The daemon of the data dir. Raises CommandError when none runs."""
    found = DataDir(settings.data_dir).running()
    if found is None:
        raise CommandError(f"no node runs with the data dir {settings.data_dir}; start one with `swarmd`")
    return found


class DaemonClient:
    """HTTP to the daemon on this machine, by the standard library: commands should start fast."""

    def __init__(self, settings: Settings) -> None:
        """Raises CommandError when no daemon runs."""
        self._base = urlsplit(running_daemon(settings).url)
        key = settings.api_key or _kept_key(settings)
        self._headers = {"Content-Type": "application/json"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key if isinstance(key, str) else key.get_secret_value()}"

    def get(self, path: str) -> Any:
        """The JSON at a path."""
        return json.loads(self._open("GET", path).read())

    def post(self, path: str, body: object) -> Any:
        """The JSON answer to a JSON body."""
        return json.loads(self._open("POST", path, body).read())

    def events(self, method: str, path: str, body: object = None) -> Iterator[tuple[str, Any]]:
        """Server-sent events as (event, data); ends at `[DONE]`."""
        response = self._open(method, path, body, timeout=None)
        event = ""
        for raw in response:
            line = raw.decode().rstrip("\n")
            if line.startswith("event: "):
                event = line[7:]
            elif line == "data: [DONE]":
                return
            elif line.startswith("data: "):
                yield event, json.loads(line[6:])

    def _open(
        self, method: str, path: str, body: object = None, *, timeout: float | None = CONNECT_SECONDS
    ) -> http.client.HTTPResponse:
        host = self._base.hostname or "127.0.0.1"
        if host in ("0.0.0.0", "::"):
            host = "127.0.0.1"
        connection = http.client.HTTPConnection(host, self._base.port, timeout=timeout)
        try:
            connection.request(method, path, json.dumps(body) if body is not None else None, self._headers)
            response = connection.getresponse()
        except OSError as error:
            raise CommandError(f"the daemon at {self._base.geturl()} does not answer: {error}") from None
        if response.status >= 400:
            raise CommandError(_message(response))
        return response


def _message(response: http.client.HTTPResponse) -> str:
    try:
        return json.loads(response.read())["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"the daemon answered {response.status} {response.reason}"


def _kept_key(settings: Settings) -> str | None:
    """The key that the daemon made on the spot."""
    try:
        return (settings.data_dir / "api-key").read_text().strip() or None
    except OSError:
        return None
