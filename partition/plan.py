"""The result of planning: ordered stages with their bytes, and the reasons in plain words."""

from __future__ import annotations

from msgspec import Struct


class Capacity(Struct, frozen=True):
    """One device the planner may use. `memory` is what swarmd may use of it, in bytes; `label` is for people.

    `bandwidth` is how fast it reads its memory, in bytes/s as measured, 0 while that is not known. An `accelerator` is
    anything but the processor.
    """

    node: str
    device: str
    memory: int
    label: str
    bandwidth: float = 0.0
    accelerator: bool = False


class Promise(Struct, frozen=True):
    """What an instance promises its users: the longest sequence, and KV room over all sequences, both in tokens."""

    context: int
    kv_tokens: int


class PlannedStage(Struct, frozen=True):
    """Layers [start, end) on one device, and all bytes that they need there: weights, KV and workspace."""

    node: str
    device: str
    start: int
    end: int
    bytes: int


class Plan(Struct, frozen=True):
    """The stages in pipeline order, every layer exactly once, with the promise that they hold and the reasons."""

    stages: tuple[PlannedStage, ...]
    promise: Promise
    explanation: tuple[str, ...]


class DoesNotFit(Exception):
    """No plan exists within the limits. `missing` is the number of bytes that would have to be added at the least."""

    def __init__(self, missing: int, message: str) -> None:
        super().__init__(message)
        self.missing = missing
