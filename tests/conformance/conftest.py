"""One real daemon with the default model, shared by every test here that needs real answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.swarm import Node


@pytest.fixture(scope="session")
def node(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A node that is alone and serves SmolLM2 with a context of 1024 tokens; its data dir is named `attic`."""
    options = ("--no-mdns", "--context", "1024", "--memory", "1GB", "--model", str(smollm2_path))
    with Node(tmp_path_factory.mktemp("conformance") / "attic", *options) as running:
        running.until_ready(stages=1)
        yield running
