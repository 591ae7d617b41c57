"""What daemons say to each other: membership, model bytes, and the orders of an instance's owner."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from swarmd.discovery.records import Addresses, Count, NodeId, NodeRecord, ShortText
from swarmd.node.cluster.trust_messages import TRUST_MESSAGES
from swarmd.node.models.manifest import ModelManifest
from swarmd.node.serving.messages import DATA_MESSAGES, WireDtype

Seconds = Annotated[float, Meta(ge=0, le=1e12)]
"""Of a sender's own clock. Not a number is no number here."""
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class Publish(Struct, frozen=True, tag="publish"):
    """The sender's own record; sent on a new link and whenever it changes."""

    record: NodeRecord


class Heartbeat(Struct, frozen=True, tag="heartbeat"):
    """The sender is alive and its record is still the one of this counter."""

    counter: Count
    sent_at: Seconds = 0.0


class HeartbeatEcho(Struct, frozen=True, tag="heartbeat.echo"):
    """Answer to a heartbeat, by which the sender measures the round trip; `known` is the counter of its record that
    the other side has, so that one which got lost is sent again.
    """

    sent_at: Seconds
    known: Count = 0


class KnownNode(Struct, frozen=True, array_like=True):
    """A member and where it may be reached; a hint to dial, proven only by the link."""

    id: NodeId
    addresses: Addresses


class Gossip(Struct, frozen=True, tag="gossip"):
    """The members that the sender has links with; sent on a new link and when one is added."""

    nodes: Annotated[tuple[KnownNode, ...], Meta(max_length=512)]


class GetManifest(Struct, frozen=True, tag="model.manifest"):
    """Ask for the manifest of a model that the other side holds."""

    sha256: Sha256


class Manifest(Struct, frozen=True, tag="model.manifest.is"):
    """The manifest asked for."""

    manifest: ModelManifest


class GetChunk(Struct, frozen=True, tag="model.chunk"):
    """Ask for one chunk of a model file."""

    sha256: Sha256
    index: Count


class ModelChunk(Struct, frozen=True, tag="model.chunk.is"):
    """The chunk asked for is this frame's payload."""


class StartStage(Struct, frozen=True, tag="stage.start"):
    """Owner to member: fetch what is missing of the model, start a stage process and load layers [start, end) on
    `device`, which the member's record names.

    An order ends what the member runs of the same instance by orders of a lower epoch or of another owner. Orders of
    one epoch stand side by side, told apart by `index`, the stage's place in the pipeline. One that is to start
    `beside` the others ends nothing; `fetch_only` asks for the bytes alone.
    """

    instance: ShortText
    epoch: Count
    index: Count
    model: ModelManifest
    device: ShortText
    start: Count
    end: Count
    kv_tokens: Count
    context: Count
    beside: bool = False
    fetch_only: bool = False


class StageFetched(Struct, frozen=True, tag="stage.fetched"):
    """What the stage will need is on this node."""


class StageStarted(Struct, frozen=True, tag="stage.started"):
    """The stage is loaded; its process accepts links at these addresses."""

    addresses: Addresses
    weight_bytes: Count


class StageProgress(Struct, frozen=True, tag="stage.progress"):
    """Member to owner while a stage starts: bytes fetched and loaded, of so many."""

    instance: ShortText
    epoch: Count
    index: Count
    done_bytes: Count
    total_bytes: Count


class WireStage(Struct, frozen=True, tag="stage.wire"):
    """Owner to member: connect your stage `index` to the next one of the ring; send it activations in `wire_dtype`, and
    take them from `previous_node` only.
    """

    instance: ShortText
    epoch: Count
    index: Count
    n_stages: Count
    next_node: NodeId
    next_addresses: Addresses
    wire_dtype: WireDtype
    previous_node: NodeId | None = None


class StageWired(Struct, frozen=True, tag="stage.wired"):
    """The stage is connected."""


class StopStage(Struct, frozen=True, tag="stage.stop"):
    """Owner to member: end your stages of this instance of the epochs `since` to `epoch`."""

    instance: ShortText
    epoch: Count
    since: Count = 0


class TakeStage(Struct, frozen=True, tag="stage.take"):
    """A new owner to member: your stage belongs to me now, and serves on. Answered with StageWired."""

    instance: ShortText
    epoch: Count
    index: Count


class StageLost(Struct, frozen=True, tag="stage.lost"):
    """Member to owner: a stage of this epoch ended (`own_fault`) or lost a neighbour."""

    instance: ShortText
    epoch: Count
    index: Count
    reason: Annotated[str, Meta(max_length=1024)]
    own_fault: bool = False


DAEMON_MESSAGES = (
    *DATA_MESSAGES,
    *TRUST_MESSAGES,
    Publish,
    Heartbeat,
    HeartbeatEcho,
    Gossip,
    GetManifest,
    Manifest,
    GetChunk,
    ModelChunk,
    StartStage,
    StageFetched,
    StageStarted,
    StageProgress,
    WireStage,
    StageWired,
    StopStage,
    TakeStage,
    StageLost,
)
