"""An endpoint: the place of a process among the others, which accepts and dials links."""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import ssl
import time
from collections.abc import Callable, Collection, Coroutine, Mapping

import msgspec

from swarmd.transport.frames import FrameError
from swarmd.transport.handler import LinkHandler
from swarmd.transport.handshake import LinkRefused, hang_up, introduce
from swarmd.transport.identity import Credentials, swarm_of_certificate
from swarmd.transport.link import Hello, Link, LinkClosed, Vocabulary
from swarmd.transport.listener import Listener
from swarmd.transport.log_limit import LogLimit
from swarmd.transport.sockets import connect, resolve
from swarmd.transport.statements import EVICTED
from swarmd.transport.tls import client_context, explain_tls_error, says_other_swarm, server_context, server_name
from swarmd.transport.tls_socket import TlsSocket

__all__ = ["Endpoint", "LinkRefused"]

log = logging.getLogger("swarmd.transport")

HANDSHAKE_SECONDS = 5.0
MAX_LINKS_OF_NODE = 8
"""Accepted from one other node. Two daemons need one, for a moment two; a stage's process one for each of its uses."""
MAX_LINKS = 1024
NEW_TOKEN = "this swarm has a new join token; join again with that"


class Endpoint:
    """Accepts and dials links with one set of credentials.

    `hello` is asked for at every new link, so that what it says may change. Whoever is refused, on either
    side, costs one log line (at most one per address and reason in ten seconds) and nothing else.
    """

    def __init__(
        self,
        credentials: Credentials,
        vocabulary: Vocabulary,
        handler: LinkHandler,
        *,
        hello: Callable[[], Hello],
        handshake_seconds: float = HANDSHAKE_SECONDS,
    ):
        self.node_id = credentials.node_id
        self._vocabulary = vocabulary
        self._handler = handler
        self._hello = hello
        self._seconds = handshake_seconds
        self._name = secrets.token_hex(8)
        self._take(credentials)
        self._listener = Listener(self._greet)
        self._links: set[Link] = set()
        self._refused: dict[str, str] = {}
        self._watchers: set[asyncio.Task[None]] = set()
        self._limit = LogLimit()
        self._closed = False

    def adopt(self, credentials: Credentials) -> None:
        """Show these credentials from now on, which must be of the same node; links that are up stay."""
        assert credentials.node_id == self.node_id, "a process is one node for as long as it lives"
        self._take(credentials)

    def keep_only(self, members: Collection[str]) -> None:
        """End the links of before, which came about under another authority than the present one.

        Those with `members` stay, and those among this node's own processes.
        """
        for link in self._links:
            of_before = swarm_of_certificate(link.peer_certificate) != self._swarm_tag
            if of_before and link.peer_id not in (*members, self.node_id):
                self._watch_over(link.close(NEW_TOKEN), "closing a link of before")

    @property
    def links(self) -> tuple[Link, ...]:
        """The links that are up."""
        return tuple(self._links)

    @property
    def handshakes(self) -> int:
        """Accepted connections that have not become links yet; bounded."""
        return self._listener.greetings

    async def listen(self, host: str | None, port: int) -> int:
        """Accept links on `host` (None: all IPv4 and IPv6 addresses) and `port` (0: any); the port bound.

        Raises `OSError` with a sentence that says what to do.
        """
        return await self._listener.listen(host, port)

    async def dial(
        self, host: str, port: int, *, expect: str | None = None, timeout: float = 5, quiet: bool = False
    ) -> Link:
        """A new link to whoever listens at `host`, which must be node `expect` if given.

        Every address that a name resolves to is tried, within `timeout` seconds in all. Raises `LinkRefused`,
        logged here unless `quiet`. When this returns, `on_link` has run.
        """
        try:
            async with asyncio.timeout(timeout):
                return await self._dial(host, port, expect)
        except TimeoutError:
            refusal = LinkRefused(f"it did not answer within {timeout:g} s (switched off, or a firewall?)")
        except LinkRefused as error:
            refusal = error
        if not quiet:
            self._log_refusal("no link to %s port %d: %s", host, port, refusal.reason)
        raise refusal

    def refuse(self, nodes: Mapping[str, str]) -> None:
        """From now on have no link with these nodes, whose ids each have the reason to tell; those there are end.

        This node itself is never refused: its processes stay linked with each other.
        """
        self._refused = {node: reason for node, reason in nodes.items() if node != self.node_id}
        for link in self._links:
            if link.peer_id in self._refused:
                self._watch_over(link.close(self._refused[link.peer_id]), "closing a refused link")

    async def close(self) -> None:
        """Stop listening and close every link."""
        self._closed = True
        await self._listener.close()
        links = list(self._links)
        await asyncio.gather(*(link.close("this node is shutting down") for link in links))
        await asyncio.gather(*self._watchers)

    async def _dial(self, host: str, port: int, expect: str | None) -> Link:
        shown = self._client_contexts
        refusal = LinkRefused("nothing was tried")
        for family, address in await resolve(host, port):
            for context, name in shown:
                try:
                    sock = await connect(family, address)
                except TimeoutError:  # the kernel's own
                    refusal = LinkRefused("it did not answer (switched off, or a firewall?)")
                    break
                except OSError as error:
                    refused = isinstance(error, ConnectionRefusedError)
                    refusal = LinkRefused(explain_tls_error(error, server_side=False), nobody_listens=refused)
                    break
                try:
                    return await self._establish(sock, context, expect=expect, server_name=name)
                except LinkRefused as error:
                    # While the swarm changes its token, the other side may accept the other certificate only.
                    if context is shown[-1][0] or not says_other_swarm(error.reason):
                        raise
        raise refusal

    def _take(self, credentials: Credentials) -> None:
        shown = [credentials, *([credentials.alternative] if credentials.alternative is not None else [])]
        self._swarm_tag = credentials.swarm_tag
        self._server_context = server_context(credentials)
        self._client_contexts = [
            (client_context(one, credentials.trusted_pem), server_name(one.swarm_tag)) for one in shown
        ]

    async def _greet(self, sock: socket.socket) -> None:
        """One accepted connection, to the link or to the log line."""
        host, port = "?", 0
        try:
            host, port = sock.getpeername()[:2]
            async with asyncio.timeout(self._seconds):
                await self._establish(sock, self._server_context, expect=None, server_name=None)
        except TimeoutError:
            reason = f"it did not finish the handshake within {self._seconds:g} s (silent, or not a swarmd node)"
        except LinkRefused as error:
            reason = error.reason
        except OSError as error:
            reason = explain_tls_error(error, server_side=True)
        except asyncio.CancelledError:
            reason = "" if self._closed else "too many unfinished handshakes at once, the oldest is dropped"
        else:
            return
        finally:
            sock.close()  # without effect once the TLS socket has taken it over
        if reason:
            self._log_refusal("refused a connection from %s port %d: %s", host, port, reason)

    async def _establish(
        self, sock: socket.socket, context: ssl.SSLContext, *, expect: str | None, server_name: str | None
    ) -> Link:
        """Handshake, hello and `on_link`; on failure the connection is closed and `LinkRefused` raised.

        `server_name` is whom a dial asks for; None for a connection that was accepted.
        """
        server_side = server_name is None
        try:
            tls = TlsSocket(sock, context, server_side=server_side, server_name=server_name)
        except OSError as error:
            sock.close()
            raise LinkRefused(explain_tls_error(error, server_side=server_side)) from error
        hello = msgspec.structs.replace(self._hello(), endpoint=self._name)
        try:
            introduction = await introduce(tls, hello, self._refused, server_side=server_side, expect=expect)
        except LinkRefused:
            await hang_up(tls)
            raise
        except BaseException:
            tls.close()
            raise
        parts = self._vocabulary, self._handler
        link = Link(tls, introduction, *parts, initiator=not server_side, on_breach=self._log_breach)
        late = "this node is shutting down" if self._closed else self._refused.get(introduction.peer_id)
        if late is None and server_side:
            late = self._crowded(introduction.peer_id)
        if late is not None:
            tls.close()
            raise LinkRefused(late)
        self._links.add(link)
        watcher = self._watch_over(self._watch(link), "link watcher")
        try:
            await link.start()
        except LinkRefused:
            await watcher
            raise
        except LinkClosed as error:
            await watcher
            raise LinkRefused(f"it ended the link at once ({error.reason})") from error
        except Exception as error:
            log.exception("the handler could not take a link")
            await watcher
            raise LinkRefused("this node could not take the link; its log says why") from error
        return link

    def _crowded(self, peer_id: str) -> str | None:
        """Why another link with this node is one too many. The processes of this node itself do not count."""
        if peer_id == self.node_id:
            return None
        if sum(link.peer_id == peer_id for link in self._links) >= MAX_LINKS_OF_NODE:
            return f"node {peer_id[:12]} has {MAX_LINKS_OF_NODE} links with this process already"
        return f"this process has {MAX_LINKS} links already" if len(self._links) >= MAX_LINKS else None

    async def _watch(self, link: Link) -> None:
        await link.wait_closed()
        self._links.discard(link)

    def _watch_over(self, work: Coroutine[object, object, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._watchers.add(task)
        task.add_done_callback(self._watchers.discard)
        return task

    def _log_refusal(self, text: str, host: str, port: int, reason: str) -> None:
        # One that is evicted may knock from all its addresses.
        more = self._admit(f"{text[:2]} {'' if EVICTED in reason else host} {reason}")
        if more is not None:
            log.warning(text + "%s", host, port, reason, more)

    def _log_breach(self, link: Link, error: FrameError | LinkClosed) -> None:
        lost = isinstance(error, LinkClosed)
        more = self._admit(f"{'loss' if lost else 'breach'} {link.peer_id}")
        if more is None:
            return
        if lost:
            log.info("link with %s was lost: %s%s", link.peer.name, error, more)
        else:
            log.warning("link with %s broke the protocol: %s%s", link.peer.name, error, more)

    def _admit(self, key: str) -> str | None:
        """What to add to a log line of this kind, or None if it is one of too many."""
        held = self._limit.admit(key, time.monotonic())
        return None if held is None else f" (and {held} more like it)" if held else ""
