"""The instances of the swarm as one node sees them: its own, and whose word counts for the others. Pure.

What the daemons of a swarm decide together follows from this, `Membership` and `OwnedInstance` alone, so a whole swarm
can be run in virtual time.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from swarmd.discovery.records import MAX_CLAIMS, Claim, InstanceRecord, InstanceState, ModelSummary, NodeRecord
from swarmd.node.cluster.actions import Action, StopStages
from swarmd.node.cluster.claims import rank, successor, winner
from swarmd.node.cluster.ownership import OwnedInstance
from swarmd.node.cluster.planning import Surroundings
from swarmd.node.cluster.trouble import Trouble
from swarmd.partition.costs import ModelCosts
from swarmd.partition.plan import Capacity, Promise

MAX_INSTANCES = 16
ACCELERATORS = frozenset({"cuda", "metal"})


@dataclass(frozen=True)
class View:
    """What a node sees at a moment: the records of all nodes that are alive, its own first.

    `suspects` are those that say nothing at present; `gone` are the last records of members that are lost and not yet
    forgotten.
    """

    nodes: Sequence[NodeRecord]
    suspects: frozenset[str] = frozenset()
    gone: Sequence[NodeRecord] = ()


class Ordered(NamedTuple):
    """An action that the owner of an instance takes."""

    instance: str
    action: Action


class Ledger:
    """This node's instances and its view of the others'. `split` is what its own instances wish for."""

    def __init__(self, own_id: str, *, split: bool = False) -> None:
        self._own_id = own_id
        self._split = split
        self._owned: dict[str, OwnedInstance] = {}
        self._highest: dict[str, int] = {}
        self._trouble = Trouble()
        self._around: dict[str, tuple[object, Surroundings]] = {}

    @property
    def owned(self) -> dict[str, OwnedInstance]:
        """The instances that this node owns, by id."""
        return dict(self._owned)

    @property
    def records(self) -> tuple[InstanceRecord, ...]:
        """What this node publishes of the instances that it owns."""
        return tuple(instance.record for instance in self._owned.values())

    def all(self, nodes: Sequence[NodeRecord]) -> list[tuple[str, InstanceRecord]]:
        """Every instance whose owner is seen, with that owner; of rival claims the one that counts."""
        claims: dict[str, list[tuple[str, InstanceRecord]]] = {}
        for record in self.records:
            claims.setdefault(record.id, []).append((self._own_id, record))
        for node in nodes:
            if node.instances and node.id != self._own_id:
                for record in node.instances:
                    claims.setdefault(record.id, []).append((node.id, record))
        return [winner(rivals) for rivals in claims.values()]

    def claims(self, nodes: Sequence[NodeRecord]) -> dict[str, Claim]:
        """Whose word counts per instance, also of owners that only others see."""
        found = {
            record.id: Claim(record.id, record.model.name, owner, record.epoch, record.term)
            for owner, record in self.all(nodes)
        }
        seen = {node.id for node in nodes}
        for node in nodes:
            for claim in node.follows:
                if claim.owner in seen or claim.owner == self._own_id:
                    continue  # what it says itself is newer
                known = found.get(claim.instance)
                if known is None or _rank(claim) < _rank(known):
                    found[claim.instance] = claim
        return found

    def follows(self, nodes: Sequence[NodeRecord]) -> tuple[Claim, ...]:
        """The claims of others that this node tells of: of owners that it sees itself."""
        followed = [
            Claim(record.id, record.model.name, owner, record.epoch, record.term)
            for owner, record in self.all(nodes)
            if owner != self._own_id
        ]
        return tuple(sorted(followed, key=lambda claim: claim.instance)[:MAX_CLAIMS])

    def own(self, model: ModelSummary, costs: ModelCosts, promises: Sequence[Promise]) -> InstanceRecord:
        """Become the owner of a model's instance. Raises ValueError when this node owns as many as it may."""
        instance_id = instance_id_of(model)
        if instance_id not in self._owned:
            self._require_room()
            epoch = self._highest.get(instance_id, 0)
            self._owned[instance_id] = OwnedInstance(
                instance_id, model, costs, promises, epoch=epoch, split=self._split
            )
        return self._owned[instance_id].record

    def take_over(
        self, left: InstanceRecord, costs: ModelCosts, promises: Sequence[Promise], view: View, now: float
    ) -> list[Ordered]:
        """Become the owner of what another one has left. Its stages go on if all of them are there.

        Raises ValueError when this node owns as many as it may.
        """
        if left.id in self._owned:
            return []
        self._require_room()
        epoch = max(self._highest.get(left.id, 0), left.epoch)
        owned = self._owned[left.id] = OwnedInstance(
            left.id, left.model, costs, promises, epoch=epoch, split=left.split
        )
        there = {node.id for node in view.nodes} - view.suspects
        whole = left.state is InstanceState.READY and all(stage.node in there for stage in left.stages)
        if not whole or epoch != left.epoch:
            return []
        return [Ordered(left.id, action) for action in owned.adopt(left, now)]

    def consider(self, view: View, now: float, busy: Collection[str] = ()) -> list[Ordered]:
        """Act on who is there now; called on every change of the members and every tick.

        `busy` are the instances that streams run on.
        """
        orders: list[Ordered] = []
        for instance_id, instance in self._owned.items():
            around = self._surroundings(instance_id, view, now)
            actions = instance.consider(around, now, idle=instance_id not in busy)
            orders += [Ordered(instance_id, action) for action in actions]
        return orders

    def yield_to_winners(self, nodes: Sequence[NodeRecord]) -> list[Claim]:
        """Who holds the lower claim lets go without touching the stages: the winner's orders replace them.

        Returns the claims that won.
        """
        won: list[Claim] = []
        for claim in self.claims(nodes).values():
            self._highest[claim.instance] = max(self._highest.get(claim.instance, 0), claim.epoch)
            if claim.owner != self._own_id and self._owned.pop(claim.instance, None) is not None:
                won.append(claim)
        while len(self._highest) > 8 * MAX_INSTANCES:
            del self._highest[next(iter(self._highest))]
        return won

    def orphans(self, view: View) -> list[InstanceRecord]:
        """The instances that this node is to take over: their owner is gone, or leaves and has no part in them."""
        claimed = self.claims(view.nodes)
        seen = {node.id for node in view.nodes}
        staying = [node for node in view.nodes if not node.leaving]
        mine: dict[str, InstanceRecord] = {}
        for node in (*view.gone, *(node for node in view.nodes if node.leaving)):
            for record in node.instances:
                rival = claimed.get(record.id)
                left = node.id in seen and _is_left(node, record)
                if rival is not None and (rival.owner != node.id or not left):
                    continue
                known = mine.get(record.id)
                if (known is None or record.epoch > known.epoch) and self._is_heir(record, staying):
                    mine[record.id] = record
        return [record for record in mine.values() if record.id not in self._owned]

    def on_gone(self, node: str, now: float) -> None:
        """A member went without a word."""
        self._trouble.on_crashed(node, now)

    def on_heard_again(self, node: str) -> list[Ordered]:
        """A member was away for a moment, and orders to end stages may have been lost with the link: they are repeated.

        Those are stages of moves that were given up, and all where nothing serves for want of memory.
        """
        orders: list[Ordered] = []
        for instance_id, owned in self._owned.items():
            since = {InstanceState.READY: owned.epoch + 1, InstanceState.WAITING: 0}.get(owned.record.state)
            if since is not None and owned.move is None and since <= owned.last_epoch:
                orders.append(Ordered(instance_id, StopStages(owned.last_epoch, (node,), since=since)))
        return orders

    def on_stage_lost(
        self,
        instance_id: str,
        epoch: int,
        reason: str,
        now: float,
        *,
        culprit: str = "",
        starting: bool = False,
        refused: bool = False,
    ) -> list[Ordered]:
        """A stage is lost, by the fault of node `culprit` if one is named; `starting`: it did not come up at all.

        `refused`: its node had no room for it.
        """
        instance = self._owned.get(instance_id)
        if instance is None:
            return []
        epochs = {instance.epoch, instance.move.epoch if instance.move is not None else instance.epoch}
        if culprit and epoch in epochs:
            (self._trouble.on_failed if starting else self._trouble.on_crashed)(culprit, now)
        actions = instance.on_stage_lost(epoch, reason, now, refused=refused)
        return [Ordered(instance_id, action) for action in actions]

    def _is_heir(self, record: InstanceRecord, staying: Sequence[NodeRecord]) -> bool:
        holders = [n.id for n in staying if any(m.sha256 == record.model.sha256 for m in n.models)]
        return successor(record, [node.id for node in staying], holders) == self._own_id

    def _require_room(self) -> None:
        if len(self._owned) >= MAX_INSTANCES:
            raise ValueError(f"this node owns {MAX_INSTANCES} instances already")

    def _surroundings(self, instance_id: str, view: View, now: float) -> Surroundings:
        """The same object as long as nothing has changed, so that nothing is planned again for nothing."""
        moves = [instance.move for instance in self._owned.values()]
        seen = (tuple(view.nodes), view.suspects, self._trouble.avoided(now), self.records, moves)
        known = self._around.get(instance_id)
        if known is None or known[0] != seen:
            self._around = {key: value for key, value in self._around.items() if key in self._owned}
            known = self._around[instance_id] = (seen, self._look_around(instance_id, view, now))
        return known[1]

    def _look_around(self, instance_id: str, view: View, now: float) -> Surroundings:
        used = self._used_by_others(instance_id, view.nodes)
        return Surroundings(
            [
                Capacity(
                    node.id,
                    device.id,
                    max(0, device.memory_limit - used.get((node.id, device.id), 0)),
                    node.name if len(node.devices) == 1 else f"{node.name} ({device.id})",
                    bandwidth=device.memory_bandwidth,
                    accelerator=device.kind in ACCELERATORS,
                )
                for node in view.nodes
                for device in node.devices
            ],
            suspects=view.suspects,
            leaving=frozenset(node.id for node in view.nodes if node.leaving),
            avoided=self._trouble.avoided(now),
            cut=_cut_pairs(view.nodes),
        )

    def _used_by_others(self, instance_id: str, nodes: Sequence[NodeRecord]) -> Mapping[tuple[str, str], int]:
        """Bytes per (node, device) that the stages of other instances take, those that are on their way included."""
        used: dict[tuple[str, str], int] = {}
        stages = [stage for _, record in self.all(nodes) if record.id != instance_id for stage in record.stages]
        for other_id, other in self._owned.items():
            if other_id != instance_id and other.move is not None:
                stages += other.move.stages
        for stage in stages:
            used[stage.node, stage.device] = used.get((stage.node, stage.device), 0) + stage.bytes
        return used


def instance_id_of(model: ModelSummary) -> str:
    """One instance per model file in a swarm."""
    return model.sha256[:16]


def _is_left(node: NodeRecord, record: InstanceRecord) -> bool:
    """A node that leaves has brought its instance to others."""
    return record.state is InstanceState.READY and all(stage.node != node.id for stage in record.stages)


def _cut_pairs(nodes: Sequence[NodeRecord]) -> frozenset[frozenset[str]]:
    """The pairs of these nodes that cannot reach each other."""
    there = {node.id for node in nodes}
    # Where a network fell in two, all on one side say the same.
    within = {told: [other for other in told if other in there] for told in {node.cut_off for node in nodes}}
    return frozenset(
        frozenset((node.id, other)) for node in nodes for other in within[node.cut_off] if other != node.id
    )


def _rank(claim: Claim) -> tuple[int, int, str]:
    return rank(claim.epoch, claim.term, claim.owner)
