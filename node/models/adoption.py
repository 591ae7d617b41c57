"""How a model that was fetched whole gets its final place in a store."""

from __future__ import annotations

import os
from pathlib import Path

from swarmd.node.models.disk import sync_directory
from swarmd.node.models.layout import ModelLayout, placed
from swarmd.node.models.partial import PartialModel, remove


def adopt_files(partial: PartialModel, folder: Path) -> ModelLayout:
    """Give completed files their final place in `folder`, the whole model or none of it. Their old one stays until
    the store is next opened (`clear_adopted`), because a stage may be about to open it. Blocking; raises OSError.
    """
    final = folder / partial.root.name
    temporary = folder / f".{partial.root.name}.{os.getpid()}"
    remove(temporary)
    try:
        _link_all(partial.layout, placed(temporary, partial.manifest.sizes))
    except OSError:  # a file system without hard links
        remove(temporary)
        temporary = partial.root
    remove(final)
    temporary.replace(final)
    sync_directory(folder)
    return placed(final, partial.manifest.sizes)


def clear_adopted(partials: Path, files: Path) -> None:
    """Remove what was left in `partials` of models that have their final place. Blocking."""
    for path in partials.iterdir():
        if (path.suffix == ".gguf" or path.is_dir()) and (files / path.name).exists():
            remove(path)


def _link_all(old: ModelLayout, new: ModelLayout) -> None:
    for source, target in zip(old.files, new.files, strict=True):
        target.path.parent.mkdir(parents=True, exist_ok=True)
        os.link(source.path, target.path)
    for folder in {file.path.parent for file in new.files}:
        sync_directory(folder)
