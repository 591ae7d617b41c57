"""Which instance a request gets when the model's owner is lost and others still go by its word."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from swarmd.discovery.records import Claim, InstanceRecord, InstanceState, ModelSummary
from swarmd.node.cluster import launcher as launcher_module
from swarmd.node.cluster.launcher import Launcher
from swarmd.node.cluster.signal import Signal
from swarmd.node.models.errors import ModelFileError

OWNER = "a" * 64
MODEL = ModelSummary("tiny", "b" * 64, 1000, 512, "llama")
CLAIM = Claim("i", "tiny", OWNER, 1, 0)


class Known:
    """What a node knows: the records of those it sees, and the claims that they go by."""

    def __init__(self) -> None:
        self.records: list[tuple[str, InstanceRecord]] = []
        self.claimed: dict[str, Claim] = {"i": CLAIM}

    def all(self) -> list[tuple[str, InstanceRecord]]:
        return self.records

    def claims(self) -> dict[str, Claim]:
        return self.claimed


@pytest.fixture
def known() -> Known:
    return Known()


@pytest.fixture
def changed() -> Signal:
    return Signal()


@pytest.fixture
def launcher(known: Known, changed: Signal) -> Launcher:
    instances: Any = known
    unused: Any = SimpleNamespace()
    return Launcher(unused, unused, instances, changed, lambda: None, context=None, progress=lambda progress: None)


async def test_an_instance_that_changes_hands_is_waited_for(launcher: Launcher, known: Known, changed: Signal):
    request = asyncio.create_task(launcher.launch("tiny"))
    for _ in range(3):
        await asyncio.sleep(0)
        changed.notify()
    assert not request.done()
    record = InstanceRecord("i", MODEL, InstanceState.PLANNING, 2)
    known.records.append((OWNER, record))
    changed.notify()
    assert await request is record


async def test_one_that_stays_out_of_reach_is_not_waited_for_for_ever(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(launcher_module, "HEIR_SECONDS", 0.01)
    with pytest.raises(ModelFileError, match="served by a node that this one cannot reach"):
        await launcher.launch("tiny")
