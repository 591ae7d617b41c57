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

ANSWER_SECONDS = 10.0
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
    """The daemon of the data dir. Raises CommandError when none runs, or none that answers yet."""
    data_dir = DataDir(settings.data_dir)
    found = data_dir.running()
    if found is not None:
        return found
    try:
        held = data_dir.is_held()
    except OSError as error:
        raise CommandError(f"the data dir {settings.data_dir} cannot be read ({error.strerror})", USAGE_ERROR) from None
    if held:
        raise CommandError(f"the node of {settings.data_dir} is just starting or stopping; try again in a moment")
    raise CommandError(
        f"no node runs with the data dir {settings.data_dir}; start one with `swarmd`, or name another with --data-dir"
    )


class DaemonClient:
    """HTTP to the daemon on this machine, by the standard library: commands should start fast.

    Every method raises CommandError when the daemon refuses, or does not answer.
    """

    def __init__(self, settings: Settings) -> None:
        """Raises CommandError when no daemon runs."""
        self._base = urlsplit(running_daemon(settings).url)
        key = settings.api_key.get_secret_value() if settings.api_key else DataDir(settings.data_dir).kept_api_key()
        self._headers = {"Content-Type": "application/json"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"

    def get(self, path: str) -> Any:
        """The JSON at a path."""
        with self._open("GET", path) as response:
            return json.loads(self._read(response.read))

    def post(self, path: str, body: object, *, timeout: float | None = ANSWER_SECONDS) -> Any:
        """The JSON answer to a JSON body; `timeout` None waits for as long as it takes."""
        with self._open("POST", path, body, timeout=timeout) as response:
            return json.loads(self._read(response.read))

    def events(self, method: str, path: str, body: object = None) -> Iterator[tuple[str, Any]]:
        """Server-sent events as (event, data); ends at `[DONE]`. Closing the iterator closes the connection."""
        with self._open(method, path, body, timeout=None) as response:
            event = ""
            while line := self._read(response.readline):
                text = line.decode().rstrip("\n")
                if text.startswith("event: "):
                    event = text[7:]
                elif text == "data: [DONE]":
                    return
                elif text.startswith("data: "):
                    yield event, json.loads(text[6:])
                    event = ""

    def _read(self, read: Callable[[], bytes]) -> bytes:
        try:
            return read()
        except (OSError, http.client.HTTPException) as error:
            raise self._gone(error) from None

    def _open(
        self, method: str, path: str, body: object = None, *, timeout: float | None = ANSWER_SECONDS
    ) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(self._base.hostname or "127.0.0.1", self._base.port, timeout=timeout)
        headers = self._headers | {"Connection": "close"}
        try:
            connection.request(method, path, json.dumps(body) if body is not None else None, headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise self._gone(error) from None
        if response.status == 401:
            raise CommandError("the node wants its API key; give it with --api-key, SWARMD_API_KEY or in config.toml")
        if response.status >= 400:
            raise CommandError(_message(response))
        return response

    def _gone(self, error: Exception) -> CommandError:
        return CommandError(f"the node at {self._base.geturl()} does not answer: {error or type(error).__name__}")


def _message(response: http.client.HTTPResponse) -> str:
    """What the daemon has to say about a failure."""
    try:
        return json.loads(response.read())["error"]["message"]
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return f"the node answered {response.status} {response.reason}"
