"""What must be true of a virtual swarm that is at rest: one live epoch per instance and connected component."""

from __future__ import annotations

from collections.abc import Iterable

from support.virtual_swarm.world import World

from swarmd.discovery.records import InstanceRecord, InstanceState
from swarmd.node.cluster import launcher
from swarmd.partition.connected import plan_connected
from swarmd.partition.plan import Capacity, DoesNotFit


class Invariants:
    """Looks at a swarm; `wrong` is what is not as it must be, in words."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.wrong: list[str] = []
        self.highest_epoch = 0

    def _wrong(self, what: str) -> None:
        self.wrong.append(what)

    def claims(self) -> dict[str, list[tuple[str, int, int, str]]]:
        found: dict[str, list[tuple[str, int, int, str]]] = {}
        for node in self.world.network.nodes.values():
            for record in node.instances.owned:
                found.setdefault(record.model.name, []).append((node.id[:6], record.epoch, record.term, record.state))
        return found

    def check(self) -> None:
        """Everything."""
        for component in self._components():
            for name in self.world.models:
                self._check_instance(name, component)
        for node in self.world.network.nodes.values():
            self.world.check_memory(node.host)
            if len(node.membership.members) >= len(self.world.ids):
                self._wrong(f"{node.id[:6]} knows {len(node.membership.members)} members")

    def _components(self) -> list[set[str]]:
        network, left = self.world.network, list(self.world.network.nodes)
        found: list[set[str]] = []
        while left:
            todo, seen = [left.pop()], set[str]()
            while todo:
                node = todo.pop()
                seen.add(node)
                near = [other for other in left if network.reach(node, other)]
                left = [other for other in left if other not in near]
                todo += near
            found.append(seen)
        return found

    def _check_instance(self, name: str, component: set[str]) -> None:
        network = self.world.network
        owners = [
            (node, record)
            for node in sorted(component)
            for record in network.nodes[node].instances.owned
            if record.model.name == name
        ]
        stages = [
            (node, job, process)
            for node in sorted(component)
            for job, process in network.nodes[node].host.processes
            if job.model_path == name
        ]
        where = f"{name} among {len(component)}"
        if len(owners) > 1:
            told = [(node[:6], r.epoch, r.term, r.state) for node, r in owners]
            self._wrong(f"{where}: owned by {told}")
            return
        if not owners:
            if component & self.world.keeps(name):
                self._wrong(f"{where}: nobody owns it")
            if stages:
                self._wrong(f"{where}: stages without an owner")
            return
        [(owner, record)] = owners
        self.highest_epoch = max(self.highest_epoch, record.epoch)
        if record.state is not InstanceState.READY:
            self._check_lacking(where, component, record)
            if stages:
                self._wrong(f"{where}: {len(stages)} stray stages while it is {record.state}")
            return
        wanted = sorted((s.node, record.epoch, s.start, s.end) for s in record.stages)
        held = sorted((node, job.epoch, job.start, job.end) for node, job, process in stages if process.alive)
        if wanted != held:
            self._wrong(f"{where}: stages {_short(held)} instead of {_short(wanted)}")
        broken = [node[:6] for node, job, process in stages if process.over or job.owner != owner]
        if broken:
            self._wrong(f"{where}: ready in epoch {record.epoch}, but the stages on {broken} are over or another's")

    def _check_lacking(self, where: str, component: set[str], record: InstanceRecord) -> None:
        used: dict[str, int] = {}
        for node in component:
            for other in self.world.network.nodes[node].instances.owned:
                for stage in other.stages if other.id != record.id else ():
                    used[stage.node] = used.get(stage.node, 0) + stage.bytes
        capacities = [
            Capacity(n, "cpu", max(0, self.world.devices[n].memory_limit - used.get(n, 0)), n)
            for n in sorted(component)
        ]
        if not any(record.model.name in self.world.network.nodes[node].models for node in component):
            return  # none of them holds the file
        cut = frozenset(pair for pair in self.world.network.cuts if pair <= component)
        try:
            plan_connected(self.world.costs(record.model.name), launcher.promises(None, 8192), capacities, cut=cut)
        except DoesNotFit:
            if record.state is not InstanceState.WAITING:
                self._wrong(f"{where}: it is {record.state} ({record.reason}) where memory is lacking")
            return
        self._wrong(f"{where}: it is {record.state} ({record.reason}) though there is room")


def _short(stages: Iterable[tuple[str, int, int, int]]) -> list[tuple[str, int, int, int]]:
    return [(node[:6], epoch, first, end) for node, epoch, first, end in stages]
