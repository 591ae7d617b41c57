"""Peers as people write them."""

import pytest

from swarmd.discovery.peers import PeerAddress, parse_peer, resolve


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("nas", "nas", 7000),
        ("nas.local:8000", "nas.local", 8000),
        (" 192.0.2.1 ", "192.0.2.1", 7000),
        ("192.0.2.1:1", "192.0.2.1", 1),
        ("[::1]:65535", "::1", 65535),
        ("[fd00::2]", "fd00::2", 7000),
        ("fd00::2", "fd00::2", 7000),
        ("[fe80::1%eth0]:9", "fe80::1%eth0", 9),
    ],
)
def test_accepted_forms(text, host, port):
    peer = parse_peer(text, 7000)
    assert peer == PeerAddress(host, port)
    assert parse_peer(str(peer), 1) == peer


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no usable host"),
        (":7000", "no usable host"),
        ("-nas", "no usable host"),
        ("http://nas:7000", "port must be a number"),
        ("nas:0", "from 1 to 65535"),
        ("nas:65536", "from 1 to 65535"),
        ("nas:", "port must be"),
        ("nas:७", "port must be"),
        ("[nas]:7000", "not an IPv6 address"),
        ("[::1]7000", "no usable host"),
        ("a b", "no usable host"),
        ("x" * 300, "no usable host"),
    ],
)
def test_refused_forms_say_how_it_is_written(text, says):
    with pytest.raises(ValueError, match=says):
        parse_peer(text, 7000)


async def test_resolving():
    assert await resolve(PeerAddress("127.0.0.1", 7)) == [("127.0.0.1", 7)]
    assert ("127.0.0.1", 7) in await resolve(PeerAddress("localhost", 7))
    with pytest.raises(OSError, match=r"no-such-host\.invalid cannot be resolved"):
        await resolve(PeerAddress("no-such-host.invalid", 7))
