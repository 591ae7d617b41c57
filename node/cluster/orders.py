"""An owner's orders for its stages, and whose reports on them count. Pure."""

from __future__ import annotations

from swarmd.discovery.records import StageRecord
from swarmd.node.cluster.messages import StageLost, StageProgress, StartStage
from swarmd.node.cluster.ownership import OwnedInstance
from swarmd.node.models.manifest import ModelManifest
from swarmd.partition.plan import Promise


def start_order(
    key: tuple[str, int, int],
    stage: StageRecord,
    manifest: ModelManifest,
    promise: Promise,
    *,
    fetch_only: bool,
    beside: bool,
) -> StartStage:
    """The order to start a stage; `key` is (instance, epoch, index)."""
    instance, epoch, index = key
    return StartStage(
        instance=instance,
        epoch=epoch,
        index=index,
        model=manifest,
        device=stage.device,
        start=stage.start,
        end=stage.end,
        kv_tokens=promise.kv_tokens,
        context=promise.context,
        beside=beside,
        fetch_only=fetch_only,
    )


def carries(owned: OwnedInstance, report: StageProgress | StageLost, sender: str) -> bool:
    """Whether `sender` was ordered to hold the stage that a report is about."""
    move = owned.move
    stages = move.stages if move is not None and move.epoch == report.epoch else owned.record.stages
    return report.index < len(stages) and stages[report.index].node == sender
