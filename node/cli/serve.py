"""`swarmd`, `swarmd join` and `swarmd token`: founding, joining, and running the node until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import secrets
import signal
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from swarmd.node.cli.console import CommandError, guarded, settings_of
from swarmd.node.config import LOOPBACK_HOSTS, Settings
from swarmd.node.data_dir import DataDir
from swarmd.transport.identity import (
    Credentials,
    IdentityError,
    issue_credentials,
    load_credentials,
    load_or_create_node_key,
    load_token,
    save_credentials,
    save_token,
)
from swarmd.transport.token import JoinToken, TokenError

log = logging.getLogger("swarmd")


def serve(given: Mapping[str, Any]) -> int:
    """Start the node and run it until Ctrl-C or SIGTERM; the exit code."""
    return guarded(lambda: _serve(settings_of(given)))


def join_swarm(given: Mapping[str, Any], token_text: str) -> int:
    """Certify this node's key for the swarm of a token; the token itself is not kept."""

    def work() -> int:
        data_dir = _open(settings_of(given))
        if data_dir.running() is not None:
            raise CommandError("a node runs with this data dir; stop it with `swarmd stop` before it joins a swarm")
        if not token_text.strip():
            raise CommandError("no token given; `swarmd token` on a machine of the swarm prints it", 2)
        try:
            token = JoinToken.parse(token_text)
        except TokenError as error:
            raise CommandError(str(error), 2) from None
        kept = load_token(data_dir.path)
        if kept is not None and kept != token:
            (data_dir.path / "token").unlink()
        save_credentials(data_dir.path, issue_credentials(load_or_create_node_key(data_dir.path), token))
        return 0

    return _with_identity_errors(work)


def show_token(given: Mapping[str, Any]) -> int:
    """Print the join command."""

    def work() -> int:
        settings = settings_of(given)
        if not settings.data_dir.is_dir():
            raise CommandError(f"there is no node in {settings.data_dir} yet; start one with `swarmd`")
        token = load_token(settings.data_dir)
        if token is None:
            raise CommandError(
                "this node joined with a token and has not kept it; run `swarmd token` on the machine that founded the swarm"
            )
        print(f"swarmd join {token}")
        return 0

    return _with_identity_errors(work)


def _with_identity_errors(work: Any) -> int:
    def run() -> int:
        try:
            return work()
        except IdentityError as error:
            raise CommandError(str(error), 2) from None

    return guarded(run)


def _open(settings: Settings) -> DataDir:
    data_dir = DataDir(settings.data_dir)
    data_dir.create()
    return data_dir


def _serve(settings: Settings) -> int:
    _set_up_logging(settings.log_level)
    data_dir = _open(settings)
    data_dir.hold()
    try:
        credentials = _identity(data_dir)
        return asyncio.run(_run(settings, data_dir, credentials))
    except IdentityError as error:
        raise CommandError(str(error), 2) from None
    finally:
        data_dir.release()


def _identity(data_dir: DataDir) -> Credentials:
    """This node's credentials; on the very first start it founds a swarm of its own."""
    credentials = load_credentials(data_dir.path)
    if credentials is None:
        token = load_token(data_dir.path) or JoinToken.generate()
        save_token(data_dir.path, token)
        credentials = issue_credentials(load_or_create_node_key(data_dir.path), token)
        save_credentials(data_dir.path, credentials)
        log.info("founded a new swarm")
    return credentials


async def _run(settings: Settings, data_dir: DataDir, credentials: Credentials) -> int:
    from swarmd.node.api.server import HttpServer, make_app
    from swarmd.node.daemon import Daemon
    from swarmd.node.public_view import PublicView

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    api_key, fresh_key = _api_key(settings, data_dir)
    daemon = Daemon(settings, data_dir, credentials)
    known = frozenset({settings.listen[0]}) if settings.listen else frozenset[str]()
    server = HttpServer(make_app(PublicView(daemon), api_key=api_key, known_hosts=known))
    try:
        await server.start(settings.listen)
        await daemon.start()
        data_dir.note_running(server.url)
        _greet(settings, data_dir, server.url, api_key if fresh_key else None)
        announcement = asyncio.create_task(_announce_ready(daemon, server.url))
        await stop.wait()
        announcement.cancel()
        log.info("stopping")
    finally:
        await server.close()
        await daemon.close()
    return 0


async def _announce_ready(daemon: Any, url: str) -> None:
    """Say once that a model answers, and what to try."""
    while True:
        for record in (record for _, record in daemon.instances.all()):
            if record.state == "ready":
                _say(
                    f"\n  ready: {record.model.name} answers. Try:\n"
                    f'    swarmd run {record.model.name} "What is the capital of France?"\n'
                    f"    curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d "
                    f'\'{{"model": "{record.model.name}", "messages": '
                    '[{"role": "user", "content": "What is the capital of France?"}]}\'\n'
                )
                return
        await daemon.changed.wait()


def _greet(settings: Settings, data_dir: DataDir, url: str, fresh_key: str | None) -> None:
    token = load_token(data_dir.path)
    lines = [f"\n  swarmd node {settings.name!r} is up", f"  dashboard:    {url}"]
    if fresh_key is not None:
        lines.append(f"  API key:      {fresh_key}   (shown once; kept in {data_dir.path / 'api-key'})")
    if token is not None and sys.stdout.isatty():
        lines.append(f"  next machine: swarmd join {token}")
    else:
        lines.append("  next machine: `swarmd token` prints the command to type there")
    _say("\n".join(lines) + "\n")


def _say(text: str) -> None:
    Console(highlight=False, soft_wrap=True, markup=False).print(text)
    sys.stdout.flush()


def _api_key(settings: Settings, data_dir: DataDir) -> tuple[str | None, bool]:
    """The key that clients must send, and whether it was made just now. Listening beyond loopback demands one."""
    if settings.api_key is not None:
        return settings.api_key.get_secret_value(), False
    if settings.listen is None or settings.listen[0] in LOOPBACK_HOSTS:
        return None, False
    path = data_dir.path / "api-key"
    try:
        return path.read_text().strip(), False
    except FileNotFoundError:
        pass
    key = secrets.token_urlsafe(24)
    path.touch(mode=0o600)
    path.write_text(key + "\n")
    return key, True


def _set_up_logging(level: str) -> None:
    logging.basicConfig(level=level, format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("aiohttp").setLevel(logging.WARNING)
