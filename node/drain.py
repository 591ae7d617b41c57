"""Leaving without loss: what still keeps a node that goes. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from swarmd.discovery.records import InstanceRecord


def ties(own_id: str, instances: Sequence[tuple[str, InstanceRecord]], streams: int) -> str:
    """Why node `own_id` may not go yet, in words for people; nothing once it may.

    `instances` are those of the swarm with their owners, none if nobody else is there; `streams` are the answers that
    its own clients are reading. Stages that nobody else has room for do not keep it: they are lost either way.
    """
    reasons = [f"{streams} answer{'s' if streams > 1 else ''}"] if streams else []
    names = {
        record.model.name
        for owner, record in instances
        if not record.missing_bytes and (owner == own_id or any(stage.node == own_id for stage in record.stages))
    }
    if names:
        reasons.append(f"its part of {', '.join(sorted(names))}")
    return " and ".join(reasons)
