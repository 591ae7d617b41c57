"""Files of a node's identity: read with their mode checked, and written as a whole or not at all."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

_MAX_FILE = 64 * 1024


class IdentityError(Exception):
    """A key, certificate or token file cannot be used; the message names the path and the remedy."""


def read_file(path: Path, *, private: bool = False, limit: int = _MAX_FILE) -> bytes | None:
    """The first `limit` bytes of a file, or None if there is none.

    Raises `IdentityError` if it cannot be read, or if it is `private` and open to other users.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            text = file.read(limit)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise IdentityError(
            f"cannot read {path}: {error.strerror}; check the owner and mode of the data directory"
        ) from error
    if private and os.name == "posix" and mode & 0o077:
        raise IdentityError(f"{path} can be read by other users (mode {mode:04o}); run `chmod 600 {path}`")
    return text


def write_file(path: Path, content: bytes, *, mode: int, replace: bool = True) -> None:
    """Write atomically; with `replace` false an existing file wins, so that two first starts agree.

    Raises `IdentityError`.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if replace:
                temporary.replace(path)
            else:
                _link_unless_there(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise IdentityError(
            f"cannot write {path}: {error.strerror}; check the data directory, or choose another with --data-dir"
        ) from error


def _link_unless_there(temporary: Path, path: Path) -> None:
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        return
    except OSError:  # a file system without hard links: the check and the rename are then two steps
        if not path.exists():
            temporary.replace(path)
