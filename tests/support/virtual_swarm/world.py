"""A virtual swarm as a whole: its machines, its models, and what is done to it."""

from __future__ import annotations

import hashlib
import random
from typing import Any

from support.virtual_swarm.board import Board
from support.virtual_swarm.clock import VirtualLoop
from support.virtual_swarm.network import Network, VirtualLink
from support.virtual_swarm.node import VirtualNode
from support.virtual_swarm.requests import STARVED_SECONDS, Client, DriverLinks, Front, Items
from support.virtual_swarm.stages import Processes, VirtualHost

from swarmd.discovery.records import DeviceRecord, ModelSummary
from swarmd.node.cluster.order_limits import SLACK
from swarmd.node.models.manifest import ModelManifest, ModelPart
from swarmd.partition.costs import ModelCosts
from swarmd.transport.link import LinkClosed

MB = 1_000_000
LAYERS = 6


class World:
    """The swarm. Nodes are named by their ids, models by `model-N`."""

    def __init__(self, loop: VirtualLoop, rng: random.Random, n_nodes: int, n_models: int) -> None:
        self.loop, self.rng = loop, rng
        self.network = Network(loop, rng)
        self.processes = Processes()
        self.network.on_paths_changed.append(self.processes.on_paths_changed)
        self.errors: list[BaseException] = []
        self.settled = False
        self.sick: dict[str, float] = {}
        self.full: dict[str, float] = {}
        self.open_streams: dict[tuple[VirtualNode, str], dict[Items, None]] = {}
        self.busy_entries: dict[str, int] = {}
        self.clients: list[Client] = []
        self.ids = [hashlib.sha256(rng.randbytes(8)).hexdigest() for _ in range(n_nodes)]
        self.board = Board(self)
        self._all: list[VirtualNode] = []
        self.devices = {node: _device(rng) for node in self.ids}
        self.models = [f"model-{index}" for index in range(n_models)]
        self._costs = {name: _costs(rng) for name in self.models}
        self._summaries = {
            name: ModelSummary(name, hashlib.sha256(name.encode()).hexdigest(), 60 * MB, 8192, "llama")
            for name in self.models
        }
        self._split = {node for node in self.ids if rng.random() < 0.2}
        self._disks: dict[str, set[str]] = {node: set() for node in self.ids}
        self._keeps = dict.fromkeys(self.ids, "")
        for name in self.models:
            for node in rng.sample(self.ids, min(n_nodes, 3)):
                self._disks[node].add(name)
                self._keeps[node] = name

    # Models

    def summary(self, name: str) -> ModelSummary:
        return self._summaries[name]

    def costs(self, name: str) -> ModelCosts:
        return self._costs[name]

    def manifest(self, name: str) -> ModelManifest:
        return ModelManifest(self._summaries[name].sha256, name, (ModelPart(name, 60 * MB, 1),), 1 << 20, b"")

    def split(self, node: str) -> bool:
        return node in self._split

    def keeps(self, name: str) -> set[str]:
        """The nodes that were started to serve a model."""
        return {node for node, keep in self._keeps.items() if keep == name}

    # What nodes need of the world

    def drivers(self, node: VirtualNode) -> DriverLinks:
        return DriverLinks(node)

    async def front(self, record: Any) -> Front:
        return Front()

    def curious(self, node: str) -> bool:
        """Whether a client waits at this node."""
        return bool(self.busy_entries.get(node))

    def hang_up(self, entry: VirtualNode, gone: str) -> None:
        """An entry node closes its links with the drivers of a node that is gone."""
        for items in self.open_streams.get((entry, gone), ()):
            items.put(LinkClosed("its node is gone"))

    def check_memory(self, host: VirtualHost) -> None:
        """No device ever holds more than it may, with what orders are allowed beyond."""
        held = sum(
            self._costs[job.model_path].stage_bytes(job.start, job.end, job.kv_tokens)
            for job, process in host.processes
            if process.alive
        )
        limit = self.devices[host.node.id].memory_limit * SLACK
        if held > limit:
            jobs = [(job.instance, job.epoch, job.start, job.end) for job, process in host.processes if process.alive]
            raise AssertionError(f"{held} bytes on a device of {limit}: {jobs}")

    def serves(self, entry: VirtualNode, model: str) -> bool:
        """Whether a model has been ready for long where this node can reach it."""
        for node in self.network.nodes.values():
            for owned in node.instances._ledger._owned.values():
                record, now = owned.record, self.loop.time()
                if record.model.name == model and record.stages and now - owned._ready_at > STARVED_SECONDS:
                    return self.network.reach(entry.id, node.id) and self.network.reach(entry.id, record.stages[0].node)
        return False

    def forget(self) -> None:
        """Nobody looks at it any more: what its nodes know of each other is freed without a search for it."""
        for node in self._all:
            node.end()
            node.links.clear()
            node.membership._members.clear()
            node.membership._gone.clear()
        self._all.clear()
        self.network.nodes.clear()

    # What is done to it

    def begin(self) -> None:
        """All nodes are up, know each other and have links."""
        for node_id in self.ids:
            self._add(node_id)
        nodes = list(self.network.nodes.values())
        self.board.seed(nodes)
        for index, node in enumerate(nodes):
            for other in nodes[index + 1 :]:
                link = VirtualLink((node.id, other.id), {node.id, other.id})
                node.greet(other, link, other.record)
                other.greet(node, link, node.record)
        for node in nodes:
            node.start()

    def _add(self, node_id: str) -> VirtualNode:
        self.board.forget(node_id)
        node = VirtualNode(self, node_id, self._disks[node_id], self._keeps[node_id])
        self.network.nodes[node_id] = node
        self._all.append(node)
        return node

    def start_node(self, node_id: str) -> None:
        """A node that is down comes up, with what is on its disk."""
        if node_id in self.network.nodes:
            return
        node = self._add(node_id)
        for other in self.network.nodes:
            if other != node_id:
                # It is announced, so nobody waits for the end of a back-off.
                self.network.unlinked.pop(frozenset((node_id, other)), None)
                self.network.lost(node_id, other)
        node.start()

    def end_node(self, node_id: str, *, gently: bool = False, silently: bool = False) -> None:
        """A daemon ends: killed, `gently` by itself, or `silently` as when its machine loses its power."""
        node = self.network.nodes.pop(node_id, None)
        if node is None:
            return
        if gently:
            node.frozen = False
            node.refresh()
            for peer in list(node.links):
                there = self.network.nodes.get(peer)
                if there is not None and self.network.reach(node_id, peer):
                    there.receive(node.record)
        node.end()
        for (entry, driver), streams in self.open_streams.items():
            if driver == node_id and not silently:
                for items in streams:
                    items.put(LinkClosed("the driver's process ended"))
            del entry
        for peer, link in list(node.links.items()):
            link.open.discard(node_id)
            there = self.network.nodes.get(peer)
            if there is None:
                continue
            if silently or not self.network.reach(node_id, peer):
                there.touch(node_id)
            else:
                self.network._hear_of_close(link, peer)

    def freeze(self, node_id: str) -> None:
        """A node stands still."""
        node = self.network.nodes.get(node_id)
        if node is not None and not node.frozen:
            node.frozen = True
            self._moved(node_id)

    def thaw(self, node_id: str) -> None:
        """It goes on."""
        node = self.network.nodes.get(node_id)
        if node is not None and node.frozen:
            node.wake()
            self._moved(node_id)

    def part(self, groups: dict[str, int]) -> None:
        """The network falls into groups, or (`groups` empty) is whole again."""
        if self.settled:
            return
        before, self.network.group = self.network.group, groups
        kinds: dict[tuple[int, int], list[str]] = {}
        for node in self.network.nodes:
            kinds.setdefault((before.get(node, 0), groups.get(node, 0)), []).append(node)
        for (was, now), nodes in kinds.items():
            moved = [other for (w, n), others in kinds.items() if (w == was) != (n == now) for other in others]
            for node in nodes:
                self.network.nodes[node].touch(*moved)
        self.network.changed()

    def part_for_good(self, groups: dict[str, int]) -> None:
        """Nothing that was still planned changes the paths any more."""
        self.settled = True
        self.network.group = groups

    def cut(self, one: str, other: str) -> None:
        """Two nodes cannot reach each other any more."""
        self.network.cuts[frozenset((one, other))] = None
        self._moved_pair(one, other)

    def mend(self) -> None:
        """All pairs that were cut can."""
        if self.settled:
            return
        cuts, self.network.cuts = self.network.cuts, {}
        for one, other in map(sorted, cuts):
            self._moved_pair(one, other, tell=False)
        self.network.changed()

    def _moved_pair(self, one: str, other: str, *, tell: bool = True) -> None:
        for node, peer in ((one, other), (other, one)):
            if node in self.network.nodes:
                self.network.nodes[node].touch(peer)
        if tell:
            self.network.changed()

    def _moved(self, moved: str) -> None:
        for node_id, node in self.network.nodes.items():
            node.touch(*(self.network.nodes if node_id == moved else (moved,)))
        self.network.changed()

    def ask(self, client: Client) -> None:
        """A request enters, if its node is up."""
        node = self.network.nodes.get(client.entry)
        if node is None or node.frozen:
            return
        self.clients.append(client)
        self.busy_entries[client.entry] = self.busy_entries.get(client.entry, 0) + 1
        task = node.spawn(client.run(node))

        def over(_: object) -> None:
            self.busy_entries[client.entry] -= 1
            if task.cancelled():
                client.outcome = "its node went"
            client.over.set()

        task.add_done_callback(over)


def _device(rng: random.Random) -> DeviceRecord:
    size = rng.choice((18, 22, 26, 30, 40)) * MB
    return DeviceRecord("cpu", "cpu", "a processor", size, size, size, rng.choice((0.0, 1e10, 3e10)), 1e9)


def _costs(rng: random.Random) -> ModelCosts:
    layer = rng.randint(6, 11) * MB
    return ModelCosts((layer,) * LAYERS, 2 * MB, 3 * MB, 100, MB)
