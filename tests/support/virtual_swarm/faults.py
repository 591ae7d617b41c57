"""What befalls a virtual swarm: kills, partitions, lost messages and more, all by the seed's chance."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

from support.virtual_swarm.world import World

FAULTS = (
    *("crash", "crash", "crash", "power", "freeze", "freeze", "part", "part", "cut", "cut", "reset", "loss", "slow"),
    *("sick", "full", "stage", "stage", "leave", "flap"),
)


class Faults:
    """Does harm to a swarm, and in the end no more. `count` is by kind, `events` in words with the virtual time."""

    def __init__(self, world: World, rng: random.Random) -> None:
        self.world, self.rng = world, rng
        self.count: Counter[str] = Counter()
        self.events: list[str] = []

    def _note(self, what: str, *who: str) -> None:
        self.count[what] += 1
        self.events.append(f"{self.world.loop.time() - 1000:.2f} {what} {' '.join(one[:6] for one in who)}")

    def _victim(self) -> str | None:
        """A node that is up; owners, drivers and holders of stages are hit most."""
        nodes = self.world.network.nodes
        if len(nodes) < 2:
            return None
        busy = [n.id for n in nodes.values() if n.instances.owned or n.host.jobs]
        drivers = [n.id for n in nodes.values() if any(job.start == 0 for job in n.host.jobs)]
        groups = [group for group in (busy, busy, drivers, list(nodes)) if group]
        return self.rng.choice(self.rng.choice(groups))

    def strike(self, kind: str) -> None:
        world, rng = self.world, self.rng
        victim = self._victim()
        if victim is None:
            return
        self._note(kind, victim)
        match kind:
            case "crash" | "power":
                world.end_node(victim, silently=kind == "power")
                if rng.random() < 0.7:
                    self._later(0.3 if kind == "crash" else 4.0, 15, lambda: world.start_node(victim))
            case "flap":
                self._flap(victim, rng.randint(2, 5))
            case "freeze":
                world.freeze(victim)
                self._later(0.2, 8, lambda: world.thaw(victim))
            case "part":
                world.part(self._groups(victim))
                self._later(0.5, 20, lambda: world.part({}))
            case "cut":
                others = [n.id for n in world.network.nodes.values() if n.id != victim]
                busy = [n for n in others if world.network.nodes[n].host.jobs or world.network.nodes[n].instances.owned]
                world.cut(victim, rng.choice(busy if busy and rng.random() < 0.7 else others))
                if rng.random() < 0.6:
                    self._later(0.5, 15, world.mend)
            case "reset":
                for link in list(world.network.nodes[victim].links.values())[:20]:
                    world.network.reset(link)
            case "loss":
                world.network.loss = rng.uniform(0.001, 0.1)
                self._later(1, 10, lambda: setattr(world.network, "loss", 0.0))
            case "slow":
                world.network.slow[victim] = rng.uniform(0.1, 3.0)
                self._later(1, 15, world.network.slow.clear)
            case "sick":
                world.sick[victim] = rng.choice((0.5, 1.0))
            case "full":
                world.full[victim] = rng.choice((0.5, 1.0))
            case "stage":
                for _, process in world.network.nodes[victim].host.processes[:1]:
                    process.end(-11)
            case "leave":
                node = world.network.nodes[victim]
                if not node.leaving:
                    node.spawn(node.leave())

    def _flap(self, victim: str, times: int) -> None:
        self.world.end_node(victim)
        self._later(0.2, 2, lambda: self.world.start_node(victim))
        if times > 1:
            self._later(3, 6, lambda: self._flap(victim, times - 1))

    def _later(self, least: float, most: float, work: Callable[[], object]) -> None:
        self.world.loop.call_later(self.rng.uniform(least, most), work)

    def _groups(self, victim: str) -> dict[str, int]:
        ids = list(self.world.ids)
        self.rng.shuffle(ids)
        count = self.rng.choice((2, 2, 3))
        sizes = self.rng.choice((0.5, 0.2, 0.05))
        groups = {node: int(self.rng.random() < sizes) * self.rng.randint(1, count - 1) for node in ids}
        groups[victim] = 1
        return groups

    def settle(self) -> None:
        """The faults end. Most swarms become whole, some stay as they are."""
        world, rng = self.world, self.rng
        world.network.loss = 0.0
        world.network.slow.clear()
        world.sick.clear()
        world.full.clear()
        for node in list(world.network.nodes):
            world.thaw(node)
        last = rng.choice(("whole", "whole", "parted", "cut"))
        self._note(f"settles {last}")
        self._ends_parted = last == "parted"
        groups = self._groups(rng.choice(world.ids)) if last == "parted" else {}
        if last == "cut":
            world.part({})
            busy = [n.id for n in world.network.nodes.values() if n.instances.owned or n.host.jobs]
            for _ in range(rng.randint(1, 6)):
                one, other = rng.sample(world.ids, 2)
                if busy and rng.random() < 0.7:
                    one = rng.choice(busy)
                if one != other:
                    world.cut(one, other)
        else:
            world.mend()
            world.part(groups)
        # What was still to come of the faults is over, and stays so.
        world.part_for_good(groups)
        for node in world.ids:
            if rng.random() < 0.8:
                world.start_node(node)
