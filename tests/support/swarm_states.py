"""States of a swarm as `GET /api/swarm` tells them, made up for tests of the web page."""

from __future__ import annotations

import copy

Json = dict[str, object]


def node_id(name: str) -> str:
    """A made-up but well-formed node id: 64 hexadecimal digits."""
    return name.encode().hex().ljust(64, "0")


def _node(name: str, limit: int, *, self: bool = False, state: str = "alive") -> Json:
    device = {
        "id": "cpu",
        "kind": "cpu",
        "name": "cpu",
        "memory_total": 8_000_000_000,
        "memory_free": 6_000_000_000,
        "memory_limit": limit,
        "memory_bandwidth": 19_400_000_000,
        "compute": 147_000_000_000,
    }
    return {
        "id": node_id(name),
        "name": name,
        "state": state,
        "self": self,
        "addresses": [f"192.168.1.{10 + len(name)}:8643"],
        "version": "0.1.0",
        "devices": [device],
        "last_seen_s": 0.0 if state == "alive" else 4.0,
        "rtt_ms": None if self else 0.84,
    }


def _stage(name: str, start: int, end: int) -> Json:
    return {
        "node": node_id(name),
        "device": "cpu",
        "start": start,
        "end": end,
        "bytes": 3_400_000 * (end - start),
    }


def lone_node() -> Json:
    """One node and no model."""
    return {
        "self": node_id("attic"),
        "swarm": "6f1c0a52d4e98b37",
        "version": "0.1.0",
        "nodes": [_node("attic", 8_000_000_000, self=True)],
        "instances": [],
        "models": [{"name": "smollm2:135m", "size": 98_000_000, "local": True}],
    }


def two_stages() -> Json:
    """Three nodes; `attic` and `kitchen` hold the 30 layers of a ready instance, `laptop` is left out."""
    state = lone_node()
    state["nodes"] = [
        _node("attic", 600_000_000, self=True),
        _node("kitchen", 300_000_000),
        _node("laptop", 20_000_000),
    ]
    state["instances"] = [
        {
            "id": "i1",
            "model": "smollm2:135m",
            "state": "ready",
            "reason": "",
            "epoch": 1,
            "owner": node_id("attic"),
            "stages": [_stage("attic", 0, 20), _stage("kitchen", 20, 30)],
            "explanation": [
                "attic carries layers 0 to 19: it has the most usable memory",
                "kitchen carries layers 20 to 29",
                "laptop is left out: 20.0 MB is less than one layer and its workspace need",
            ],
            "progress": None,
            "load": {"running": 1, "waiting": 0, "kv_tokens_used": 512, "kv_tokens": 4096},
        }
    ]
    return state


def replanned_without_kitchen() -> Json:
    """`two_stages` after `kitchen` is gone: epoch 2, `attic` alone holds all layers."""
    state = copy.deepcopy(two_stages())
    state["nodes"] = [
        _node("attic", 600_000_000, self=True),
        _node("kitchen", 300_000_000, state="gone"),
        _node("laptop", 20_000_000),
    ]
    instances = state["instances"]
    assert isinstance(instances, list)
    instances[0] |= {"epoch": 2, "stages": [_stage("attic", 0, 30)], "explanation": ["kitchen is gone"]}
    return state
