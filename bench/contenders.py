"""Who is measured beside llama.cpp: swarms of pinned daemons, and `transformers` on one machine."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from harness import Node, join
from load import Server
from pinning import CpuQuota, on_cores, why_no_quota
from processes import Contender, Place, Processes, Unavailable, free_port
from relay import Network
from workloads import BenchModel

LOAD_SECONDS = 300.0
_MEMORY_BESIDE_WEIGHTS = 2 << 30


@contextmanager
def swarm(
    name: str,
    model: BenchModel,
    places: Sequence[Place],
    kv_tokens: int,
    extra: Sequence[str] = (),
    network: Network | None = None,
) -> Iterator[Contender]:
    """One daemon per place, with the model split over all of them; `extra` options go to each.

    There is room for `kv_tokens` in all sequences together, half of them in one. On a network each node is on a
    machine of its own.
    """
    # A node promises KV for two sequences of the longest length.
    context = -(-kv_tokens // 2)
    memory = 2 * model.path.stat().st_size + _MEMORY_BESIDE_WEIGHTS
    options = ["--no-mdns", "--model", "none", "--context", str(context), "--memory", str(memory), *extra]
    options += ["--split"] * (len(places) > 1)
    try:
        with _daemons(places, options, network) as nodes:
            instance = _serve(nodes, model)
            server = Server(nodes[0].url, "swarmd", instance["model"], model.ends, nodes[0].namespace)
            where = " + ".join(map(str, places))
            detail = f"{where}; layers {_layers(instance)}{''.join(f'; {word}' for word in extra)}"
            yield Contender(name, server, detail, [node.process.pid for node in nodes], places[0])
    except AssertionError as error:
        raise Unavailable(f"the swarm did not come up: {error}") from error


@contextmanager
def _daemons(places: Sequence[Place], options: Sequence[str], network: Network | None) -> Iterator[list[Node]]:
    """Nodes of one swarm, the first of which founded it, each held to its place."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="swarmd-bench-")))
        host = network.address(0) if network else "127.0.0.1"
        nodes: list[Node] = []
        for index, place in enumerate(places):
            quota = stack.enter_context(_quota(place.quota)) if place.quota else None
            namespace = network.namespaces[index] if network else None
            data_dir, own = folder / f"node{index}", [*options, "--threads", str(place.threads)]
            with on_cores(place.cores):
                if nodes:
                    peer = ["--peer", f"{host}:{nodes[0].link_port}"]
                    node = join(nodes[0].token(), data_dir, *own, *peer, namespace=namespace)
                else:
                    node = Node(data_dir, *own, namespace=namespace)
            nodes.append(stack.enter_context(node))
            if quota:
                quota.add(node.process.pid)
        yield nodes


def _serve(nodes: Sequence[Node], model: BenchModel) -> dict[str, Any]:
    """Have the first of some nodes that know of each other serve a model, one stage on each; the ready instance."""
    first = nodes[0]
    first.until_members(len(nodes))
    # Every node measures its machine when it starts: that is over before the model comes, and before the clock runs.
    first.until(lambda state: all(d["memory_bandwidth"] for n in state["nodes"] for d in n["devices"]))
    status, answer = first.post("/api/instances", {"model": str(model.path)}, LOAD_SECONDS)
    if status >= 400:
        raise Unavailable(answer["error"]["message"])
    return first.until_ready(len(nodes), LOAD_SECONDS)


@contextmanager
def transformers_server(name: str, model: BenchModel, place: Place) -> Iterator[Contender]:
    """`transformers` in fp32 on the weights that the file stands for; requests that come together are one batch."""
    if importlib.util.find_spec("transformers") is None:
        raise Unavailable("transformers is not installed: pip install 'swarmd[dev]' brings it")
    port = free_port()
    with Processes() as processes:
        script = Path(__file__).with_name("transformers_server.py")
        command = [sys.executable, str(script), str(model.path), "--port", str(port)]
        processes.start("transformers", [*command, "--threads", str(place.threads)], place.cores)
        server = Server(f"http://127.0.0.1:{port}", "transformers", model.name, model.ends)
        processes.wait_for(server)
        yield Contender(name, server, f"{place}; fp32", processes.pids, None)


@cache
def swarmd_has(option: str) -> bool:
    """Whether the daemon of this checkout knows a command-line option."""
    command = [sys.executable, "-m", "swarmd.node.cli.app", "--help"]
    return option in subprocess.run(command, capture_output=True, text=True, check=True).stdout


@contextmanager
def _quota(share: float) -> Iterator[CpuQuota]:
    if reason := why_no_quota():
        raise Unavailable(reason)
    with CpuQuota(share) as quota:
        yield quota


def _layers(instance: dict[str, Any]) -> str:
    return " | ".join(f"{stage['start']}-{stage['end'] - 1}" for stage in instance["stages"])
