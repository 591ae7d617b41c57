"""The list, on disk, of the complete model files of one store."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import msgspec

from swarmd.node.models.disk import blocking_file_lock, write_atomic

log = logging.getLogger("swarmd.models")


class StoredModel(msgspec.Struct, frozen=True):
    """A complete, checked model file on this machine: `path` is absolute, `size` in bytes, `sha256` 64 hex
    digits."""

    name: str
    path: Path
    size: int
    sha256: str


class FileStamp(msgspec.Struct, frozen=True):
    """What must be unchanged for a file's known SHA-256 to be believed without reading it again."""

    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> FileStamp:
        """The stamp of a file now. Raises OSError."""
        status = os.stat(path)
        return cls(status.st_size, status.st_mtime_ns)


class _Record(msgspec.Struct, frozen=True):
    name: str
    path: str
    stamp: FileStamp
    sha256: str


class _Index(msgspec.Struct):
    version: int = 1
    models: list[_Record] = []


class Registry:
    """The records of `index.json` in a store's directory. Reading costs a few `stat` calls; `add` and
    `forget` write (use a thread) and are safe beside other processes."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "index.json"
        self._lock_path = directory / "index.lock"
        self._records: list[_Record] = []
        self._read_stamp: FileStamp | None = None

    def models(self) -> list[StoredModel]:
        """Every registered file that is still there and unchanged since it was hashed."""
        return [_model(r) for r in self._load() if _current_stamp(r.path) == r.stamp]

    def by_path(self, path: Path) -> StoredModel | None:
        """The record of this very file, if its stamp still holds."""
        return next((m for m in self.models() if m.path == path), None)

    def is_free(self, name: str, sha256: str) -> bool:
        """Whether no other model on this machine has the name."""
        return all(r.name != name or r.sha256 == sha256 for r in self._load())

    def add(self, model: StoredModel, stamp: FileStamp) -> StoredModel:
        """Register a file, replacing what was known of its path; returns `model`."""
        record = _Record(model.name, str(model.path), stamp, model.sha256)
        self._rewrite(drop=record.path, add=[record])
        return model

    def forget(self, path: Path) -> None:
        """Remove the record of a path; the file stays."""
        self._rewrite(drop=str(path), add=[])

    def _rewrite(self, drop: str, add: list[_Record]) -> None:
        with blocking_file_lock(self._lock_path):
            records = [r for r in self._load() if r.path != drop] + add
            write_atomic(self._path, msgspec.json.format(msgspec.json.encode(_Index(models=records))))

    def _load(self) -> list[_Record]:
        stamp = _current_stamp(str(self._path))
        if stamp is None:
            return []
        if stamp != self._read_stamp:
            try:
                self._records = msgspec.json.decode(self._path.read_bytes(), type=_Index).models
            except msgspec.DecodeError as exc:
                log.warning("the list of models %s is damaged (%s), it starts anew", self._path, exc)
                self._records = []
            self._read_stamp = stamp
        return self._records


def _model(record: _Record) -> StoredModel:
    return StoredModel(record.name, Path(record.path), record.stamp.size, record.sha256)


def _current_stamp(path: str) -> FileStamp | None:
    try:
        return FileStamp.of(Path(path))
    except OSError:
        return None
