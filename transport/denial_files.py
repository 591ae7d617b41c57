"""Denials on disk: one small file per node in the folder ``denials`` of the data dir.

A file each, replaced as a whole, so that the daemon and the command that evicts need no lock between them. What is
read is checked like what comes from a member: a file proves nothing by being there.
"""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec

from swarmd.transport.private_files import IdentityError, read_file, write_file
from swarmd.transport.statements import MAX_DENIALS, Denial, Denials, StatementError

log = logging.getLogger("swarmd.transport")

FOLDER = "denials"


def save_denial(directory: Path, denial: Denial) -> None:
    """Keep a denial. Raises `IdentityError` if it cannot be written."""
    write_file(directory / FOLDER / denial.node, msgspec.msgpack.encode(denial), mode=0o600)


def read_denials(directory: Path, denials: Denials) -> list[Denial]:
    """Take in what is kept; what of it was news. A file that is damaged, or of another swarm, is left out and named."""
    news: list[Denial] = []
    for path in _files(directory):
        try:
            denial = msgspec.msgpack.decode(read_file(path) or b"", type=Denial)
            if denials.admit(denial):
                news.append(denial)
        except (IdentityError, StatementError, msgspec.DecodeError) as error:
            log.warning("%s does not count: %s", path, error)
    return news


def forget_denials(directory: Path, keep: Denials) -> None:
    """Delete the files of what is not among those to keep: of an authority that is no more."""
    for path in _files(directory):
        if keep.get(path.name) is None:
            path.unlink(missing_ok=True)


def changed_at(directory: Path) -> int:
    """A number that changes when a denial was written, 0 as long as there is none."""
    try:
        return (directory / FOLDER).stat().st_mtime_ns
    except OSError:
        return 0


def _files(directory: Path) -> list[Path]:
    try:
        found = sorted(path for path in (directory / FOLDER).iterdir() if not path.name.startswith("."))
    except OSError:
        return []
    return found[: 2 * MAX_DENIALS]
