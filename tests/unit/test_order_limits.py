"""A member carries out no order that its user has not allowed, whoever gives it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from msgspec.structs import replace
from support.tiny_gguf import write_tiny_gguf

from swarmd.node.cluster.admission import Admission
from swarmd.node.cluster.messages import StartStage
from swarmd.node.cluster.order_limits import MAX_STAGES, OrderLimits, OrderRefusedError, Place
from swarmd.node.models.checkpoint import open_checkpoint
from swarmd.node.models.costs import model_costs
from swarmd.node.models.manifest import ModelManifest, ModelPart
from swarmd.node.serving.stage_host import StageKey
from swarmd.partition.costs import ModelCosts
from swarmd.partition.memory_weighted import plan
from swarmd.partition.plan import Capacity, Promise

MB = 10**6
COSTS = ModelCosts((10 * MB,) * 8, 20 * MB, 24 * MB, 1000, 5 * MB, 16 * MB)
MODEL = ModelManifest("0" * 64, "m", (ModelPart("model.gguf", 100, 10),), 1 << 20, bytes(16))
ORDER = StartStage("i", 3, 0, MODEL, "cpu", 0, 4, 4096, 2048)


def limits(**memory: int) -> OrderLimits:
    return OrderLimits(lambda: memory)


@pytest.mark.parametrize("n_devices", [1, 2, 3, 5])
def test_an_honest_plan_is_admitted_to_the_last_byte(n_devices: int):
    """What the planner fills a device with is what the member counts."""
    each = -(-COSTS.stage_bytes(0, 8, 4096) // n_devices) + 30 * MB
    capacities = [Capacity(f"{n}" * 64, "cpu", each, f"node {n}") for n in range(n_devices)]
    made = plan(COSTS, [Promise(2048, 4096)], capacities, split=True)
    assert made.stages
    for index, stage in enumerate(made.stages):
        assert COSTS.stage_bytes(stage.start, stage.end, 4096) == stage.bytes
        order = replace(ORDER, index=index, start=stage.start, end=stage.end)
        limits(cpu=stage.bytes).admit(order, COSTS, {Place.of(order)}, set())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kv_tokens": 1 << 27}, r"needs .*models may take 200 MB on cpu of this node \(--memory\)"),
        ({"end": 8, "kv_tokens": 20_000}, "models may take 200 MB"),
        ({"end": 9}, "has 8 layers, not 9"),
        ({"end": 1 << 62}, "has 8 layers"),
        ({"device": "cuda:9"}, "models may take 0 B on cuda:9"),
    ],
)
def test_an_order_that_asks_for_too_much(changes: dict[str, Any], words: str):
    order = replace(ORDER, **changes)
    with pytest.raises(OrderRefusedError, match=words):
        limits(cpu=200 * MB).admit(order, COSTS, {Place.of(order)}, set())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"start": 4, "end": 4}, "are no stage"),
        ({"start": 5, "end": 4}, "are no stage"),
        ({"context": 0}, "context of 0"),
        ({"context": 1 << 62}, "more than any stage can hold"),
        ({"kv_tokens": 0}, "room for 0"),
        ({"kv_tokens": 1 << 62}, "more than any stage can hold"),
    ],
)
def test_absurd_numbers_are_refused_before_anything_is_fetched(changes: dict[str, Any], words: str):
    with pytest.raises(OrderRefusedError, match=words):
        limits(cpu=1 << 60).check_numbers(replace(ORDER, **changes), set())


def test_a_flood_of_orders_starts_a_bounded_number_of_processes():
    admitted = 0
    checker = limits(cpu=1 << 60)
    present = set[Place]()
    for n in range(100):
        order = replace(ORDER, instance=f"i{n}")
        try:
            checker.check_numbers(order, present)
        except OrderRefusedError as error:
            assert "takes no more than 16" in str(error)
        else:
            present.add(Place.of(order))
            checker.admit(order, COSTS, present, present)
            admitted += 1
    assert admitted == MAX_STAGES


def test_what_other_stages_take_on_the_device_counts_until_they_are_gone():
    need = COSTS.stage_bytes(0, 4, 4096)
    checker = limits(**{"cpu": 2 * need, "cuda:0": need})
    first, second, third = (replace(ORDER, instance=name) for name in "abc")
    places = [Place.of(order) for order in (first, second, third)]
    checker.admit(first, COSTS, places[:1], [])
    checker.admit(second, COSTS, places[:2], places[:1])
    with pytest.raises(OrderRefusedError, match="other stages take"):
        checker.admit(third, COSTS, places, places[:2])
    checker.admit(replace(third, device="cuda:0"), COSTS, places, places[:2])
    checker.admit(second, COSTS, places[:2], places[:2])  # the same order again
    checker.admit(third, COSTS, [places[0], places[2]], places[:1])


class HeaderOnly:
    """An exchange that has brought the header and counts how often it was asked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.asked = 0

    async def header(self, manifest: ModelManifest, progress: Callable[[Any], None]) -> Path:
        self.asked += 1
        return self.path


async def test_a_header_decides_and_is_read_once(tmp_path: Path):
    exchange = HeaderOnly(write_tiny_gguf(tmp_path / "tiny.gguf"))
    with open_checkpoint(exchange.path) as checkpoint:
        costs = model_costs(checkpoint)
    need = costs.stage_bytes(0, 2, 64)
    admission = Admission(limits(cpu=need), cast(Any, exchange))
    order = replace(ORDER, end=2, kv_tokens=64, context=64)
    key = StageKey("i", "b" * 64, 3, 0)
    await admission.check(key, order, lambda: {key}, lambda _: None)
    later = key._replace(epoch=4)
    await admission.check(later, replace(order, epoch=4), lambda: {key, later}, lambda _: None)
    other = StageKey("j", "b" * 64, 1, 0)
    with pytest.raises(OrderRefusedError, match="other stages take"):
        await admission.check(other, replace(order, instance="j"), lambda: {later, other}, lambda _: None)
    beside = replace(order, epoch=5, beside=True)
    newest = key._replace(epoch=5)
    with pytest.raises(OrderRefusedError, match="other stages take"):
        await admission.check(newest, beside, lambda: {later, newest}, lambda _: None)
    await admission.check(newest, replace(beside, fetch_only=True), lambda: {later, newest}, lambda _: None)
    with pytest.raises(OrderRefusedError, match="--memory"):
        await admission.check(key, replace(order, kv_tokens=1 << 20), lambda: {key}, lambda _: None)
    assert exchange.asked == 1
    with pytest.raises(OrderRefusedError):
        await admission.check(key, replace(order, model=replace(MODEL, sha256="1" * 64), end=0), set, lambda _: None)
    assert exchange.asked == 1, "absurd numbers fetch nothing"
