"""A change of the swarm's token that is under way on this node: the file ``rotation`` in the data dir, mode 0600.

While it is there, it says which credentials count; the other files are changed only at the end. It is replaced as a
whole, so a node that is killed at any moment starts again either before a step or after it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from swarmd.transport.private_files import IdentityError, read_file, write_file
from swarmd.transport.statements import Count, Members

NAME = "rotation"

Pem = Annotated[str, Meta(max_length=8192)]


class RotationFile(Struct, frozen=True):
    """Where a rotation stands on this node.

    asked: this node, which keeps the token, is to rotate it. prepared: it holds a certificate of the old authority,
    which it shows, and of the new one; it accepts both. switched: it shows the new one, and still accepts both.

    `since`: Unix seconds of the phase's beginning. `token`: the new one, on the node that rotates. `members` have
    certificates of the new authority; `missing` are known nodes that have not (on the node that rotates).
    """

    phase: Literal["asked", "prepared", "switched"]
    since: Count
    serial: Count = 0
    token: Annotated[str, Meta(max_length=256)] = ""
    certificate: Pem = ""
    authority: Pem = ""
    members: Members = ()
    missing: Members = ()

    def __repr__(self) -> str:
        return f"RotationFile({self.phase})"


def load_rotation(directory: Path) -> RotationFile | None:
    """The rotation under way, None if there is none. Raises `IdentityError` if it is damaged or open to others."""
    path = directory / NAME
    # With the most members it is larger than other files of the identity.
    text = read_file(path, private=True, limit=1 << 20)
    if text is None:
        return None
    try:
        return msgspec.json.decode(text, type=RotationFile)
    except msgspec.DecodeError as error:
        raise IdentityError(f"{path} is damaged ({error}); delete it, and run `swarmd rotate` again") from None


def save_rotation(directory: Path, rotation: RotationFile, *, replace: bool = True) -> None:
    """Keep where it stands; without `replace` only if none is under way. Raises `IdentityError`."""
    write_file(directory / NAME, msgspec.json.encode(rotation), mode=0o600, replace=replace)


def end_rotation(directory: Path) -> None:
    """The other files say all again. Raises `IdentityError`."""
    path = directory / NAME
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise IdentityError(f"cannot delete {path}: {error.strerror}") from error
