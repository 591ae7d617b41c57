"""What a stage process keeps from one epoch to the next."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

from msgspec import Struct

from swarmd.node.serving.compute_thread import ComputeThread
from swarmd.node.serving.profile import Profile
from swarmd.node.serving.speculation import Speculation
from swarmd.transport.endpoint import Endpoint

if TYPE_CHECKING:
    from swarmd.node.engine.stage_engine import StageEngine


@dataclass
class StageParts:
    """What one epoch of a stage process leaves to the next. `settled` says that no kernels are to be compiled any more;
    `tell` sends a message to the daemon; `numbers` are those of the driver's sequences, none twice.
    """

    endpoint: Endpoint
    engine: StageEngine
    compute: ComputeThread
    speculation: Speculation | None
    tell: Callable[[Struct], Awaitable[None]]
    settled: bool = False
    numbers: Iterator[int] = field(default_factory=count)
    profile: Profile | None = None
    background: set[asyncio.Task[None]] = field(default_factory=set)

    def spawn(self, work: Coroutine[object, object, None]) -> None:
        """Do something that outlives the epoch."""
        task = asyncio.create_task(work)
        self.background.add(task)
        task.add_done_callback(self.background.discard)
