"""The data dir of a node: made private, held by one daemon at a time, with a note of where that daemon answers."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import msgspec

from swarmd.node.config import ConfigError

_MOST_NOTE_BYTES = 4096


class RunningDaemon(msgspec.Struct, frozen=True):
    """Where the daemon that holds a data dir answers."""

    pid: int
    url: str


class DataDir:
    """A node's folder. `hold` takes it for this process until `release`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock_fd: int | None = None

    @property
    def models(self) -> Path:
        """Where model files are kept."""
        return self.path / "models"

    def create(self) -> None:
        """Make the folder, readable by its owner only. Raises ConfigError when it cannot be used."""
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            probe = self.path / ".write-test"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise ConfigError(
                f"the data dir {self.path} cannot be used ({error.strerror}); "
                "check its owner and permissions, or choose another with --data-dir"
            ) from None

    def hold(self) -> None:
        """Take the folder for this process. Raises ConfigError when another daemon has it."""
        self._lock_fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            running = self.running()
            where = f" (process {running.pid}, {running.url})" if running is not None else ""
            raise ConfigError(
                f"a node is running already with the data dir {self.path}{where}; "
                "use that one, stop it with `swarmd stop`, or choose another --data-dir"
            ) from None

    def note_running(self, url: str) -> None:
        """Say where this daemon answers, for the other commands."""
        temporary = self.path / "daemon.json.new"
        temporary.write_bytes(msgspec.json.encode(RunningDaemon(os.getpid(), url)))
        temporary.replace(self.path / "daemon.json")

    def release(self) -> None:
        """Give the folder back. Idempotent."""
        if self._lock_fd is not None:
            (self.path / "daemon.json").unlink(missing_ok=True)
            os.close(self._lock_fd)
            self._lock_fd = None

    def running(self) -> RunningDaemon | None:
        """The daemon that holds the folder, if one does and has said where it answers."""
        try:
            with (self.path / "lock").open("rb") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except OSError:
                    note = (self.path / "daemon.json").read_bytes()[:_MOST_NOTE_BYTES]
                    return msgspec.json.decode(note, type=RunningDaemon)
        except (OSError, msgspec.DecodeError):
            pass
        return None
