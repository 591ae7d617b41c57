"""Who is let in, who is not, and that both sides say why in one line."""

import asyncio
import contextlib
import errno
import logging
import socket
import ssl

import psutil
import pytest
from support.link_fakes import Note, Recorder, endpoint, eventually, new_credentials, two_nodes

from swarmd.transport import authority, listener
from swarmd.transport.endpoint import LinkRefused
from swarmd.transport.tls import client_context
from swarmd.transport.token import JoinToken


def lines(caplog, start: str) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith(start)]


async def test_another_token_gets_no_further_than_the_handshake_and_both_logs_say_why(caplog):
    inside, outside = Recorder(), Recorder()
    async with (
        endpoint(new_credentials(JoinToken.generate()), inside) as member,
        endpoint(new_credentials(JoinToken.generate()), outside) as stranger,
    ):
        port = await member.listen("127.0.0.1", 0)
        with pytest.raises(LinkRefused, match="it belongs to another swarm"):
            await stranger.dial("127.0.0.1", port)
        await until_refused(caplog, 1)
        assert inside.links == outside.links == []
    (dialled,) = lines(caplog, "no link to 127.0.0.1")
    (accepted,) = lines(caplog, "refused a connection from 127.0.0.1")
    assert "it belongs to another swarm (its join token differs)" in dialled
    assert "it says that this node belongs to another swarm (the join tokens differ)" in accepted


async def until_refused(caplog, count: int) -> None:
    await eventually(lambda: len(lines(caplog, "refused a connection")) >= count)


async def test_a_certificate_not_yet_valid_is_a_matter_of_clocks(caplog, monkeypatch):
    import datetime as dt

    token = JoinToken.generate()
    real = authority.issue_leaf
    ahead = dt.datetime.now(dt.UTC) + dt.timedelta(days=400)
    with monkeypatch.context() as patch:
        patch.setattr(authority, "issue_leaf", lambda key, token, now: real(key, token, ahead))
        from_the_future = new_credentials(token)
    async with (
        endpoint(new_credentials(token), Recorder()) as here,
        endpoint(from_the_future, Recorder()) as there,
    ):
        with pytest.raises(LinkRefused, match="set the clocks"):
            await there.dial("127.0.0.1", await here.listen("127.0.0.1", 0))
        with pytest.raises(LinkRefused, match="not valid yet; set the clocks"):
            await here.dial("127.0.0.1", await there.listen("127.0.0.1", 0))
        await until_refused(caplog, 2)
    assert all("set the clocks" in line for line in lines(caplog, "refused"))


async def test_other_protocol_versions_are_named_on_both_sides(caplog):
    token = JoinToken.generate()
    async with (
        endpoint(new_credentials(token), Recorder(), "old") as old,
        endpoint(new_credentials(token), Recorder(), "new", protocol=2) as new,
    ):
        with pytest.raises(LinkRefused, match=r"new speaks version 2 .* and old version 1"):
            await new.dial("127.0.0.1", await old.listen("127.0.0.1", 0))
        await until_refused(caplog, 1)
    assert "old speaks version 1 (swarmd 0.1.0) and new version 2" in lines(caplog, "refused")[0]


async def test_the_expected_node_must_be_the_one_that_answers(caplog):
    async with two_nodes() as pair:
        with pytest.raises(LinkRefused, match=f"it is node {pair.far.node_id[:12]}, not eeee"):
            await pair.near.dial("127.0.0.1", pair.port, expect="e" * 64)
        await until_refused(caplog, 1)
        assert "it looks for node eeeeeeeeeeee here" in lines(caplog, "refused")[0]
        assert pair.far_side.links == []


async def test_a_process_notices_that_it_dialled_itself():
    async with two_nodes() as pair:
        with pytest.raises(LinkRefused, match="this process itself"):
            await pair.far.dial("127.0.0.1", pair.port)


async def test_two_processes_of_one_node_may_be_linked():
    # A daemon and its stages share the node's key.
    credentials = new_credentials(JoinToken.generate())
    async with (
        endpoint(credentials, Recorder(), "daemon") as daemon,
        endpoint(credentials, Recorder(), "stage") as stage,
    ):
        link = await stage.dial("127.0.0.1", await daemon.listen("127.0.0.1", 0), expect=daemon.node_id)
        assert link.peer_id == stage.node_id


async def test_where_nobody_listens_or_answers():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        async with two_nodes() as pair:
            with pytest.raises(LinkRefused, match="nothing listens there"):
                await pair.near.dial("127.0.0.1", free.getsockname()[1])
            free.listen()
            with pytest.raises(LinkRefused, match=r"did not answer within 0\.2 s"):
                await pair.near.dial("127.0.0.1", free.getsockname()[1], timeout=0.2)
            with pytest.raises(LinkRefused, match="cannot be resolved"):
                await pair.near.dial("no-such-host.invalid", 1)


async def test_all_interfaces_means_both_families():
    async with two_nodes() as pair:
        port = await pair.far.listen(None, 0)
        addresses = ["127.0.0.1"]
        if socket.has_ipv6 and any(i[4][0] == "::1" for i in socket.getaddrinfo("::1", 1)):
            addresses.append("::1")
        for address in addresses:
            link = await pair.near.dial(address, port, expect=pair.far.node_id)
            assert link.remote_address == (address, port)


async def test_a_port_in_use_is_said_with_the_remedy():
    async with two_nodes() as pair:
        with pytest.raises(OSError, match=r"port \d+ is already in use; choose another with --port") as caught:
            await pair.near.listen("127.0.0.1", pair.port)
        assert caught.value.errno == errno.EADDRINUSE
        with pytest.raises(OSError, match=r"not an address of this machine"):
            await pair.near.listen("192.0.2.99", 0)


async def raw(port: int, data: bytes) -> bytes:
    """Send bytes in plain TCP and read until the node closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    received = b""
    try:
        await writer.drain()
        async with asyncio.timeout(10):
            received = await reader.read()
    except ConnectionError:
        pass  # a reset is a refusal too
    writer.close()
    return received


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "plain HTTP request"),
        (b"\x80\x00\x00\x00\x00\x00\x00\x00", "does not speak TLS"),
        (b"hello, is anybody there?\r\n", "does not speak TLS"),
        (bytes(range(256)) * 40, "does not speak TLS"),
        (b"\x16\x03\x01\xff\xff" + b"\x01" * 70_000, "does not speak TLS"),
        (b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00", "handshake"),
    ],
)
async def test_other_programs_are_refused_with_one_line(data, says, caplog):
    async with two_nodes(handshake_seconds=1) as pair:
        await raw(pair.port, data)
        await until_refused(caplog, 1)
        near, _ = await pair.dial()
        assert (await near.request(Note("plain")))[0] == Note("plain")
    refusals = lines(caplog, "refused a connection")
    assert len(refusals) == 1
    assert says in refusals[0] or "TLS" in refusals[0]


async def test_silence_and_half_a_hello_end_with_the_time_limit(caplog):
    token = JoinToken.generate()
    async with endpoint(new_credentials(token), Recorder(), handshake_seconds=0.3) as node:
        port = await node.listen("127.0.0.1", 0)
        assert await raw(port, b"") == b""
        # A member's certificate, and then half a frame.
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", port, ssl=client_context(new_credentials(token)), server_hostname="x"
        )
        writer.write(b"\x00\x00\x00\x10\x00\x00\x00\x00half")
        async with asyncio.timeout(10):
            await reader.read()
        writer.close()
        await eventually(lambda: not node.handshakes)
    assert [line.split(": ", 1)[1] for line in lines(caplog, "refused")] == [
        "it did not finish the handshake within 0.3 s (silent, or not a swarmd node)"
    ]


@pytest.mark.parametrize(
    ("first", "says"),
    [
        (b"\x80\x00\x00\x00\x00\x00\x00\x00", "header of 2147483648 bytes; the limit is 4096"),
        (b"\x00\x00\x00\x04\x00\x00\x00\x01\x93\x00\x00\xc0", "payload of 1 bytes; the limit is 0"),
        (b"\x00\x00\x00\x04\x00\x00\x00\x00\x93\x01\x00\xc0", "not a hello"),
        (b"\x00\x00\x00\x04\x00\x00\x00\x00\x93\x00\x00\xc0", "a Hello is malformed"),
    ],
)
async def test_a_member_without_a_proper_hello_is_refused(first, says, caplog):
    token = JoinToken.generate()
    async with endpoint(new_credentials(token), Recorder()) as node:
        port = await node.listen("127.0.0.1", 0)
        _, writer = await asyncio.open_connection(
            "127.0.0.1", port, ssl=client_context(new_credentials(token)), server_hostname="x"
        )
        writer.write(first)
        await until_refused(caplog, 1)
        writer.close()
    assert says in lines(caplog, "refused")[0]


async def test_no_certificate_and_old_tls_are_refused(caplog):
    anonymous = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anonymous.check_hostname = False
    anonymous.verify_mode = ssl.CERT_NONE
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname = False
    old.verify_mode = ssl.CERT_NONE
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    async with two_nodes() as pair:
        # In TLS 1.3 the client's side is done before the server has looked at its certificate.
        reader, writer = await asyncio.open_connection("127.0.0.1", pair.port, ssl=anonymous)
        with contextlib.suppress(OSError):
            assert await reader.read() == b""
        writer.close()
        with pytest.raises(OSError):
            await asyncio.open_connection("127.0.0.1", pair.port, ssl=old)
        await until_refused(caplog, 2)
    first, second = lines(caplog, "refused")
    assert "showed no certificate" in first
    assert "older than 1.3" in second


async def test_hundreds_of_garbage_connections_leave_nothing_behind(caplog):
    async with two_nodes(handshake_seconds=5) as pair:
        before, descriptors = asyncio.all_tasks(), psutil.Process().num_fds()
        for _ in range(10):
            await asyncio.gather(*(raw(pair.port, b"\x80\x00\x00\x00" * 50) for _ in range(40)))
        await eventually(lambda: not pair.far.handshakes)
        assert asyncio.all_tasks() - before == set()
        assert psutil.Process().num_fds() <= descriptors
        assert pair.far.links == ()
        near, _ = await pair.dial()
        assert (await near.request(Note("plain")))[0] == Note("plain")
    assert len(lines(caplog, "refused")) <= 3


async def test_strangers_who_hold_connections_open_cannot_keep_a_member_out(caplog, monkeypatch):
    monkeypatch.setattr(listener, "MAX_HANDSHAKES", 8)
    caplog.set_level(logging.INFO)
    async with two_nodes(handshake_seconds=60) as pair:
        silent = [await asyncio.open_connection("127.0.0.1", pair.port) for _ in range(50)]
        near, _ = await pair.dial()
        assert (await near.request(Note("plain")))[0] == Note("plain")
        assert pair.far.handshakes <= 8
        for _, writer in silent:
            writer.close()
    assert any("too many unfinished handshakes" in line for line in lines(caplog, "refused"))


async def test_a_handler_that_cannot_take_the_link_ends_it(caplog):
    class Full(Recorder):
        async def on_link(self, link) -> None:
            raise RuntimeError("no room")

    async with two_nodes() as pair:
        pair.near._handler = Full()
        with pytest.raises(LinkRefused, match="could not take the link"):
            await pair.near.dial("127.0.0.1", pair.port)
        assert pair.near.links == ()
        assert "no room" in caplog.text


async def test_a_hello_that_cannot_be_shown_in_a_log_line_is_refused(caplog):
    credentials = new_credentials(JoinToken.generate())
    async with (
        endpoint(credentials, Recorder(), "plain") as node,
        endpoint(credentials, Recorder(), "evil\nnode") as evil,
    ):
        port = await node.listen("127.0.0.1", 0)
        with contextlib.suppress(LinkRefused):  # the dialling side may be up for a moment
            await evil.dial("127.0.0.1", port)
        await until_refused(caplog, 1)
    assert "cannot be printed" in lines(caplog, "refused")[0]


async def test_a_refused_node_is_cut_off_and_told_why_whoever_dials(caplog):
    async with two_nodes() as pair:
        near_link, far_link = await pair.dial()
        reason = "evicted from this swarm on a day"
        pair.far.refuse({pair.near.node_id: reason, pair.far.node_id: "never itself"})
        await near_link.wait_closed()
        await far_link.wait_closed()
        assert near_link.close_reason == f"the other side closed the link: {reason}"
        with pytest.raises(LinkRefused, match=f"it refused: {reason}") as caught:
            await pair.near.dial("127.0.0.1", pair.port)
        assert caught.value.evicted
        port = await pair.near.listen("127.0.0.1", 0)
        with pytest.raises(LinkRefused, match=f"node {pair.near.node_id[:12]} is {reason}") as caught:
            await pair.far.dial("127.0.0.1", port)
        assert caught.value.lasting
        assert not caught.value.evicted
        await until_refused(caplog, 2)
        pair.far.refuse({})
        await pair.dial()
