"""Whose word counts for an instance, and who inherits it. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from swarmd.discovery.records import InstanceRecord


def winner(claims: Sequence[tuple[str, InstanceRecord]]) -> tuple[str, InstanceRecord]:
    """Of several (owner, record) claims to one instance the one that counts: highest epoch, then highest term, then
    lowest owner id. `claims` must not be empty.
    """
    return min(claims, key=lambda claim: rank(claim[1].epoch, claim[1].term, claim[0]))


def rank(epoch: int, term: int, owner: str) -> tuple[int, int, str]:
    """The lowest counts."""
    return -epoch, -term, owner


def successor(lost: InstanceRecord, alive: Sequence[str], holders: Sequence[str]) -> str | None:
    """Who takes over an instance whose owner is gone: of the nodes alive, the lowest id among its stages' nodes, else
    among `holders` (nodes that hold the model's file), else nobody."""
    there = set(alive)
    for group in ({stage.node for stage in lost.stages} & there, set(holders) & there):
        if group:
            return min(group)
    return None
