"""Whoever is not who a member is, is refused in either direction: with one log line that says why, however often."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

import pytest
from support import forged
from support.link_fakes import Recorder, endpoint, eventually, new_credentials

from swarmd.transport.endpoint import LinkRefused
from swarmd.transport.identity import Credentials
from swarmd.transport.token import JoinToken

Forge = Callable[[JoinToken], Credentials]
TRIES = 5

CERTIFICATES: list[tuple[Forge, str]] = [
    (forged.expired, "its certificate has expired; set the clocks of both machines"),
    (forged.not_yet_valid, "its certificate is not valid yet; set the clocks of both machines"),
    (forged.foreign, r"it belongs to another swarm \(its join token differs\)"),
    (
        forged.namesake,
        r"it belongs to another swarm|its certificate is not acceptable \(certificate signature failure\)",
    ),
    (forged.self_signed, r"it belongs to another swarm \(its join token differs\)"),
    (forged.by_a_member, r"it belongs to another swarm|is not acceptable \(invalid CA certificate\)"),
]
cases = pytest.mark.parametrize(("forge", "says"), CERTIFICATES, ids=lambda value: getattr(value, "__name__", ""))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@cases
async def test_it_knocks_and_is_refused(caplog, forge: Forge, says: str):
    token, inside = JoinToken.generate(), Recorder()
    async with endpoint(new_credentials(token), inside) as member, endpoint(forge(token), Recorder()) as stranger:
        port = await member.listen("127.0.0.1", 0)
        for _ in range(TRIES):
            with pytest.raises(LinkRefused):
                await stranger.dial("127.0.0.1", port, quiet=True)
        await eventually(lambda: member.handshakes == 0)
        assert inside.links == []
    [line] = warnings(caplog)
    assert line.startswith("refused a connection from 127.0.0.1 port")
    assert re.search(says, line), line


@cases
async def test_it_is_dialled_and_refused(caplog, forge: Forge, says: str):
    token, outside = JoinToken.generate(), Recorder()
    async with endpoint(forge(token), outside) as stranger, endpoint(new_credentials(token), Recorder()) as member:
        port = await stranger.listen("127.0.0.1", 0)
        for _ in range(TRIES):
            with pytest.raises(LinkRefused, match=says):
                await member.dial("127.0.0.1", port)
        assert outside.links == []
    assert len([line for line in warnings(caplog) if line.startswith("no link to")]) == 1


async def test_what_a_certificate_calls_itself_counts_for_nothing(caplog):
    token = JoinToken.generate()
    victim = new_credentials(token)
    poser = forged.in_the_name_of(token, victim.node_id)
    async with endpoint(poser, Recorder()) as there, endpoint(new_credentials(token), Recorder()) as here:
        port = await there.listen("127.0.0.1", 0)
        for _ in range(TRIES):
            with pytest.raises(LinkRefused, match=f"it is node {poser.node_id[:12]}, not {victim.node_id[:12]}"):
                await here.dial("127.0.0.1", port, expect=victim.node_id)
        link = await here.dial("127.0.0.1", port)
        assert link.peer_id == poser.node_id, "the id is the key's"
    assert len([line for line in warnings(caplog) if line.startswith("no link to")]) == 1


async def test_an_evicted_node_is_refused_wherever_it_comes_from(caplog):
    token, inside = JoinToken.generate(), Recorder()
    evicted = new_credentials(token)
    async with endpoint(new_credentials(token), inside) as member, endpoint(evicted, Recorder()) as outcast:
        member.refuse({evicted.node_id: "evicted from this swarm on a day"})
        port = await member.listen(None, 0)
        for host in ("127.0.0.1", "::1", "127.0.0.1"):
            with pytest.raises(LinkRefused, match="it refused: evicted from this swarm on a day"):
                await outcast.dial(host, port, quiet=True)
        await eventually(lambda: member.handshakes == 0)
        assert inside.links == []
    [line] = warnings(caplog)
    assert f"node {evicted.node_id[:12]} is evicted from this swarm on a day" in line
