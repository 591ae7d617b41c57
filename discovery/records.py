"""The record that a node publishes about itself: what it is, what it can carry, which instances it owns.

Records come from peers, so every collection and text in them is bounded: decoding one with msgspec refuses what does
not fit.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from msgspec import Meta, Struct

NodeId = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
ShortText = Annotated[str, Meta(max_length=128)]
LongText = Annotated[str, Meta(max_length=512)]
Count = Annotated[int, Meta(ge=0, le=2**62)]
Speed = Annotated[float, Meta(ge=0, le=1e18)]


MAX_CLAIMS = 32
MAX_CUT_OFF = 32

WireWish = Literal["auto", "f32", "bf16", "f16", "q8"]


class InstanceState(StrEnum):
    """Where an instance stands in its life."""

    PLANNING = "planning"
    LOADING = "loading"
    READY = "ready"
    WAITING = "waiting"
    FAILED = "failed"


class DeviceRecord(Struct, frozen=True):
    """One device as measured: memory in bytes, `memory_bandwidth` in bytes/s, `compute` in FLOP/s (fp32 products).

    `id` names it on its node (`cpu`, `cuda:0`, `metal`, `mlx-cpu`), `kind` says what computes there (`cpu`, `cuda`,
    `metal`, `mlx`). `memory_limit` is what swarmd may use of it: the user's cap, or what was free at start less a
    reserve.
    """

    id: ShortText
    kind: ShortText
    name: ShortText
    memory_total: Count
    memory_free: Count
    memory_limit: Count
    memory_bandwidth: Speed
    compute: Speed


class Address(Struct, frozen=True, array_like=True):
    """Where a process accepts links: an IP address (IPv6 link-local with its scope) or a DNS name, and a TCP port."""

    host: Annotated[str, Meta(max_length=255)]
    port: Annotated[int, Meta(ge=1, le=65535)]


MAX_ADDRESSES = 32
Addresses = Annotated[tuple[Address, ...], Meta(max_length=MAX_ADDRESSES)]
"""Where one process can be reached. One bound everywhere: what one message admits, the next must carry."""


class StageRecord(Struct, frozen=True):
    """One stage of a running instance: layers [start, end) on `device` of `node`, reachable at `addresses`."""

    node: NodeId
    device: ShortText
    start: Count
    end: Count
    bytes: Count
    addresses: Addresses = ()


class ModelSummary(Struct, frozen=True):
    """What every node needs to know of a model to answer for it; `sha256` names its file everywhere."""

    name: ShortText
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    size: Count
    context: Count
    architecture: ShortText


class LoadRecord(Struct, frozen=True):
    """How busy the driver of instance `instance` is; published by the driver's node.

    Of the `draft_tokens` that it has guessed and verified in this epoch, `accepted_draft_tokens` were right.
    """

    instance: ShortText
    running: Count = 0
    waiting: Count = 0
    kv_tokens_used: Count = 0
    kv_tokens: Count = 0
    draft_tokens: Count = 0
    accepted_draft_tokens: Count = 0


class InstanceRecord(Struct, frozen=True):
    """One instance, published by its owner.

    Of several for one `id` the one of the higher epoch counts, then of the higher term: it grows when the instance
    changes hands while its stages stay as they are. `split` is the owner's wish for many stages; `missing_bytes` is how
    much memory is lacking, 0 if none is.
    """

    id: ShortText
    model: ModelSummary
    state: InstanceState
    epoch: Count
    term: Count = 0
    reason: LongText = ""
    stages: Annotated[tuple[StageRecord, ...], Meta(max_length=256)] = ()
    explanation: Annotated[tuple[LongText, ...], Meta(max_length=64)] = ()
    done_bytes: Count = 0
    total_bytes: Count = 0
    missing_bytes: Count = 0
    split: bool = False


class Claim(Struct, frozen=True, array_like=True):
    """Who owns an instance of `model`, as somebody says who has a link with that owner."""

    instance: ShortText
    model: ShortText
    owner: NodeId
    epoch: Count
    term: Count


class NodeRecord(Struct, frozen=True):
    """All that a node says of itself. Last writer wins per node: `counter` only grows, also across restarts.

    `launching` names the models that it is bringing, of which it will own an instance. `wire_dtype` is how it wishes
    hidden states to travel over links of its stages. `follows` are the claims of other owners that it goes by, of those
    with whom it has a link; `cut_off` are members that it does not hear and that have not said that they leave.
    """

    id: NodeId
    name: ShortText
    version: ShortText
    counter: Count
    addresses: Addresses = ()
    devices: Annotated[tuple[DeviceRecord, ...], Meta(max_length=64)] = ()
    models: Annotated[tuple[ModelSummary, ...], Meta(max_length=256)] = ()
    instances: Annotated[tuple[InstanceRecord, ...], Meta(max_length=16)] = ()
    loads: Annotated[tuple[LoadRecord, ...], Meta(max_length=16)] = ()
    launching: Annotated[tuple[ShortText, ...], Meta(max_length=16)] = ()
    leaving: bool = False
    wire_dtype: WireWish = "auto"
    follows: Annotated[tuple[Claim, ...], Meta(max_length=MAX_CLAIMS)] = ()
    cut_off: Annotated[tuple[NodeId, ...], Meta(max_length=MAX_CUT_OFF)] = ()
