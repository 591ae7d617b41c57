"""Which swarm this machine's node belongs to: founding one, `swarmd join` and `swarmd token`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from swarmd.node.cli.console import USAGE_ERROR, CommandError, guarded, settings_of
from swarmd.node.cluster.pin_file import NAME as PIN_FILE
from swarmd.node.data_dir import DataDir
from swarmd.transport.denial_files import forget_denials
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
from swarmd.transport.rotation_file import end_rotation, load_rotation
from swarmd.transport.statements import Denials
from swarmd.transport.token import JoinToken, TokenError

log = logging.getLogger("swarmd")


def join_swarm(given: Mapping[str, Any], token_text: str) -> int:
    """Certify this node's key for the swarm of a token; the token itself is not kept. The exit code."""

    def work() -> int:
        settings = settings_of(given)
        if not token_text.strip():
            raise CommandError(
                "no token given; write `swarmd join TOKEN`, as `swarmd token` on a machine of the swarm prints it",
                USAGE_ERROR,
            )
        try:
            token = JoinToken.parse(token_text)
        except TokenError as error:
            raise CommandError(str(error), USAGE_ERROR) from None
        data_dir = DataDir(settings.data_dir)
        data_dir.create()
        with data_dir:
            _change_swarm(data_dir, token)
        return 0

    return guarded(lambda: with_identity(work))


def show_token(given: Mapping[str, Any]) -> int:
    """Print the join command; the exit code."""

    def work() -> int:
        data_dir = settings_of(given).data_dir
        refuse_during_rotation(data_dir)
        token = load_token(data_dir)
        if token is not None:
            print(f"swarmd join {token}")
            return 0
        if load_credentials(data_dir) is None:
            raise CommandError(f"there is no node in {data_dir} yet; start one with `swarmd`")
        raise CommandError(
            "this node joined with a token and has not kept it; "
            "run `swarmd token` on the machine that founded the swarm"
        )

    return guarded(lambda: with_identity(work))


def own_credentials(data_dir: DataDir) -> Credentials:
    """This node's credentials; on the very first start it founds a swarm of its own. Raises IdentityError."""
    credentials = load_credentials(data_dir.path)
    if credentials is None:
        token = load_token(data_dir.path) or JoinToken.generate()
        save_token(data_dir.path, token)
        credentials = issue_credentials(load_or_create_node_key(data_dir.path), token)
        save_credentials(data_dir.path, credentials)
        log.info("founded a new swarm")
    return credentials


def with_identity(work: Callable[[], int]) -> int:
    """Run work that needs the identity files; their errors become a CommandError."""
    try:
        return work()
    except IdentityError as error:
        raise CommandError(str(error), USAGE_ERROR) from None


def refuse_during_rotation(data_dir: Path) -> None:
    """Raises CommandError while the token is being changed."""
    if load_rotation(data_dir) is not None:
        raise CommandError("the join token is being changed; try again in some seconds, while the node runs")


def _change_swarm(data_dir: DataDir, token: JoinToken) -> None:
    before, kept = load_credentials(data_dir.path), load_token(data_dir.path)
    if before is None or before.swarm_tag != token.swarm_tag:
        end_rotation(data_dir.path)
        forget_denials(data_dir.path, Denials({}))
        (data_dir.path / PIN_FILE).unlink(missing_ok=True)
    if kept is not None and kept != token:
        (data_dir.path / "token").unlink()
    save_credentials(data_dir.path, issue_credentials(load_or_create_node_key(data_dir.path), token))
