"""The daemon's links: what comes in over them, handed to the part that it concerns."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from msgspec import Struct

from swarmd.node.cluster.instances import Instances
from swarmd.node.cluster.mesh import Mesh
from swarmd.node.cluster.messages import (
    GetChunk,
    GetManifest,
    StageLost,
    StageProgress,
    StartStage,
    StopStage,
    TakeStage,
    WireStage,
)
from swarmd.node.cluster.model_exchange import ModelExchange
from swarmd.node.cluster.stage_orders import StageOrders
from swarmd.node.cluster.trust import Trust
from swarmd.node.cluster.trust_messages import RenewCertificate, SwitchAuthority, TellDenials
from swarmd.node.serving.stage_host import StageHost
from swarmd.transport.endpoint import LinkRefused
from swarmd.transport.exchanges import Answer
from swarmd.transport.link import Link, RemoteError
from swarmd.transport.log_limit import LogLimit

log = logging.getLogger("swarmd.cluster")


@dataclass
class LinkRouter:
    """A `LinkHandler`.

    Links are of three kinds: with other daemons, with this node's own stage processes, which dialled in, and with
    drivers, which this node dialled.
    """

    own_id: str
    host: StageHost
    orders: StageOrders
    exchange: ModelExchange
    instances: Instances
    # Set once the endpoint is made, which needs this handler first.
    mesh: Mesh = field(init=False)
    _limit: LogLimit = field(init=False, default_factory=LogLimit)
    trust: Trust = field(init=False)

    async def on_link(self, link: Link) -> None:
        """Admit a link."""
        if link.peer.role == "daemon":
            await self.trust.on_link(link)
            await self.mesh.on_link(link)
        elif not link.initiator and not self._is_own_stage(link):
            raise LinkRefused("this node has not started that stage process")

    async def on_message(self, link: Link, message: Struct, payload: bytearray) -> None:
        """A one-way message."""
        if link.peer.role == "stage":
            await self.host.on_message(link, message)
        elif isinstance(message, StageProgress | StageLost):
            self.instances.on_report(link.peer_id, message)
        elif isinstance(message, TellDenials):
            self.trust.on_denials(link, message)
        else:
            await self.mesh.on_message(link, message)

    async def on_request(self, link: Link, message: Struct, payload: bytearray) -> Answer:
        """A member asks for model bytes, or an owner gives an order."""
        if link.peer.role == "daemon":
            match message:
                case GetManifest() | GetChunk():
                    return await self.exchange.answer(message)
                case RenewCertificate() | SwitchAuthority():
                    return await self.trust.rotations.answer(link, message)
                case StartStage() | WireStage() | StopStage() | TakeStage():
                    return await self._carry_out(link, message)
        self._log_refusal(link, message, "no daemon answers that")
        raise RemoteError("unknown", f"a daemon does not answer {type(message).__name__}")

    def on_stream(self, link: Link, message: Struct, payload: bytearray) -> AsyncIterator[Struct]:
        """Daemons stream nothing; drivers do."""
        self._log_refusal(link, message, "no daemon streams anything")
        raise RemoteError("not_driver", "this process does not drive an instance")

    async def on_closed(self, link: Link, reason: str) -> None:
        """A link is down."""
        if link.peer.role == "daemon":
            await self.mesh.on_closed(link)
        else:
            self.host.on_closed(link, reason)

    async def _carry_out(self, link: Link, order: Struct) -> Answer:
        try:
            return await self.orders.carry_out(link.peer_id, order)
        except RemoteError as error:
            self._log_refusal(link, order, error.message)
            raise

    def _log_refusal(self, link: Link, message: Struct, reason: str) -> None:
        """Once in a while, whoever repeats it."""
        if (held := self._limit.admit(link.peer_id, time.monotonic())) is not None:
            more = f" (and {held} more from it)" if held else ""
            log.info("refused %s of %s: %s%s", type(message).__name__, link.peer.name, reason, more)

    def _is_own_stage(self, link: Link) -> bool:
        return link.peer_id == self.own_id and self.host.on_link(link)
