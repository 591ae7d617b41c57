"""What a listener on the network sees: packets of a bridge, TCP streams put together again, and what they give away."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

_ETH_P_ALL = 3
_SOL_PACKET = 263
_PACKET_ADD_MEMBERSHIP, _PACKET_STATISTICS = 1, 6
_PACKET_MR_PROMISC = 1
_SO_RCVBUFFORCE = 33
_BUFFER_BYTES = 64 << 20
# Segmentation is left to the (virtual) network card, so that one packet may be this large.
_MOST_PACKET_BYTES = 1 << 17
_TCP = 6
_APPLICATION_DATA = 23
# Change cipher spec, alert, handshake, application data: RFC 8446, section 5.1.
_TLS_TYPES = {20, 21, 22, _APPLICATION_DATA}
_NEEDLE_BYTES = 8


@dataclass(frozen=True)
class Flow:
    """One direction of a TCP connection: the payload, in order, from the first packet seen on."""

    source: tuple[str, int]
    target: tuple[str, int]
    data: bytes

    def application_data(self) -> list[bytes]:
        """The bodies of the TLS records that carry application data; AssertionError for anything that is not TLS."""
        bodies, at = [], 0
        while at + 5 <= len(self.data):
            kind, version, size = struct.unpack_from(">BHH", self.data, at)
            assert kind in _TLS_TYPES, f"{self.source} to {self.target} is not TLS at byte {at}"
            assert version in (0x0301, 0x0303)
            if kind == _APPLICATION_DATA:
                bodies.append(self.data[at + 5 : at + 5 + size])
            at += 5 + size
        return bodies


class Capture:
    """Listens on a network interface of this namespace from entering to leaving; needs root."""

    def __init__(self, interface: str) -> None:
        self.packets: list[bytes] = []
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
        self._socket.bind((interface, 0))
        # A bridge shows what it forwards between its ports only to who listens to everything.
        wish = struct.pack("iHH8s", socket.if_nametoindex(interface), _PACKET_MR_PROMISC, 0, b"")
        self._socket.setsockopt(_SOL_PACKET, _PACKET_ADD_MEMBERSHIP, wish)
        self._socket.settimeout(0.2)
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Capture:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leaving.set()
        self._thread.join()
        dropped = struct.unpack("II", self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))[1]
        self._socket.close()
        assert not dropped, f"{dropped} packets were not captured"

    def flows(self) -> list[Flow]:
        """All TCP connections, each direction for itself."""
        segments: dict[tuple[tuple[str, int], tuple[str, int]], list[tuple[int, bytes]]] = {}
        for packet in self.packets:
            if (parsed := _parse_tcp(packet)) is not None:
                source, target, sequence, payload = parsed
                segments.setdefault((source, target), []).append((sequence, payload))
        return [Flow(source, target, _assemble(parts)) for (source, target), parts in segments.items()]

    def _run(self) -> None:
        """Until told to leave, and then what is there already: a swarm is never silent for long."""
        while not self._leaving.is_set():
            with contextlib.suppress(TimeoutError):
                self.packets.append(self._socket.recv(_MOST_PACKET_BYTES))
        self._socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                self.packets.append(self._socket.recv(_MOST_PACKET_BYTES))


def needles(texts: Sequence[str], token_ids: Sequence[Sequence[int]]) -> set[bytes]:
    """Pieces of texts and of lists of tokens, in every form in which a program would send them."""
    found = set()
    for text in texts:
        data = text.encode()
        found |= {data[at : at + _NEEDLE_BYTES] for at in range(len(data) - _NEEDLE_BYTES + 1)}
    for ids in token_ids:
        for at in range(len(ids) - 3):
            run = ids[at : at + 4]
            packed = b"".join(msgspec.msgpack.encode(token) for token in run)
            found |= {packed, struct.pack("<4I", *run), struct.pack(">4I", *run), struct.pack("<4Q", *run)}
    return {needle for needle in found if len(needle) >= _NEEDLE_BYTES}


def leaks(haystack: bytes, wanted: set[bytes]) -> list[bytes]:
    """Which of the needles are there."""
    return [needle for needle in wanted if needle in haystack]


def repeated_blocks(data: bytes) -> int:
    """How many sequences of eight bytes, at any place, occur more than once. In ciphertext below gigabytes: none."""
    windows = np.lib.stride_tricks.sliding_window_view(np.frombuffer(data, np.uint8), 8)
    values = np.sort(np.ascontiguousarray(windows).view(np.uint64).ravel())
    return int(np.count_nonzero(values[1:] == values[:-1]))


def chi_square(data: bytes) -> float:
    """Pearson's statistic of the byte values against equal frequencies: 255 degrees of freedom, so 255 ± 23."""
    counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
    expected = len(data) / 256
    return float(((counts - expected) ** 2 / expected).sum())


def _parse_tcp(packet: bytes) -> tuple[tuple[str, int], tuple[str, int], int, bytes] | None:
    """(source, target, sequence number, payload) of a TCP segment with payload over IPv4 or IPv6, else None."""
    kind = int.from_bytes(packet[12:14])
    if kind == 0x0800 and packet[23] == _TCP:
        start, end = 14 + (packet[14] & 15) * 4, 14 + int.from_bytes(packet[16:18])
        hosts = [socket.inet_ntop(socket.AF_INET, packet[at : at + 4]) for at in (26, 30)]
    elif kind == 0x86DD and packet[20] == _TCP:
        start, end = 54, 54 + int.from_bytes(packet[18:20])
        hosts = [socket.inet_ntop(socket.AF_INET6, packet[at : at + 16]) for at in (22, 38)]
    else:
        return None
    from_port, to_port, sequence = struct.unpack_from(">HHI", packet, start)
    payload = packet[start + (packet[start + 12] >> 4) * 4 : end]
    return ((hosts[0], from_port), (hosts[1], to_port), sequence, payload) if payload else None


def _assemble(segments: list[tuple[int, bytes]]) -> bytes:
    """The bytes in order; sequence numbers wrap around, and a segment may have been sent twice."""
    first = segments[0][0]
    data = bytearray()
    for offset, payload in sorted(((sequence - first + 2**31) % 2**32 - 2**31, part) for sequence, part in segments):
        assert offset <= len(data), "a segment is missing in the capture"
        data += payload[len(data) - offset :]
    return bytes(data)
