"""Let the thread that hands steps on run as soon as it wakes, also on a core that somebody computes on."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys

# Linux' number of sched_setattr, and its argument (SCHED_ATTR_SIZE_VER0): size, policy, flags, nice, priority, then
# runtime, deadline and period in nanoseconds. See sched_setattr(2).
_SYSCALL = {"x86_64": 314, "aarch64": 274}
_ATTRIBUTES = struct.Struct("=IIQiIQQQ")
SLICE_NS = 100_000
"""The least that Linux takes."""


def wake_promptly() -> bool:
    """Give the calling thread short time slices; whether the system took it.

    Linux from 6.12 on then lets it begin soon after it wakes, instead of when the slice of whoever runs is over (about
    3 ms); earlier ones accept the wish and do nothing. The thread's share of the processor stays what it was.
    """
    number = _SYSCALL.get(platform.machine())
    if sys.platform != "linux" or number is None or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return False
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    attributes = _ATTRIBUTES.pack(_ATTRIBUTES.size, os.SCHED_OTHER, 0, nice, 0, SLICE_NS, 0, 0)
    return ctypes.CDLL(None).syscall(number, 0, attributes, 0) == 0
