"""The data dir of a node: made private, held by one process at a time, with a note of where its daemon answers."""

from __future__ import annotations

import fcntl
import os
import secrets
from pathlib import Path

import msgspec

from swarmd.node.config import MIN_API_KEY, ConfigError

_MOST_NOTE_BYTES = 4096


class RunningDaemon(msgspec.Struct, frozen=True):
    """Where the daemon that holds a data dir answers."""

    pid: int
    url: str


class DataDir:
    """A node's folder. `hold` takes it for this process until `release`; as a context manager it is held meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock_fd: int | None = None

    def __enter__(self) -> DataDir:
        self.hold()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    @property
    def models(self) -> Path:
        """Where model files are kept."""
        return self.path / "models"

    @property
    def api_key_path(self) -> Path:
        """The API key that was made on the spot."""
        return self.path / "api-key"

    def create(self) -> None:
        """Make the folder, readable by its owner only. Raises ConfigError when it cannot be used."""
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            probe = self.path / ".write-test"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise self._unusable(error) from None

    def hold(self) -> None:
        """Take the folder for this process. Raises ConfigError when another one has it."""
        try:
            self._lock_fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            while not _locked(self._lock_fd, fcntl.LOCK_EX):
                # A command that looks whether a daemon runs holds the lock for a moment: only a daemon keeps it.
                if self.is_held():
                    raise self._taken()
        except OSError as error:
            raise self._unusable(error) from None
        except ConfigError:
            self._close_lock()
            raise

    def is_held(self) -> bool:
        """Whether a daemon, or a command that changes this folder, holds it. OSError if it cannot be told."""
        try:
            fd = os.open(self.path / "lock", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            return not _locked(fd, fcntl.LOCK_SH)
        finally:
            os.close(fd)

    def note_running(self, url: str) -> None:
        """Say where this daemon answers, for the other commands."""
        temporary = self.path / "daemon.json.new"
        temporary.write_bytes(msgspec.json.encode(RunningDaemon(os.getpid(), url)))
        temporary.replace(self.path / "daemon.json")

    def release(self) -> None:
        """Give the folder back. Idempotent."""
        if self._lock_fd is not None:
            (self.path / "daemon.json").unlink(missing_ok=True)
            self._close_lock()

    def running(self) -> RunningDaemon | None:
        """The daemon that holds the folder, if one does and has said where it answers."""
        try:
            if not self.is_held():
                return None
            note = (self.path / "daemon.json").read_bytes()[:_MOST_NOTE_BYTES]
            return msgspec.json.decode(note, type=RunningDaemon)
        except (OSError, msgspec.DecodeError):
            return None

    def kept_api_key(self) -> str | None:
        """The key that was made on the spot, if one was and is still whole. Raises ConfigError."""
        try:
            key = self.api_key_path.read_bytes()[:_MOST_NOTE_BYTES].decode("ascii").strip()
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{self.api_key_path} cannot be read ({error}); delete it to have a new key made"
            ) from None
        return key if len(key) >= MIN_API_KEY else None

    def make_api_key(self) -> str:
        """Make a key and keep it, readable by its owner only."""
        key = secrets.token_urlsafe(24)
        temporary = self.api_key_path.with_suffix(".new")
        temporary.unlink(missing_ok=True)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(fd, "w") as file:
            file.write(key + "\n")
        temporary.replace(self.api_key_path)
        return key

    def _taken(self) -> ConfigError:
        running = self.running()
        where = f" (process {running.pid}, {running.url})" if running is not None else ""
        return ConfigError(
            f"a node is running already with the data dir {self.path}{where}; "
            "use that one, stop it with `swarmd stop`, or choose another --data-dir"
        )

    def _unusable(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"the data dir {self.path} cannot be used ({error.strerror}); "
            "check its owner and permissions, or choose another with --data-dir"
        )

    def _close_lock(self) -> None:
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None


def _locked(fd: int, kind: int) -> bool:
    """Take a lock without waiting; whether it was free."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
