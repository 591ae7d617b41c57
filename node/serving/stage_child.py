"""One stage process as its daemon sees it, and how it is started and ended."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from swarmd.discovery.records import LoadRecord
from swarmd.node.serving.messages import EngineBeat, EngineLoaded, LoadEngine
from swarmd.transport.link import Link

EXIT_SECONDS = 2.0
# libgomp's threads spin for milliseconds at every barrier by default. When anything else wants a core, one stage then
# runs at a tenth of its speed or less; a short spin costs some speed on an idle machine and none of that.
SHORT_SPIN = {"GOMP_SPINCOUNT": "1000"}


class StageKey(NamedTuple):
    """Which stage of which plan: an owner gives each of its plans another epoch."""

    instance: str
    owner: str
    epoch: int
    place: int

    @classmethod
    def of(cls, job: LoadEngine) -> StageKey:
        """The stage that holds a job."""
        return cls(job.instance, job.owner, job.epoch, job.index)

    def replaces(self, other: StageKey) -> bool:
        """Whether the start of this stage ends the other: of its instance, and not another stage of the same plan."""
        same_plan = self[:3] == other[:3]
        return self.instance == other.instance and (not same_plan or self.place == other.place)


class StageStatus(NamedTuple):
    """A stage, its process, and its latest sign of life, which tells what it holds of sequences; None before any."""

    job: LoadEngine
    pid: int
    beat: EngineBeat | None


@dataclass(eq=False)
class Child:
    """A stage process of this node. `up` is its link, once it has presented itself."""

    job: LoadEngine
    process: asyncio.subprocess.Process
    up: asyncio.Future[Link]
    watcher: asyncio.Task[None] = field(init=False)
    loaded: EngineLoaded | None = None
    load: LoadRecord | None = None
    beat: EngineBeat | None = None
    stopping: bool = False
    # Its epoch is over, and the owner knows.
    troubled: bool = False
    # Nothing can be expected of the process any more.
    sick: bool = False


async def start_process(
    data_dir: Path, daemon_port: int, ticket: str, name: str, spare_for: str = ""
) -> asyncio.subprocess.Process:
    """Start a stage process, which dials the daemon and shows the ticket. `spare_for`: it has time to get ready for
    stages on this device first. Raises OSError."""
    arguments = [
        *("--data-dir", str(data_dir), "--daemon-port", str(daemon_port)),
        *("--ticket", ticket, "--name", name),
        *("--log-level", logging.getLevelName(logging.getLogger().getEffectiveLevel())),
        *(("--spare-for", spare_for) if spare_for else ()),
    ]
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",  # or a folder named swarmd in the working directory would be imported instead
        "-m",
        "swarmd.node.serving.stage_main",
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        env={**SHORT_SPIN, **os.environ},
    )


def can_be_kept(child: Child, job: LoadEngine) -> bool:
    """Whether a stage process holds what a job asks for, and is sound."""
    return child.loaded is not None and not (child.stopping or child.sick) and child.job.same_stage(job)


async def terminate(child: Child) -> None:
    """End a stage process, by force if it does not listen, and wait until it is gone."""
    if child.process.returncode is None:
        child.process.terminate()
        _, running = await asyncio.wait({child.watcher}, timeout=EXIT_SECONDS)
        if running and child.process.returncode is None:
            child.process.kill()
    await asyncio.wait({child.watcher})
