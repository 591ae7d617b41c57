"""Seeded schedules: what befalls a virtual swarm, and what must be true when all is quiet again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from support.virtual_swarm.clock import VirtualLoop, virtual
from support.virtual_swarm.requests import client
from support.virtual_swarm.world import World

from swarmd.discovery.records import InstanceRecord, InstanceState
from swarmd.node.cluster import admission, instances, launcher
from swarmd.node.serving import gateway
from swarmd.partition.connected import plan_connected
from swarmd.partition.plan import Capacity, DoesNotFit

FAULT_SECONDS = 30.0
QUIET_SECONDS = 75.0
WATCHED_SECONDS = 10.0
PATIENCE_SECONDS = 120.0
FAULTS = (
    *("crash", "crash", "crash", "power", "freeze", "freeze", "part", "part", "cut", "cut", "reset", "loss", "slow"),
    *("sick", "full", "stage", "stage", "leave", "flap"),
)


@dataclass
class Result:
    """What one schedule came to."""

    seed: int
    wrong: list[str] = field(default_factory=list)
    outcomes: dict[str, int] = field(default_factory=dict)
    epochs: int = 0
    seconds: float = 0.0
    events: list[str] = field(default_factory=list)


def run(seed: int, n_nodes: int) -> Result:
    """Run one schedule."""
    began = time.perf_counter()
    loop, rng = VirtualLoop(), random.Random(seed)
    result = Result(seed)
    loop.set_exception_handler(lambda _, what: result.wrong.append(f"{what['message']}: {what.get('exception')!r}"))
    logging.disable(logging.CRITICAL)
    asyncio.set_event_loop(loop)
    try:
        with virtual(loop, seed, instances, launcher, gateway):
            loop.run_until_complete(_Schedule(loop, rng, n_nodes, result).run())
    except Exception as error:
        result.wrong.append(f"{type(error).__name__}: {error}")
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        with contextlib.suppress(Exception):
            loop.run_until_complete(asyncio.sleep(0.1))
        loop.close()
        asyncio.set_event_loop(None)
        logging.disable(logging.NOTSET)
    result.seconds = time.perf_counter() - began
    return result


class _Schedule:
    def __init__(self, loop: VirtualLoop, rng: random.Random, n_nodes: int, result: Result) -> None:
        self.loop, self.rng, self.result = loop, rng, result
        self.world = World(loop, rng, n_nodes, rng.randint(1, 3))

    async def run(self) -> None:
        world, rng = self.world, self.rng
        launcher._read_model = lambda path, name, sha256, size: (world.summary(name), world.costs(name))  # type: ignore[assignment]
        admission._costs = lambda path: world.costs(path.name)  # type: ignore[assignment]
        world.begin()
        await asyncio.sleep(rng.uniform(3.0, 15.0))
        start = self.loop.time()
        for _ in range(rng.randint(10, 40)):
            at = start + rng.uniform(0, FAULT_SECONDS)
            one = client(rng, rng.choice(world.ids), rng.choice(world.models), PATIENCE_SECONDS)
            self.loop.call_at(at, world.ask, one)
        times = sorted(rng.uniform(0, FAULT_SECONDS) for _ in range(rng.randint(3, 12)))
        for at in times:
            await asyncio.sleep(max(0.0, start + at - self.loop.time()))
            self._fault(rng.choice(FAULTS))
        await asyncio.sleep(max(0.0, start + FAULT_SECONDS - self.loop.time()))
        self._settle()
        await asyncio.sleep(QUIET_SECONDS)
        before = self._claims()
        await asyncio.sleep(WATCHED_SECONDS)
        if before != self._claims():
            self._wrong(f"still no rest: {before} became {self._claims()}")
        self._check()
        await asyncio.sleep(max(0.0, start + FAULT_SECONDS + PATIENCE_SECONDS + 1 - self.loop.time()))
        self._check_clients()
        for error in world.errors:
            self._wrong(f"{type(error).__name__}: {error}")

    def _wrong(self, what: str) -> None:
        self.result.wrong.append(what)

    def _note(self, what: str, *who: str) -> None:
        self.result.events.append(f"{self.loop.time() - 1000:.2f} {what} {' '.join(one[:6] for one in who)}")

    # Faults

    def _victim(self) -> str | None:
        """A node that is up; owners, drivers and holders of stages are hit most."""
        nodes = self.world.network.nodes
        if len(nodes) < 2:
            return None
        busy = [n.id for n in nodes.values() if n.instances.owned or n.host.jobs]
        drivers = [n.id for n in nodes.values() if any(job.start == 0 for job in n.host.jobs)]
        groups = [group for group in (busy, busy, drivers, list(nodes)) if group]
        return self.rng.choice(self.rng.choice(groups))

    def _fault(self, kind: str) -> None:
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

    def _later(self, least: float, most: float, work: object) -> None:
        self.loop.call_later(self.rng.uniform(least, most), work)  # type: ignore[arg-type]

    def _groups(self, victim: str) -> dict[str, int]:
        ids = list(self.world.ids)
        self.rng.shuffle(ids)
        count = self.rng.choice((2, 2, 3))
        sizes = self.rng.choice((0.5, 0.2, 0.05))
        groups = {node: int(self.rng.random() < sizes) * self.rng.randint(1, count - 1) for node in ids}
        groups[victim] = 1
        return groups

    def _settle(self) -> None:
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

    # What must be true

    def _claims(self) -> dict[str, list[tuple[str, int, int, str]]]:
        found: dict[str, list[tuple[str, int, int, str]]] = {}
        for node in self.world.network.nodes.values():
            for record in node.instances.owned:
                found.setdefault(record.model.name, []).append((node.id[:6], record.epoch, record.term, record.state))
        return found

    def _check(self) -> None:
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
        self.result.epochs = max(self.result.epochs, record.epoch)
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
        cut = frozenset(pair for pair in self.world.network.cuts if pair <= component)
        try:
            plan_connected(self.world.costs(record.model.name), launcher.promises(None, 8192), capacities, cut=cut)
        except DoesNotFit:
            if record.state is not InstanceState.WAITING:
                self._wrong(f"{where}: it is {record.state} ({record.reason}) where memory is lacking")
            return
        self._wrong(f"{where}: it is {record.state} ({record.reason}) though there is room")

    def _check_clients(self) -> None:
        for one in self.world.clients:
            outcome = one.outcome or "hung"
            self.result.outcomes[outcome] = self.result.outcomes.get(outcome, 0) + 1
            if outcome == "hung":
                self._wrong(f"a request at {one.entry[:6]} for {one.model} hung at {one.started - 1000:.1f}")


def _short(stages: Iterable[tuple[str, int, int, int]]) -> list[tuple[str, int, int, int]]:
    return [(node[:6], epoch, first, end) for node, epoch, first, end in stages]


def main(arguments: list[str]) -> int:
    import argparse

    parser = argparse.ArgumentParser(prog="make simulate ARGS=...", description="Seeded faults in virtual swarms.")
    parser.add_argument("--schedules", type=int, default=100)
    parser.add_argument("--nodes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1, help="of the first schedule; the others follow")
    parser.add_argument("--events", action="store_true", help="tell what befell the swarms where something was wrong")
    options = parser.parse_args(arguments)
    outcomes: dict[str, int] = {}
    wrong, seconds, epochs = 0, 0.0, 0
    for seed in range(options.seed, options.seed + options.schedules):
        result = run(seed, options.nodes)
        seconds += result.seconds
        epochs = max(epochs, result.epochs)
        for outcome, count in result.outcomes.items():
            outcomes[outcome] = outcomes.get(outcome, 0) + count
        if result.wrong:
            wrong += 1
            print(
                f"seed {seed}:", *result.wrong[:8], *(result.events if options.events else ()), sep="\n  ", flush=True
            )
    told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items(), key=lambda one: -one[1]))
    print(
        f"{options.schedules} schedules of {options.nodes} nodes from seed {options.seed}: {wrong} with something wrong"
        f"; requests: {told}; highest epoch {epochs}; {seconds / options.schedules:.2f} s each"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
