"""All targets, in the order in which a run takes them."""

from __future__ import annotations

from fuzz.cluster_targets import Records
from fuzz.discovery_targets import Mdns, Typed
from fuzz.engine import Target
from fuzz.http_targets import HttpBodies, HttpBytes
from fuzz.link_targets import Frames, Links, Messages
from fuzz.model_targets import Configs, Folders, Gguf, GgufTokenizers, Safetensors, SentencePiece
from fuzz.schema_targets import Schemas

TARGETS: dict[str, type[Target]] = {
    kind.name: kind
    for kind in (
        Frames,
        Messages,
        Links,
        Records,
        Gguf,
        GgufTokenizers,
        Safetensors,
        Configs,
        Folders,
        SentencePiece,
        HttpBodies,
        HttpBytes,
        Schemas,
        Mdns,
        Typed,
    )
}
