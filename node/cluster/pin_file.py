"""The pinned nodes on disk: ``nodes.json`` in the data dir."""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec

from swarmd.node.cluster.pins import PinFile
from swarmd.transport.private_files import IdentityError, write_file

log = logging.getLogger("swarmd.cluster")

NAME = "nodes.json"
# Of as many nodes as are kept, each with the longest name.
_MAX_BYTES = 1 << 20


def load_pins(directory: Path) -> PinFile:
    """What is kept; nothing if there is no such file, or if it is damaged, which is logged."""
    path = directory / NAME
    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(_MAX_BYTES), type=PinFile)
    except FileNotFoundError:
        return PinFile()
    except (OSError, msgspec.DecodeError) as error:
        log.warning("%s cannot be read (%s); every node counts as new", path, error)
        return PinFile()


def save_pins(directory: Path, pins: PinFile) -> None:
    """Keep the pins; a failure is logged, since a full disk must not end the daemon."""
    try:
        write_file(directory / NAME, msgspec.json.format(msgspec.json.encode(pins)), mode=0o600)
    except IdentityError as error:
        log.warning("the nodes that are known could not be kept: %s", error)
