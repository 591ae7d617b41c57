"""What a model is known by everywhere: a SHA-256 that is the same on every machine.

That of a model of one file is the file's. That of several files is over a listing of them: so it is known as soon as
each file's is, and a folder copied to another machine is the same model, wherever it lies there.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable

from swarmd.node.models.disk import hash_file
from swarmd.node.models.layout import ModelLayout

_LISTING = "a swarmd model of several files, version 1\n"


def hash_model(stop: threading.Event, layout: ModelLayout, report: Callable[[int], None]) -> str:
    """The model's identity as 64 hex digits; reads every byte. `report` is told the bytes done. For `in_thread`."""
    done = 0
    hashes: list[str] = []
    for file in layout.files:
        before = done
        hashes.append(hash_file(stop, file.path, lambda inside, before=before: report(before + inside)))
        done += file.size
    if len(hashes) == 1:
        return hashes[0]
    lines = [f"{sha256} {file.size} {file.name}\n" for file, sha256 in zip(layout.files, hashes, strict=True)]
    return hashlib.sha256("".join([_LISTING, *lines]).encode()).hexdigest()
