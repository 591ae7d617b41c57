"""Targets: what strangers announce by mDNS, and what people type."""

from __future__ import annotations

from random import Random
from typing import Any, cast

from fuzz.engine import Target
from fuzz.mutate import mutate
from zeroconf import BadTypeInNameException, Error
from zeroconf._cache import DNSCache
from zeroconf._dns import DNSAddress, DNSPointer, DNSService, DNSText
from zeroconf._protocol.incoming import DNSIncoming
from zeroconf._protocol.outgoing import DNSOutgoing
from zeroconf.asyncio import AsyncServiceInfo

from swarmd.discovery.dial_book import DIALS_PER_SECOND, MAX_ADDRESSES, MAX_NODES, DialBook
from swarmd.discovery.mdns import SERVICE_TYPE, Sighting, read_sighting
from swarmd.discovery.peers import parse_peer
from swarmd.transport.token import JoinToken

_IN, _UNIQUE, _RESPONSE = 1, 0x8000, 0x8400
_NAME = f"{'a' * 32}.{SERVICE_TYPE}"


class _Browser:
    """What `load_from_cache` needs of a Zeroconf: the records that arrived."""

    def __init__(self) -> None:
        self.cache = DNSCache()


class Mdns(Target):
    """Packets as they come from the network: records into the cache, a sighting out of it, addresses into the dial
    book. zeroconf's own parser is on the way; what the sighting and the book hold is checked."""

    name = "mdns"
    # Those that `MdnsDiscovery` catches.
    errors = (OSError, Error, BadTypeInNameException, ValueError)
    share = 1.5

    def __init__(self) -> None:
        self._book = DialBook("b" * 64)
        self._now = 0.0

    def seeds(self) -> list[bytes]:
        random = Random(2)
        return [packet(random, sound=True) for _ in range(4)] + [packet(random) for _ in range(40)]

    def make(self, random: Random, pool: list[bytes]) -> bytes:
        if random.random() < 0.4:
            return packet(random)
        return mutate(random, random.choice(pool), random.choice(pool))

    def run(self, data: bytes) -> str:
        message = DNSIncoming(data)
        if not message.valid:
            return "invalid"
        browser, records = _Browser(), message.answers()
        browser.cache.async_add_records(records)
        names = {r.alias for r in records if isinstance(r, DNSPointer)} | {
            r.name for r in records if isinstance(r, DNSService)
        }
        outcome = f"{min(len(records), 5)} records"
        for name in sorted(names)[:8]:
            info = AsyncServiceInfo(SERVICE_TYPE, name)
            if info.load_from_cache(cast(Any, browser)):
                sighting = read_sighting(info)
                self._check(sighting)
                outcome = f"sighting with {len(sighting.addresses)} addresses"
        return outcome

    def _check(self, sighting: Sighting) -> None:
        assert 0 < len(sighting.addresses) <= MAX_ADDRESSES
        assert all(0 < port < 65536 for _, port in sighting.addresses)
        assert len(sighting.node_id) == 64
        self._now += 0.01
        book = self._book
        book.note_sighting(sighting.node_id, sighting.addresses, self._now)
        assert len(book._nodes) <= MAX_NODES
        assert all(len(node.routes) <= MAX_ADDRESSES for node in book._nodes.values())
        for candidate in book.due(self._now):
            book.note_failed(candidate.address, self._now)
        assert book._allowance <= DIALS_PER_SECOND


def packet(random: Random, *, sound: bool = False) -> bytes:
    """An mDNS answer about a node; unless it is to be `sound`, with a slip here and there."""

    def slip(right: Any, *wrong: Any) -> Any:
        return right if sound or random.random() < 0.85 else random.choice(wrong)

    node = slip("".join(random.choice("ab") for _ in range(64)), "", "g" * 64, "a" * 63, "A" * 64, "a" * 64 + "\n")
    texts = {
        "v": slip("1", "", "x", "99999", "123456", "-1", "１", "1\n"),
        "id": node,
        "tag": slip("ab" * 8, "", "zz" * 8, "ab" * 9),
    }
    entries = [f"{key}={value}".encode() for key, value in texts.items()]
    if not sound:
        random.shuffle(entries)
        entries += random.choice(([], [b"v"], [b"=x"], [b"id=" + b"a" * 64], [b"", b""], [b"k=" + bytes(250)]))
    text = b"".join(bytes([len(entry) % 256]) + entry for entry in entries)
    host = slip("a.local.", "b.local.", ".", "x" * 63 + ".local.")
    port = slip(4711, 0, 65535, 1)
    out = DNSOutgoing(_RESPONSE)
    out.add_answer_at_time(DNSPointer(SERVICE_TYPE, 12, _IN, slip(4500, 0, 1), _NAME), 0)
    out.add_answer_at_time(DNSService(_NAME, 33, _IN | _UNIQUE, slip(120, 0), 0, 0, port, host), 0)
    out.add_answer_at_time(DNSText(_NAME, 16, _IN | _UNIQUE, 4500, slip(text, b"", text[:-3], b"\xff" + text)), 0)
    for _ in range(slip(1, 0, 3, 40)):
        size = random.choice((4, 4, 16))
        address = (
            random.choice((b"\x0a\0\0\1", b"\x7f\0\0\1", random.randbytes(4)))
            if size == 4
            else random.choice((b"\xfe\x80" + bytes(13) + b"\1", random.randbytes(16), bytes(15) + b"\1"))
        )
        out.add_answer_at_time(DNSAddress("a.local.", 1 if size == 4 else 28, _IN | _UNIQUE, 120, address), 0)
    return out.packets()[0]


class Typed(Target):
    """Peers and join tokens as people type them, or as a clipboard holds them."""

    name = "typed text"
    errors = (ValueError,)  # TokenError is one
    share = 1.5

    def seeds(self) -> list[bytes]:
        tokens = (str(JoinToken(bytes([number] * 20))) for number in range(3))
        peers = ("host", "host:1234", "[fe80::1%eth0]:80", "::1", "1.2.3.4:65535", "[::1]", "[a]:b:c")
        return [text.encode() for text in (*peers, *tokens)]

    def run(self, data: bytes) -> str:
        text = data.decode(errors="replace")
        try:
            peer = parse_peer(text, 4711)
            assert 0 < peer.port < 65536
            assert peer.host
            return "peer"
        except ValueError as error:
            assert len(str(error)) < 4 * len(text) + 300
        token = JoinToken.parse(text)
        assert JoinToken.parse(str(token)) == token
        return "token"
