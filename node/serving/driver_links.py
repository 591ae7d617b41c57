"""Links from this node to the drivers of instances, kept open between requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from swarmd.discovery.records import Address, InstanceRecord
from swarmd.transport.endpoint import Endpoint, LinkRefused
from swarmd.transport.link import Link, RemoteError

DIAL_SECONDS = 3.0

AddressOrder = Callable[[str, tuple[Address, ...]], tuple[Address, ...]]


class DriverLinks:
    """One link per driver process. `order` puts the addresses of a node's process in the order to try."""

    def __init__(self, endpoint: Endpoint, order: AddressOrder) -> None:
        self._endpoint = endpoint
        self._order = order
        # By the process, which may drive one epoch after the other.
        self._links: dict[tuple[str, tuple[Address, ...]], Link] = {}
        self._dialling = asyncio.Lock()

    async def get(self, record: InstanceRecord) -> Link:
        """A link to the driver of an instance. Raises RemoteError `unreachable`."""
        stage = record.stages[0] if record.stages else None
        if stage is None or not stage.addresses:
            raise RemoteError("unreachable", "the instance has no driver at present")
        key = (stage.node, stage.addresses)
        async with self._dialling:
            link = self._links.get(key)
            if link is None or link.closed:
                self._drop_closed()
                link = self._links[key] = await self._dial(stage.node, stage.addresses)
        return link

    async def hang_up(self, node: str) -> None:
        """Close the links with the drivers of a node that is gone: who waits for them may hear nothing otherwise."""
        for link in [link for link in self._links.values() if link.peer_id == node]:
            await link.close("its node is gone")

    async def _dial(self, node: str, addresses: tuple[Address, ...]) -> Link:
        reason = ""
        for address in self._order(node, addresses):
            try:
                return await self._endpoint.dial(address.host, address.port, expect=node, timeout=DIAL_SECONDS)
            except LinkRefused as error:
                reason = reason or error.reason
        raise RemoteError("unreachable", f"the driver cannot be reached: {reason}")

    def _drop_closed(self) -> None:
        self._links = {key: link for key, link in self._links.items() if not link.closed}
