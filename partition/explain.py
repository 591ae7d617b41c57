"""A plan's reasons, in words for the person who runs the swarm."""

from __future__ import annotations

from collections.abc import Sequence

from swarmd.partition.plan import Capacity, PlannedStage, Promise
from swarmd.partition.units import format_bytes

MOST_NAMED = 16
"""So many devices without a part in the plan are named; there may be hundreds."""


def explain_single(
    stages: Sequence[PlannedStage], devices: Sequence[Capacity], promise: Promise, *, shrunk: bool
) -> tuple[str, ...]:
    """Why one device holds everything."""
    used = _find(stages[0], devices)
    speed = f", read at {format_bytes(used.bandwidth)}/s" if used.bandwidth else ""
    lines = [f"{used.label} holds the whole model: {_fill(stages[0], used)}{speed}"]
    others = [other for other in devices if other is not used]
    for other in others[:MOST_NAMED]:
        lines.append(
            f"{other.label} is not needed: a model that fits on one device is not split unless asked (--split)"
        )
    if len(others) > MOST_NAMED:
        lines.append(f"nor are {len(others) - MOST_NAMED} others")
    return (*lines, *_promise_lines(promise, shrunk))


def explain_split(
    stages: Sequence[PlannedStage], devices: Sequence[Capacity], promise: Promise, *, shrunk: bool
) -> tuple[str, ...]:
    """Why each device has the layers it has, or none."""
    lines, used = [], []
    for stage in stages:
        device = _find(stage, devices)
        used.append(device)
        lines.append(f"{device.label}: layers {stage.start} to {stage.end - 1}, {_fill(stage, device)}")
    others = [other for other in devices if other not in used]
    for other in others[:MOST_NAMED]:
        lines.append(f"{other.label} is left out: its {format_bytes(other.memory)} would carry less than it costs")
    if len(others) > MOST_NAMED:
        lines.append(f"so are {len(others) - MOST_NAMED} others")
    return (*lines, *_promise_lines(promise, shrunk))


def explain_too_small(whole: int, missing: int, devices: Sequence[Capacity], promise: Promise) -> str:
    """What is missing and what to do about it."""
    have = sum(device.memory for device in devices)
    return (
        f"the model needs {format_bytes(whole)} with a context of {promise.context} tokens, and the swarm's "
        f"{len(devices)} device(s) offer {format_bytes(have)}: {format_bytes(missing)} missing; "
        "add a node, raise --memory, or choose a smaller model or --context"
    )


def _find(stage: PlannedStage, devices: Sequence[Capacity]) -> Capacity:
    return next(d for d in devices if (d.node, d.device) == (stage.node, stage.device))


def _fill(stage: PlannedStage, device: Capacity) -> str:
    return f"{format_bytes(stage.bytes)} of {format_bytes(device.memory)}"


def _promise_lines(promise: Promise, shrunk: bool) -> list[str]:
    if not shrunk:
        return []
    return [f"memory is short: the context is reduced to {promise.context} tokens"]
