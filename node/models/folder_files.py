"""Reading the small files of a model's folder, each bounded before it is read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from swarmd.node.models.errors import ModelFileError

MIB = 1 << 20


def read_bytes(path: Path, limit: int) -> bytes | None:
    """The file's bytes, None when there is no such file. Raises ModelFileError when it is larger than `limit` bytes or
    can't be read."""
    try:
        with path.open("rb") as file:
            # Python sets aside as much as is asked for.
            data = file.read(min(os.fstat(file.fileno()).st_size, limit) + 1)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise ModelFileError(f"{path} can't be read ({exc.strerror or exc}); check the folder") from exc
    if len(data) > limit:
        raise ModelFileError(f"{path} is larger than {limit // MIB} MiB, more than such a file needs; get another copy")
    return data


def read_text(path: Path, limit: int) -> str | None:
    """The file's text, None when there is no such file. Raises ModelFileError, also when it is not UTF-8."""
    data = read_bytes(path, limit)
    try:
        return None if data is None else data.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise ModelFileError(f"{path} is not UTF-8 text ({exc.reason}); get another copy") from exc


def read_json(path: Path, limit: int) -> dict[str, Any] | None:
    """The object in a JSON file, None when there is no such file. Raises ModelFileError when it holds anything
    else."""
    text = read_text(path, limit)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise ModelFileError(f"{path} is not valid JSON ({exc}); get another copy") from exc
    if not isinstance(value, dict):
        raise ModelFileError(f"{path} should hold a JSON object; get another copy")
    return value
