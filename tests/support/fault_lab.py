"""A fault lab: real daemons, each on a machine of its own as far as one can pretend that, and what may befall them.

    with FaultLab(root, MACHINES) as lab:
        lab.serve("a", model)
        lab.until_whole()
        lab.kill(lab.carrier(0))
        with lab.unplugged(lab.owner()):
            ...

As root on Linux every machine is a network namespace on a bridge. Elsewhere all are on loopback: what befalls processes
works there too, and `lab.network` is None, so that tests of the network's faults can skip, with `lab.why_no_network`.
Leaving undoes everything: rules, namespaces, mounts, processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil
from support.host_faults import exhaust_memory, family, full_disk, kill_all, small_disk, stages_of, stopped
from support.identities import give_identities
from support.network_faults import FaultyLan, why_no_network_faults
from support.swarm import Node, give_model, join

# Activations travel as f32, so that answers are equal to the last bit whatever the split.
_OPTIONS = ("--threads", "1", "--wire-dtype", "f32", "--model", "none")


@dataclass(frozen=True)
class Machine:
    """A machine to be: `memory` as `--memory` takes it; `model` is a file that it has from the start; `disk` the size
    of the file system that its data is on, like "64m" (empty: this machine's own; else it needs root)."""

    name: str
    memory: str
    model: Path | None = None
    disk: str = ""


class FaultLab:
    """Machines of one swarm; the first one founds it. All have started when the context is entered.

    `ids` are the machines' names in the order of their node ids, by default their own order; ids come from `seed`.
    `split`: models are spread over all machines, also where fewer suffice.
    """

    def __init__(
        self,
        root: Path,
        machines: Sequence[Machine],
        *,
        ids: Sequence[str] = (),
        seed: int = 0,
        context: int = 1024,
        split: bool = True,
        options: Sequence[str] = (),
    ) -> None:
        self.why_no_network = why_no_network_faults()
        self.network: FaultyLan | None = None if self.why_no_network else FaultyLan(len(machines))
        self.nodes: dict[str, Node] = {}
        self.machines = {machine.name: machine for machine in machines}
        self.retired: list[Node] = []
        self._root = root
        self._options = (*_OPTIONS, *(["--split"] if split else []), "--context", str(context), *options)
        self._ids = tuple(ids or self.machines)
        self._seed = seed
        self._token = ""
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            if self.network is not None:
                stack.enter_context(self.network)
            self._root.mkdir(parents=True, exist_ok=True)
            for machine in self.machines.values():
                if machine.disk:
                    stack.enter_context(small_disk(self._root / machine.name, machine.disk))
                if machine.model is not None:
                    give_model(self._root / machine.name, machine.model)
            give_identities([self._root / name for name in self._ids], self._seed)
            self._stack = stack
            self.revive()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            kill_all([process for node in self.running() for process in family(node.process.pid)])
        finally:  # also when a signal ends this
            self._stack.close()

    # Who is there.

    def revive(self, *names: str) -> list[Node]:
        """Start those of the machines (all, if none is named) that do not run, with the identity that they had."""
        dead = [name for name in names or self.machines if name not in self.nodes or not self.nodes[name].running]
        return [self._start(name) for name in dead]

    def running(self) -> list[Node]:
        """The nodes whose daemon lives."""
        return [node for node in self.nodes.values() if node.running]

    def others(self, *struck: Node) -> list[Node]:
        """Those that run and were not struck."""
        return [node for node in self.running() if node not in struck]

    def serve(self, name: str, model: str | Path) -> None:
        """Have a node start the instance, which it will own."""
        self.nodes[name].until_members(len(self.nodes))
        self.nodes[name].serve(model)

    def until_whole(self, stages: int, *, seconds: float = 90) -> None:
        """Wait until every node that runs sees all that run, and the instance ready in so many stages."""
        running = self.running()
        ids = {node.id for node in running}

        def whole(state: dict[str, Any]) -> bool:
            alive = {seen["id"] for seen in state["nodes"] if seen["state"] == "alive"}
            carried = [len(i["stages"]) for i in state["instances"] if i["state"] == "ready"]
            return alive == ids and carried == [stages]

        for node in running:
            node.until(whole, seconds)

    def instance(self, seen_by: Node | None = None) -> dict[str, Any]:
        """The one instance, as a node sees it."""
        [instance] = (seen_by or self.running()[0]).get("/api/swarm")["instances"]
        return instance

    def carriers(self) -> list[Node]:
        """Who carries the stages, first to last."""
        return [self.by_id(stage["node"]) for stage in self.instance()["stages"]]

    def owner(self) -> Node:
        """Who owns the instance."""
        return self.by_id(self.instance()["owner"])

    def by_id(self, node_id: str) -> Node:
        """The node with this id."""
        return next(node for node in self.nodes.values() if node.id == node_id)

    # What befalls processes.

    def kill(self, node: Node) -> None:
        """SIGKILL for the daemon and its stage processes at once: the machine crashes."""
        kill_all(family(node.process.pid))
        node.process.wait(5)

    def stages(self, node: Node) -> list[psutil.Process]:
        """Its stage processes."""
        return stages_of(node.process.pid)

    def kill_daemon(self, node: Node) -> list[psutil.Process]:
        """SIGKILL for the daemon only; returns what it leaves behind, which is to end by itself."""
        left = self.stages(node)
        node.kill()
        return left

    def kill_stages(self, node: Node) -> None:
        """SIGKILL for its stage processes only."""
        kill_all(self.stages(node))

    def exhaust_memory(self, node: Node) -> None:
        """Its stage processes get no more memory from now on."""
        for stage in self.stages(node):
            exhaust_memory(stage)

    def paused(self, node: Node) -> AbstractContextManager[None]:
        """Daemon and stage processes stand still: a machine that hangs, or a laptop whose lid was closed."""
        return stopped(family(node.process.pid))

    def paused_daemon(self, node: Node) -> AbstractContextManager[None]:
        """Only the daemon stands still; its stages compute."""
        return stopped(family(node.process.pid)[:1])

    def paused_stages(self, node: Node) -> AbstractContextManager[None]:
        """Only its stage processes stand still; the daemon talks."""
        return stopped(self.stages(node))

    def full_disk(self, node: Node) -> AbstractContextManager[None]:
        """Not a byte more fits onto its disk; it must have one of its own."""
        assert self.machines[node.name].disk, f"{node.name} has no disk of its own to fill"
        return full_disk(node.data_dir)

    # What befalls the network.

    def unplugged(self, node: Node) -> AbstractContextManager[None]:
        """Its cable is out: it reaches nobody, and nobody is told."""
        return self._lan.unplugged(self._index(node.name))

    def cut_off(self, node: Node) -> AbstractContextManager[None]:
        """Everything to and from it is lost on the way, while its link is up."""
        return self.partitioned([node], [other for other in self.nodes.values() if other is not node])

    def partitioned(self, *groups: Sequence[Node]) -> AbstractContextManager[None]:
        """Nothing passes between the groups."""
        return self._lan.divided(*([self._index(node.name) for node in group] for group in groups))

    def link_cut(self, one: Node, other: Node) -> AbstractContextManager[None]:
        """These two do not reach each other; everybody else reaches both."""
        return self.partitioned([one], [other])

    def half_open(self, sender: Node, receiver: Node) -> AbstractContextManager[None]:
        """What `sender` says does not reach `receiver`, while what that says arrives."""
        return self._lan.dropping([(self._index(sender.name), self._index(receiver.name))])

    def reset(self, one: Node, other: Node) -> None:
        """Every connection between two nodes is reset."""
        self._lan.reset(self._index(one.name), self._index(other.name))

    def slowed(self, node: Node, mbps: float) -> AbstractContextManager[None]:
        """Its line carries no more than so many Mb/s each way."""
        return self._lan.slowed(self._index(node.name), mbps)

    def delayed(self, node: Node, delay_ms: float) -> AbstractContextManager[None]:
        """What it sends and what it gets arrives so much later."""
        return self._lan.delayed(self._index(node.name), delay_ms)

    def flap(self, name: str, times: int) -> None:
        """A node crashes and comes back, again and again; it runs at the end."""
        for _ in range(times):
            self.kill(self.nodes[name])
            [node] = self.revive(name)
            assert node.url

    @property
    def _lan(self) -> FaultyLan:
        assert self.network is not None, self.why_no_network
        return self.network

    def _start(self, name: str) -> Node:
        machine, data_dir = self.machines[name], self._root / name
        namespace = self.network.names[self._index(name)] if self.network is not None else None
        options = ("--memory", machine.memory, *self._options)
        if name in self.nodes:
            self.retired.append(self.nodes[name])
        if not self._token:
            node = self._stack.enter_context(Node(data_dir, *options, namespace=namespace))
            self._token = node.token()
        else:
            node = self._stack.enter_context(join(self._token, data_dir, *options, namespace=namespace))
        self.nodes[name] = node
        return node

    def _index(self, name: str) -> int:
        return list(self.machines).index(name)


def orphans(left: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Those of some processes that still run."""
    alive = []
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
    return alive
