"""A new join token for a swarm that runs: the node that keeps the token hands out certificates, and all change over.

Three steps, each kept on disk before it shows: every member that can be reached gets its certificate of the new
authority over its link, and accepts both authorities; then all show the new one; after a while they accept only that.
Links that are up stay up, so nothing that is served is disturbed.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from msgspec import Struct
from msgspec.structs import replace

from swarmd.node.cluster.mesh import Mesh
from swarmd.node.cluster.trust_messages import (
    AuthoritySwitched,
    CertificateRenewed,
    RenewCertificate,
    SwitchAuthority,
)
from swarmd.transport.authority import authority_certificate
from swarmd.transport.identity import Credentials, load_credentials, load_token, swarm_of_certificate
from swarmd.transport.link import Link, LinkClosed, RemoteError
from swarmd.transport.log_limit import LogLimit
from swarmd.transport.private_files import IdentityError
from swarmd.transport.rotation import accept_handover, accept_offer, announce, certify, finish, hand_over
from swarmd.transport.rotation_file import RotationFile, end_rotation, load_rotation, save_rotation
from swarmd.transport.statements import StatementError, Succession
from swarmd.transport.token import JoinToken

log = logging.getLogger("swarmd.trust")

PREPARE_SECONDS = 10.0
SWITCH_SECONDS = 5.0
# While both authorities count: longer than members need to hear of the change, short for whoever has the old token.
TRANSITION_SECONDS = 10.0

OnCredentials = Callable[[Credentials, tuple[str, ...] | None], None]


class Rotations:
    """This node's part in rotations.

    `on_credentials` hears of each change of the credentials; with the members of the swarm, once they are the only
    ones that count. `known` are the ids of the nodes that should get certificates, reachable or not.
    """

    def __init__(
        self,
        directory: Path,
        credentials: Credentials,
        mesh: Mesh,
        known: Callable[[], Iterable[str]],
        on_credentials: OnCredentials,
    ) -> None:
        self.credentials = credentials
        self._directory = directory
        self._mesh = mesh
        self._known = known
        self._on_credentials = on_credentials
        self._deadline: float | None = None
        self._limit = LogLimit()
        self._rotating: asyncio.Task[None] | None = None

    @property
    def phase(self) -> str:
        """`prepared` or `switched` while this node holds certificates of two authorities, else empty."""
        if self.credentials.alternative is None:
            return ""
        return "prepared" if self._deadline is None else "switched"

    async def answer(self, link: Link, message: Struct) -> Struct:
        """Whoever holds the token has a step taken. Raises RemoteError."""
        try:
            present = load_rotation(self._directory)
            if isinstance(message, RenewCertificate):
                now = int(time.time())
                kept = accept_offer(self.credentials, present, message.succession, message.certificate, now)
                self._keep(kept)
                log.info("this node has a certificate for the swarm's next join token")
                return CertificateRenewed()
            assert isinstance(message, SwitchAuthority)
            kept = accept_handover(self.credentials, present, message.handover, int(time.time()))
            self._switch(kept)
            return AuthoritySwitched()
        except (StatementError, IdentityError) as error:
            if self._limit.admit(link.peer_id, time.monotonic()) is not None:
                log.warning("a change of the join token that %s asks for is refused: %s", link.peer.name, error)
            raise RemoteError("refused", str(error)) from None

    def on_link(self, link: Link) -> None:
        """Who shows a certificate of the next authority has switched: this node has missed the order to."""
        other = self.credentials.alternative
        if other is None or self.phase != "prepared":
            return
        if swarm_of_certificate(link.peer_certificate) == other.swarm_tag:
            present = load_rotation(self._directory)
            if present is not None:
                self._switch(replace(present, phase="switched", since=int(time.time())))

    def tick(self) -> None:
        """Time passed: begin what a command asks for, and end a transition."""
        try:
            rotation = load_rotation(self._directory)
            if rotation is None:
                return
            if rotation.phase == "asked" and self._rotating is None:
                self._rotating = asyncio.create_task(self._rotate(rotation), name="rotation")
            elif rotation.phase == "switched":
                if self._deadline is None:
                    self._deadline = _deadline(rotation.since)
                if time.monotonic() >= self._deadline:
                    self._finish(rotation)
        except IdentityError as error:
            if self._limit.admit("file", time.monotonic()) is not None:
                log.warning("the change of the join token does not go on: %s", error)

    async def close(self) -> None:
        """Stop; what is on disk goes on at the next start."""
        if self._rotating is not None:
            self._rotating.cancel()
            await asyncio.gather(self._rotating, return_exceptions=True)

    async def _rotate(self, asked: RotationFile) -> None:
        try:
            await self._hand_out(asked)
        except (IdentityError, ValueError) as error:
            log.error("the join token could not be changed: %s", error)
            end_rotation(self._directory)
        finally:
            self._rotating = None

    async def _hand_out(self, asked: RotationFile) -> None:
        old, new = load_token(self._directory), JoinToken.parse(asked.token)
        if old is None or old.swarm_tag != self.credentials.swarm_tag:
            raise IdentityError("this node does not keep the join token")
        serial = time.time_ns() // 1_000_000
        succession = announce(old, new, serial)
        links = self._mesh.links
        answers = await asyncio.gather(*(self._prepare(link, succession, new) for link in links))
        prepared = {link.peer_id for link, done in zip(links, answers, strict=True) if done}
        members = sorted({self.credentials.node_id, *prepared})
        missing = sorted(set(self._known()) - set(members))
        own = x509.load_pem_x509_certificate(self.credentials.certificate_pem).public_bytes(Encoding.DER)
        leaf = x509.load_der_x509_certificate(certify(own, new, dt.datetime.now(dt.UTC)))
        # On disk before anybody is told: who crashes here comes back with what the others will accept.
        self._switch(
            RotationFile(
                "switched",
                int(time.time()),
                serial,
                asked.token,
                leaf.public_bytes(Encoding.PEM).decode(),
                authority_certificate(new).public_bytes(Encoding.PEM).decode(),
                tuple(members)[:1024],
                tuple(missing)[:1024],
            )
        )
        order = SwitchAuthority(hand_over(old, new, members[:1024]))
        await asyncio.gather(*(_ask(link, order, SWITCH_SECONDS) for link in links if link.peer_id in members))

    async def _prepare(self, link: Link, succession: Succession, new: JoinToken) -> bool:
        certificate = certify(link.peer_certificate, new, dt.datetime.now(dt.UTC))
        return await _ask(link, RenewCertificate(succession, certificate), PREPARE_SECONDS)

    def _keep(self, rotation: RotationFile) -> None:
        save_rotation(self._directory, rotation)
        self._reload(None)

    def _switch(self, rotation: RotationFile) -> None:
        self._keep(rotation)
        self._deadline = time.monotonic() + TRANSITION_SECONDS
        log.info("the swarm has a new join token; the old one counts for %.0f s more", TRANSITION_SECONDS)

    def _finish(self, rotation: RotationFile) -> None:
        kept_token = load_token(self._directory) is not None and not rotation.token
        finish(self._directory)
        self._deadline = None
        self._reload(rotation.members)
        log.info("only the new join token counts from now on")
        if kept_token:
            log.warning("the join token that was kept here is worthless, and deleted; another node has the new one")

    def _reload(self, members: tuple[str, ...] | None) -> None:
        credentials = load_credentials(self._directory)
        assert credentials is not None
        self.credentials = credentials
        self._on_credentials(credentials, members)


async def _ask(link: Link, order: Struct, seconds: float) -> bool:
    """Whether a member has done as asked."""
    try:
        await link.request(order, timeout=seconds)
    except (LinkClosed, RemoteError, TimeoutError) as error:
        log.warning("%s did not take part in the change of the join token: %s", link.peer.name, error)
        return False
    return True


def _deadline(since: int) -> float:
    """When a transition that began at `since` ends, in monotonic time; a clock that was set never makes it longer."""
    passed = time.time() - since
    return time.monotonic() + (TRANSITION_SECONDS - passed if 0 <= passed <= TRANSITION_SECONDS else 0.0)
