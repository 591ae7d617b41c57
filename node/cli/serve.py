"""Running the node until it is told to stop, and what it says meanwhile to the person who started it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import platform
import shlex
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from swarmd.discovery.addresses import usable_addresses
from swarmd.node.cli.console import guarded, settings_of
from swarmd.node.cli.identity import own_credentials, with_identity
from swarmd.node.cli.models import check_servable
from swarmd.node.config import Settings, is_loopback
from swarmd.node.data_dir import DataDir
from swarmd.node.options import DEFAULT_DATA_DIR, environment_name
from swarmd.transport.identity import Credentials, load_token

if TYPE_CHECKING:
    from swarmd.node.daemon import Daemon

log = logging.getLogger("swarmd")

DRAIN_SECONDS = 30.0
EVERYWHERE = frozenset({"0.0.0.0", "::"})


def serve(given: Mapping[str, Any]) -> int:
    """Start the node and run it until Ctrl-C or SIGTERM; the exit code."""
    return guarded(lambda: _serve(settings_of(given)))


def _serve(settings: Settings) -> int:
    _set_up_logging(settings.log_level)
    data_dir = DataDir(settings.data_dir)
    data_dir.create()
    os.environ.pop(environment_name("api_key"), None)  # no business of this node's child processes
    with data_dir:
        check_servable(data_dir, settings.model)
        return with_identity(lambda: asyncio.run(_run(settings, data_dir, own_credentials(data_dir))))


async def _run(settings: Settings, data_dir: DataDir, credentials: Credentials) -> int:
    from swarmd.node.api.server import HttpServer, make_app
    from swarmd.node.daemon import Daemon
    from swarmd.node.public_view import PublicView

    stop, at_once = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (at_once if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    api_key, fresh_key = api_key_of(settings, data_dir)
    daemon = Daemon(settings, data_dir, credentials)
    server = HttpServer(make_app(PublicView(daemon), api_key=api_key, known_hosts=_own_names(settings)))
    try:
        await server.start(settings.listen)
        await daemon.start()
        data_dir.note_running(server.url)
        _greet(settings, data_dir, server.url, api_key if fresh_key else None)
        announcement = asyncio.create_task(_announce_ready(daemon, data_dir, server.url, api_key))
        await stop.wait()
        announcement.cancel()
        await _drain(daemon, at_once)
        log.info("stopping")
    finally:
        await server.close()
        await daemon.close()
    return 0


async def _drain(daemon: Daemon, at_once: asyncio.Event) -> None:
    """Let the node's answers finish and its layers move to others; a second signal ends that."""
    daemon.leave()
    impatient = asyncio.create_task(at_once.wait())
    told = ""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_SECONDS):
            while (kept := daemon.ties()) and not at_once.is_set():
                if kept != told:
                    log.info("leaving; still here: %s (once more to stop at once)", kept)
                    told = kept
                change = asyncio.create_task(daemon.changed.wait(0.25))
                await asyncio.wait({change, impatient}, return_when=asyncio.FIRST_COMPLETED)
                change.cancel()
    impatient.cancel()


async def _announce_ready(daemon: Daemon, data_dir: DataDir, url: str, api_key: str | None) -> None:
    """Say once that a model answers, and what to try."""
    while True:
        for record in (record for _, record in daemon.instances.all()):
            if record.state == "ready":
                _say(_ready_lines(record.model.name, data_dir, url, api_key))
                return
        await daemon.changed.wait()


def _ready_lines(model: str, data_dir: DataDir, url: str, api_key: str | None) -> str:
    key = "" if api_key is None else " -H 'Authorization: Bearer KEY'"
    if api_key is not None and data_dir.kept_api_key() == api_key:
        key = f' -H "Authorization: Bearer $(cat {shlex.quote(str(data_dir.api_key_path))})"'
    question = "What is the capital of France?"
    message = f'{{"role": "user", "content": "{question}"}}'
    # A small model gives its best when it is not left to chance.
    body = f'{{"model": "{model}", "temperature": 0, "messages": [{message}]}}'
    run = _command(data_dir, f'run {model} "{question}"')
    return (
        f"\n  ready: {model} answers. Try:\n"
        f"    {run}\n"
        f"    curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'\n"
    )


def _greet(settings: Settings, data_dir: DataDir, url: str, fresh_key: str | None) -> None:
    """Where to look and what to type next. Secrets are for a person's eyes: a log is told only where they are."""
    person = sys.stdout.isatty()
    lines = [f"\n  swarmd node {settings.name!r} is up", f"  dashboard:    {url}"]
    if settings.listen is not None and settings.listen[0] in EVERYWHERE:
        port = url.rpartition(":")[2]
        shown = (f"[{host}]" if ":" in host else host for host in usable_addresses() if not is_loopback(host))
        lines += [f"  from outside: http://{host}:{port}" for host in shown if "%" not in host]
    if fresh_key is not None:
        kept = f"kept in {data_dir.api_key_path}"
        lines.append(f"  API key:      {fresh_key}   (shown once; {kept})" if person else f"  API key:      {kept}")
    token = load_token(data_dir.path)
    if token is None:
        lines.append("  next machine: `swarmd token` on the machine that founded the swarm prints what to type there")
    elif person:
        lines.append(f"  next machine: swarmd join {token}")
    else:
        lines.append(f"  next machine: `{_command(data_dir, 'token')}` prints what to type there")
    _say("\n".join(lines) + "\n")


def _command(data_dir: DataDir, words: str) -> str:
    """A command for the node of this data dir, to be typed."""
    usual = data_dir.path == Path(DEFAULT_DATA_DIR).expanduser()
    return f"swarmd {words}" if usual else f"swarmd {words} --data-dir {shlex.quote(str(data_dir.path))}"


def _say(text: str) -> None:
    Console(highlight=False, soft_wrap=True, markup=False).print(text)
    sys.stdout.flush()


def api_key_of(settings: Settings, data_dir: DataDir) -> tuple[str | None, bool]:
    """The key that clients must send, and whether it was made just now. Listening beyond loopback demands one."""
    if settings.api_key is not None:
        return settings.api_key.get_secret_value(), False
    if settings.listen is None or is_loopback(settings.listen[0]):
        return None, False
    kept = data_dir.kept_api_key()
    return (kept, False) if kept is not None else (data_dir.make_api_key(), True)


def _own_names(settings: Settings) -> frozenset[str]:
    """Names by which a browser may reach this endpoint beside its addresses and localhost.

    On loopback there are none: a neighbour on the network can answer for `this-machine.local`, and then point a page
    that came from there to loopback.
    """
    if settings.listen is None or is_loopback(settings.listen[0]):
        return frozenset()
    host = platform.node().lower()
    names = {host, host.partition(".")[0], f"{host.partition('.')[0]}.local"} if host else set[str]()
    return frozenset(names | {settings.listen[0].lower().rstrip(".")})


def _set_up_logging(level: str) -> None:
    logging.basicConfig(level=level, format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("aiohttp").setLevel(logging.WARNING)
