"""A long line between a machine and its switch: every Ethernet frame arrives later than it was sent, and in order.

Run as a process, `python long_line.py PLUG SOCKET DELAY_MS`: PLUG is the outer end of a machine's veth, taken off the
bridge; SOCKET a TAP device on the bridge in its place. It says "ready" and carries frames, multicast too, until killed.
`tc netem` would do the same where the kernel has it.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator

# From linux/if_tun.h. Both ends carry virtio's header, so that checksums and segments may be left to do.
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
IFF_TUN, IFF_TAP = 0x0001, 0x0002
_IFF_NO_PI, _IFF_VNET_HDR = 0x1000, 0x4000
_OFFLOAD_CHECKSUM_AND_TSO = 0x01 | 0x02 | 0x04
# From linux/if_packet.h and linux/if_ether.h.
_SOL_PACKET, _PACKET_VNET_HDR, _PACKET_OUTGOING, _ETH_P_ALL = 263, 15, 4, 0x0003
VNET_HEADER = 10
_FRAME_MAX = VNET_HEADER + 14 + 65536
_BURST = 64
_PR_SET_TIMERSLACK = 29


def open_device(name: str, kind: int) -> int:
    """A device made anew, which is gone when it is closed: IFF_TUN for IP packets, IFF_TAP for Ethernet frames."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", name.encode(), kind | _IFF_NO_PI | _IFF_VNET_HDR))
    fcntl.ioctl(device, _TUNSETOFFLOAD, _OFFLOAD_CHECKSUM_AND_TSO)
    return device


def open_plug(name: str) -> socket.socket:
    """All frames that come out of the veth, and what is put into it."""
    plug = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    plug.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    plug.bind((name, _ETH_P_ALL))
    plug.setblocking(False)
    return plug


def from_plug(plug: socket.socket) -> Iterator[bytes]:
    """What the machine has sent."""
    for _ in range(_BURST):
        try:
            frame, address = plug.recvfrom(_FRAME_MAX)
        except BlockingIOError:
            return
        if address[2] != _PACKET_OUTGOING:  # what this process has put in comes back, too
            yield frame


def from_device(device: int) -> Iterator[bytes]:
    """What has come out of a device, each behind virtio's header; not all at once, others are to have their turn."""
    for _ in range(_BURST):
        try:
            yield os.read(device, _FRAME_MAX)
        except BlockingIOError:
            return


def carry(plug: socket.socket, device: int, delay: float) -> None:
    """Carry frames both ways, each `delay` seconds late; never returns."""
    puts: tuple[Callable[[bytes], int], ...] = (lambda frame: os.write(device, frame), plug.send)
    under_way: deque[tuple[float, Callable[[bytes], int], bytes]] = deque()
    while True:
        while under_way and under_way[0][0] <= time.monotonic():
            _, put, frame = under_way.popleft()
            try:
                put(frame)
            except OSError as error:  # a queue is full, or a device goes down: a network loses such frames
                print(f"lost a frame of {len(frame)} bytes: {error}", file=sys.stderr)
        wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        for ready in select.select([plug, device], [], [], wait)[0]:
            put, frames = (puts[0], from_plug(plug)) if ready is plug else (puts[1], from_device(device))
            under_way += [(time.monotonic() + delay, put, frame) for frame in frames]


def main() -> None:
    """See above."""
    plug, device, delay_ms = sys.argv[1:]
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
    ends = open_plug(plug), open_device(device, IFF_TAP)
    print("ready", flush=True)
    carry(*ends, float(delay_ms) / 1000)


if __name__ == "__main__":
    main()
