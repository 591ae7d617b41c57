"""Links from this node to the drivers of instances, kept open between requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from swarmd.discovery.records import Address, InstanceRecord
from swarmd.transport.endpoint import Endpoint, LinkRefused
from swarmd.transport.link import Link, RemoteError

DIAL_SECONDS = 4.0
ADDRESS_SECONDS = 2.0

_Process = tuple[str, tuple[Address, ...]]
AddressOrder = Callable[[str, tuple[Address, ...]], tuple[Address, ...]]


class DriverLinks:
    """One link per driver process. `order` puts the addresses of a node's process in the order to try."""

    def __init__(self, endpoint: Endpoint, order: AddressOrder) -> None:
        self._endpoint = endpoint
        self._order = order
        # By the process, which may drive one epoch after the other.
        self._links: dict[_Process, Link] = {}
        self._dialling: dict[_Process, asyncio.Task[Link]] = {}

    async def get(self, record: InstanceRecord) -> Link:
        """A link to the driver of an instance. Raises RemoteError `unreachable`, after DIAL_SECONDS at most."""
        stage = record.stages[0] if record.stages else None
        if stage is None or not stage.addresses:
            raise RemoteError("unreachable", "the instance has no driver at present")
        process = (stage.node, stage.addresses)
        link = self._links.get(process)
        if link is not None and not link.closed:
            return link
        # Whoever wants the same driver meanwhile waits for the same link, and nobody for another driver's.
        task = self._dialling.get(process)
        if task is None:
            task = self._dialling[process] = asyncio.create_task(self._connect(process))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(task)

    async def hang_up(self, node: str) -> None:
        """Close the links with the drivers of a node that is gone: who waits for them may hear nothing otherwise."""
        lost = [link for link in self._links.values() if link.peer_id == node]
        await asyncio.gather(*(link.close("its node is gone") for link in lost))

    async def _connect(self, process: _Process) -> Link:
        try:
            async with asyncio.timeout(DIAL_SECONDS):
                link = await self._dial(*process)
        except TimeoutError:
            raise RemoteError("unreachable", "the driver does not answer") from None
        finally:
            del self._dialling[process]
        self._links = {key: one for key, one in self._links.items() if not one.closed}
        self._links[process] = link
        return link

    async def _dial(self, node: str, addresses: tuple[Address, ...]) -> Link:
        reason = ""
        for address in self._order(node, addresses):
            try:
                return await self._endpoint.dial(address.host, address.port, expect=node, timeout=ADDRESS_SECONDS)
            except LinkRefused as error:
                reason = reason or error.reason
        raise RemoteError("unreachable", f"the driver cannot be reached: {reason}")
