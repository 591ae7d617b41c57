"""`swarmd evict` and `swarmd rotate`: decided in the data dir of a node that keeps the token, and carried out by its
daemon, which watches it."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swarmd.node.cli.console import USAGE_ERROR, CommandError, guarded, running_daemon, settings_of
from swarmd.node.cli.identity import refuse_during_rotation, with_identity
from swarmd.node.cluster.pin_file import load_pins
from swarmd.node.cluster.pins import LEAST_DIGITS, Pin, find
from swarmd.node.data_dir import DataDir
from swarmd.transport.denial_files import read_denials, save_denial
from swarmd.transport.identity import Credentials, load_credentials, load_token
from swarmd.transport.rotation_file import RotationFile, load_rotation, save_rotation
from swarmd.transport.statements import Denials, StatementError, deny
from swarmd.transport.token import JoinToken

ROTATE_SECONDS = 60.0
_MOST_SHOWN = 32


def evict(given: Mapping[str, Any], wanted: str, *, undo: bool) -> int:
    """Expel a node, or let it in again; the exit code."""

    def work() -> int:
        data_dir = settings_of(given).data_dir
        credentials, token = _authority(data_dir, "evict a node")
        refuse_during_rotation(data_dir)
        denials = Denials(credentials.authority_keys())
        read_denials(data_dir, denials)
        pin = _node_meant(data_dir, credentials.node_id, denials, wanted)
        _check(credentials, denials, pin, undo=undo)
        now = time.time()
        serial = denials.next_serial(pin.id, int(now * 1000))
        denial = deny(token, pin.id, pin.name, int(now), serial, evicted=not undo)
        try:
            denials.admit(denial)
        except StatementError as error:
            raise CommandError(str(error)) from None
        save_denial(data_dir, denial)
        print(_done(data_dir, pin, undo=undo))
        return 0

    return guarded(lambda: with_identity(work))


def rotate(given: Mapping[str, Any]) -> int:
    """Replace the join token of a swarm whose node here runs; the exit code."""

    def work() -> int:
        data_dir = settings_of(given).data_dir
        _authority(data_dir, "change the join token")
        refuse_during_rotation(data_dir)
        running_daemon(settings_of(given))
        token = JoinToken.generate()
        save_rotation(data_dir, RotationFile("asked", int(time.time()), token=str(token)), replace=False)
        done = _watch(data_dir, token)
        names = {pin.id: pin.name for pin in load_pins(data_dir).nodes}
        print(_rotated(done, names))
        return 0

    return guarded(lambda: with_identity(work))


def _watch(data_dir: Path, token: JoinToken) -> RotationFile:
    """Wait until the token has been changed; how it went. Raises CommandError."""
    deadline = time.monotonic() + ROTATE_SECONDS
    last: RotationFile | None = None
    while (present := load_rotation(data_dir)) is not None and present.token == str(token):
        if present.phase == "switched" and (last is None or last.phase != "switched"):
            print(f"{len(present.members)} node(s) have new certificates; the old token counts for some seconds more")
        last = present
        if time.monotonic() > deadline:
            raise CommandError("this takes long; it goes on while the node runs, whose log says more")
        time.sleep(0.05)
    if last is None or last.phase != "switched" or load_token(data_dir) != token:
        raise CommandError("the join token was not changed; the node's log says why")
    return last


def _rotated(done: RotationFile, names: Mapping[str, str]) -> str:
    lines = ["the join token is changed: the old one is worthless, `swarmd token` prints the new one"]
    if done.missing:
        lines.append("these could not be reached, and have to join again with the new token:")
        lines += [f"  {names.get(node, '')} ({node[:12]})" for node in done.missing]
    return "\n".join(lines)


def _authority(data_dir: Path, what: str) -> tuple[Credentials, JoinToken]:
    credentials, token = load_credentials(data_dir), load_token(data_dir)
    if credentials is None:
        raise CommandError(f"there is no node in {data_dir} yet; start one with `swarmd`")
    if token is None or token.swarm_tag != credentials.swarm_tag:
        raise CommandError(
            f"only a node that keeps the join token can {what}, and this one has joined without keeping it; "
            "run the command on the machine that founded the swarm"
        )
    return credentials, token


def _node_meant(data_dir: Path, own_id: str, denials: Denials, wanted: str) -> Pin:
    """The one node that is meant. Raises CommandError that lists what there is."""
    if len(wanted) >= LEAST_DIGITS and own_id.startswith(wanted.lower()):
        return Pin(own_id, "", 0, 0)
    known = load_pins(data_dir).nodes
    kept = [Pin(denial.node, denial.name, denial.at, denial.at) for denial in denials.all]
    candidates = list({pin.id: pin for pin in (*kept, *known)}.values())
    found = find(candidates, wanted)
    if len(found) == 1:
        return found[0]
    if not found and re.fullmatch("[0-9a-f]{64}", wanted.lower()):
        return Pin(wanted.lower(), "", 0, 0)
    shown = "\n".join(f"  {pin.id[:16]}  {pin.name}" for pin in (found or candidates)[:_MOST_SHOWN])
    if found:
        raise CommandError(f"{wanted!r} may mean several nodes; name one by its id:\n{shown}", USAGE_ERROR)
    if not candidates:
        raise CommandError("this node has never met another one")
    raise CommandError(f"no node is known as {wanted!r}; this node has met:\n{shown}", USAGE_ERROR)


def _check(credentials: Credentials, denials: Denials, pin: Pin, *, undo: bool) -> None:
    if pin.id == credentials.node_id:
        raise CommandError("a node cannot evict itself; `swarmd stop` ends it", USAGE_ERROR)
    latest = denials.get(pin.id)
    evicted = latest is not None and latest.evicted
    if evicted and not undo:
        assert latest is not None
        raise CommandError(f"{pin.name or pin.id[:12]} is {latest.reason} already")
    if undo and not evicted:
        raise CommandError(f"{pin.name or pin.id[:12]} is not evicted")


def _done(data_dir: Path, pin: Pin, *, undo: bool) -> str:
    who = f"{pin.name or 'the node'} ({pin.id[:12]})"
    running = DataDir(data_dir).running() is not None
    when = "the members are being told" if running else "the members are told when this node starts"
    if undo:
        return f"{who} may take part again; {when}"
    return (
        f"{who} is evicted; {when}\n"
        "whoever used that machine may know the join token: `swarmd rotate` makes it worthless"
    )
