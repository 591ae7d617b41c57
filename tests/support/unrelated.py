"""Two models in one swarm: what befalls the nodes of one should not be felt by those who talk to the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from support.fault_cases import talk
from support.fault_lab import FaultLab, Machine
from support.stream_load import Load, Outcome
from support.swarm import Node
from support.tiny_gguf import TinyModel, write_tiny_gguf

# `home` holds the first model and has room for nothing else. Two of the last three can hold the second model, whose
# owner holds nothing.
MEMORY = {"home": "190MB", "owner": "1MB", "first": "34MB", "second": "32MB", "third": "30MB"}
OTHER = TinyModel(n_layers=12, hidden_size=256, ffn_size=512, n_heads=8, n_kv_heads=4)
TOKENS = 60


def disturbances(root: Path, model: Path) -> Iterator[tuple[str, list[Outcome]]]:
    """(what befell a node of the other model, what eight clients of this one got meanwhile), one after the other."""
    root.mkdir(parents=True, exist_ok=True)
    other = write_tiny_gguf(root / "other.gguf", OTHER)
    machines = [Machine(name, memory, model if name == "home" else other) for name, memory in MEMORY.items()]
    with FaultLab(root / "swarm", machines, split=False) as lab:
        home, owner = lab.nodes["home"], lab.nodes["owner"]
        lab.serve("home", model)
        home.until_ready(stages=1)
        lab.serve("owner", other)
        _carriers(lab)
        yield "nothing", _ask(home, nullcontext())
        yield "the other model's owner is killed", _ask(home, _killed(lab, owner))
        carrier = _carriers(lab)[0]
        yield "a node of the other model is paused", _ask(home, lab.paused(carrier))
        lab.revive()
        home.until_members(len(lab.nodes))
        carrier = _carriers(lab)[0]
        yield "a node of the other model is killed", _ask(home, _killed(lab, carrier))


def _ask(home: Node, strike: AbstractContextManager[None]) -> list[Outcome]:
    """Eight clients of the first model, at its node; the strike comes when all have tokens, and lasts to the end."""
    with Load([home], talk(TOKENS)) as load:
        load.until_talking(4)
        with strike:
            return load.finish()


@contextmanager
def _killed(lab: FaultLab, node: Node) -> Iterator[None]:
    lab.kill(node)
    yield


def _carriers(lab: FaultLab) -> list[Node]:
    """Who holds stages of the other model, once it is ready."""

    def other(state: dict[str, Any]) -> list[dict[str, Any]]:
        return [i for i in state["instances"] if i["state"] == "ready" and len(i["stages"]) > 1]

    [instance] = other(lab.nodes["home"].until(other))
    return [lab.by_id(stage["node"]) for stage in instance["stages"]]
