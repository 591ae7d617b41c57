"""The list, on disk, of the complete models of one store."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import msgspec

from swarmd.node.models.disk import blocking_file_lock, write_atomic
from swarmd.node.models.layout import METADATA_NAMES, TEMPLATE_FOLDER, ModelLayout, present_metadata

log = logging.getLogger("swarmd.models")


class StoredModel(msgspec.Struct, frozen=True):
    """A complete, checked model on this machine: `path` (absolute) is what to open, a GGUF file, the first shard of a
    split one, or a folder; `files` are all its files in order; `size` in bytes, `sha256` 64 hex digits."""

    name: str
    path: Path
    size: int
    sha256: str
    files: tuple[Path, ...]


class FileStamp(msgspec.Struct, frozen=True):
    """What must be unchanged for a file's known SHA-256 to be believed without reading it again. `file` is its path
    from the model's folder."""

    size: int
    mtime_ns: int
    file: str = ""

    @classmethod
    def of(cls, folder: Path, file: str) -> FileStamp:
        """The stamp of a file now. Raises OSError."""
        status = os.stat(f"{folder}{os.sep}{file}")
        return cls(status.st_size, status.st_mtime_ns, file)


def stamps_of(layout: ModelLayout) -> tuple[FileStamp, ...]:
    """The stamps of a model's files now, in order. Raises OSError."""
    folder = _folder_of(layout.path)
    return tuple(FileStamp.of(folder, str(file.path.relative_to(folder))) for file in layout.files)


class _Record(msgspec.Struct, frozen=True):
    name: str
    path: str
    sha256: str
    files: tuple[FileStamp, ...] = ()
    stamp: FileStamp | None = None
    """What stood here for the only file before models could have several."""


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
        """Every registered model whose files are still there and unchanged since they were hashed."""
        return [_model(r) for r in self._load() if _is_current(r)]

    def by_hash(self, sha256: str) -> StoredModel | None:
        """A registered model of this identity, if its files are unchanged."""
        return next((_model(r) for r in self._load() if r.sha256 == sha256 and _is_current(r)), None)

    def by_path(self, path: Path) -> StoredModel | None:
        """The record of what lies at this very path, if its stamps still hold."""
        return next((_model(r) for r in self._load() if r.path == str(path) and _is_current(r)), None)

    def is_free(self, name: str, sha256: str) -> bool:
        """Whether no other model on this machine has the name."""
        return all(r.name != name or r.sha256 == sha256 for r in self._load())

    def add(self, name: str, path: Path, sha256: str, stamps: tuple[FileStamp, ...]) -> StoredModel:
        """Register the model at `path`, replacing what was known of it."""
        record = _Record(name, str(path), sha256, stamps)
        self._rewrite(drop=record.path, add=[record])
        return _model(record)

    def forget(self, path: Path) -> None:
        """Remove the record of a path; the files stay."""
        self._rewrite(drop=str(path), add=[])

    def _rewrite(self, drop: str, add: list[_Record]) -> None:
        with blocking_file_lock(self._lock_path):
            records = [r for r in self._load() if r.path != drop] + add
            write_atomic(self._path, msgspec.json.format(msgspec.json.encode(_Index(models=records))))

    def _load(self) -> list[_Record]:
        try:
            stamp = FileStamp.of(self._path.parent, self._path.name)
        except OSError:
            return []
        if stamp != self._read_stamp:
            try:
                models = msgspec.json.decode(self._path.read_bytes(), type=_Index).models
                self._records = [_upgraded(record) for record in models]
            except msgspec.DecodeError as exc:
                log.warning("the list of models %s is damaged (%s), it starts anew", self._path, exc)
                self._records = []
            self._read_stamp = stamp
        return self._records


def _upgraded(record: _Record) -> _Record:
    """A record of an earlier version, which had one file, in today's form."""
    if record.stamp is None:
        return record
    file = msgspec.structs.replace(record.stamp, file=Path(record.path).name)
    return msgspec.structs.replace(record, files=(file,), stamp=None)


def _model(record: _Record) -> StoredModel:
    path = Path(record.path)
    files = tuple(_folder_of(path) / stamp.file for stamp in record.files)
    return StoredModel(record.name, path, sum(stamp.size for stamp in record.files), record.sha256, files)


def _is_current(record: _Record) -> bool:
    """Whether the files are what they were, and no other has come that would belong to the model."""
    folder = _folder_of(Path(record.path))
    try:
        if not record.files or not all(_is_unchanged(f"{folder}{os.sep}{stamp.file}", stamp) for stamp in record.files):
            return False
    except OSError:
        return False
    if folder != Path(record.path):
        return True
    known = [s.file for s in record.files if s.file in METADATA_NAMES or s.file.startswith(f"{TEMPLATE_FOLDER}/")]
    return present_metadata(folder) == known


def _is_unchanged(path: str, stamp: FileStamp) -> bool:
    status = os.stat(path)
    return (status.st_size, status.st_mtime_ns) == (stamp.size, stamp.mtime_ns)


def _folder_of(path: Path) -> Path:
    """The folder that holds the files of the model at `path`."""
    return path.parent if path.suffix.lower() == ".gguf" else path
