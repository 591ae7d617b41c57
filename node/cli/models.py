"""`swarmd pull` and `swarmd models`; both work without a running daemon."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table

from swarmd.node.cli.console import CommandError, guarded, settings_of
from swarmd.node.config import ConfigError
from swarmd.node.data_dir import DataDir
from swarmd.node.models.catalog import CATALOG, ModelNameError, resolve
from swarmd.node.models.checkpoint import open_checkpoint
from swarmd.node.models.costs import model_costs
from swarmd.node.models.errors import ModelFileError
from swarmd.node.models.layout import layout_of
from swarmd.node.models.progress import Progress
from swarmd.node.models.store import ModelStore
from swarmd.partition.units import format_bytes


def pull(given: Mapping[str, Any], model: str) -> int:
    """Bring a model, with a progress bar; the exit code."""

    def work() -> int:
        store = _store(given)
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with ProgressBar(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(model, total=None)

            def show(progress: Progress) -> None:
                description = f"{progress.model} ({progress.phase})"
                bar.update(
                    task,
                    description=description,
                    total=progress.total_bytes or None,
                    completed=progress.done_bytes,
                )

            try:
                stored = asyncio.run(store.ensure(model, show))
            except (ModelNameError, ModelFileError, OSError) as error:
                raise CommandError(str(error)) from None
        print(f"{stored.name} is on this machine: {format_bytes(stored.size)}, SHA-256 {stored.sha256[:16]}...")
        return 0

    return guarded(work)


def list_models(given: Mapping[str, Any]) -> int:
    """A table of models; the exit code."""

    def work() -> int:
        here = {model.name: model for model in _store(given).entries()}
        table = Table()
        for column in ("model", "size", "here", "what it is"):
            table.add_column(column)
        for entry in CATALOG:
            table.add_row(
                entry.name, format_bytes(entry.size), "yes" if entry.name in here else "no", entry.description
            )
            here.pop(entry.name, None)
        for name, model in here.items():
            table.add_row(name, format_bytes(model.size), "yes", str(model.path))
        Console().print(table)
        return 0

    return guarded(work)


def check_servable(data_dir: DataDir, name: str) -> None:
    """Refuse at once what a node could only try in vain: an unknown name, or a file of no model that swarmd runs.

    Raises ConfigError.
    """
    store = ModelStore(data_dir.models)
    if name == "none" or any(model.name == name for model in store.entries()):
        return
    try:
        path = resolve(name).path
        if path is not None:
            with open_checkpoint(layout_of(path).path) as checkpoint:
                model_costs(checkpoint)
    except (ModelNameError, ModelFileError, OSError) as error:
        raise ConfigError(f"--model: {error}") from None


def _store(given: Mapping[str, Any]) -> ModelStore:
    data_dir = DataDir(settings_of(given).data_dir)
    data_dir.create()
    return ModelStore(data_dir.models)
