"""Target: what members say of themselves, and what a node that plans makes of it."""

from __future__ import annotations

from random import Random
from typing import Any

import msgspec
from fuzz.engine import Target
from fuzz.mutate import mutate
from fuzz.trees import Sampler, change, to_msgpack

from swarmd.discovery.records import DeviceRecord, ModelSummary, NodeRecord
from swarmd.node.cluster.ledger import Ledger, View
from swarmd.node.cluster.membership import Membership
from swarmd.node.cluster.messages import DAEMON_MESSAGES, Publish
from swarmd.partition.costs import ModelCosts
from swarmd.partition.plan import Promise
from swarmd.transport.frames import FrameError
from swarmd.transport.link import Vocabulary

_MB = 1 << 20
_OWN = "f" * 64
_MODEL = ModelSummary("tiny", "0" * 64, 80 * _MB, 8192, "llama")
_COSTS = ModelCosts((10 * _MB,) * 6, 3 * _MB, 5 * _MB, 100, _MB)
_PROMISES = (Promise(4096, 8192), Promise(1024, 2048))
_SAMPLER = Sampler()
_VOCABULARY = Vocabulary(DAEMON_MESSAGES)


def record(random: Random) -> dict[str, Any]:
    """A record of one of a few nodes, which may claim the instance that the node under test owns."""
    value = _SAMPLER.message(random, NodeRecord)
    value["id"] = "0" * 63 + random.choice("123")
    for claim in value.get("instances", ()):
        if random.random() < 0.5:
            claim["id"] = _MODEL.sha256[:16]
            claim["epoch"] = random.choice((0, 1, 2, 1 << 62))
    for device in value.get("devices", ()):
        device["memory_limit"] = random.choice((0, 30 * _MB, 200 * _MB, 1 << 62))
    return value


class Records(Target):
    """Records of up to four members over three rounds: membership, claims, plans. A plan keeps to every device's limit,
    and what the node publishes of it can be read by the others.
    """

    name = "records"
    errors = (FrameError,)
    memory = 4 << 20
    memory_per_byte = 512

    def seeds(self) -> list[bytes]:
        return [to_msgpack([record(Random(number)) for _ in range(3)]) for number in range(20)]

    def make(self, random: Random, pool: list[bytes]) -> bytes:
        if random.random() < 0.1:
            return mutate(random, random.choice(pool), random.choice(pool))
        records: Any = [record(random) for _ in range(random.randrange(1, 5))]
        for _ in range(random.randrange(3)):
            records = change(random, records)
        return to_msgpack(records)

    def run(self, data: bytes) -> str:
        try:
            found = msgspec.msgpack.decode(data, type=list[NodeRecord])[:8]
        except (ValueError, RecursionError) as error:
            raise FrameError(f"refused: {error}") from None
        membership, ledger = Membership(), Ledger(_OWN, split=len(data) % 2 == 0)
        ledger.own(_MODEL, _COSTS, _PROMISES)
        outcome = ""
        for now in (0.0, 1.0, 60.0):
            for one in found:
                membership.on_linked(one.id, now)
                membership.on_record(one, now)
            outcome = self._plan(membership, ledger, now)
            membership.tick(now)
            if found:
                membership.on_unlinked(found[0].id, now)
        return outcome

    def _plan(self, membership: Membership, ledger: Ledger, now: float) -> str:
        device = DeviceRecord("cpu", "cpu", "x", 64 * _MB, 64 * _MB, 64 * _MB, 1e9, 1e9)
        own = NodeRecord(_OWN, "own", "0", 1, devices=(device,))
        nodes = [own, *(one for one in membership.alive() if one.id != _OWN)]
        view = View(nodes)
        lost = ledger.yield_to_winners(nodes)
        ledger.consider(view, now)
        ledger.orphans(view)
        limits: dict[tuple[str, str], int] = {}  # the largest, where a record names a device twice
        for node in nodes:
            for one in node.devices:
                limits[node.id, one.id] = max(limits.get((node.id, one.id), 0), one.memory_limit)
        for instance in ledger.records:
            for stage in instance.stages:
                assert stage.bytes <= limits[stage.node, stage.device]
        published = Publish(msgspec.structs.replace(own, instances=ledger.records, follows=ledger.follows(nodes)))
        assert _VOCABULARY.decode(_VOCABULARY.encode(published)) == published
        states = [f"{one.state} in {len(one.stages)} stages" for one in ledger.records]
        return f"{len(nodes)} nodes, {states[0] if states else f'lost to {len(lost)}'}"
