"""Make processes of one machine as strong as machines: which cores they may run on, and how much of them."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
# Short, so that a process that has used its share stands still for milliseconds, not for tens of them.
PERIOD_MICROSECONDS = 10_000


@contextmanager
def on_cores(cores: Sequence[int]) -> Iterator[None]:
    """Processes and threads started inside run on these cores only, for as long as they live; none: anywhere.

    This thread is moved for the time being. Does nothing where the system cannot pin (macOS).
    """
    if not cores or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class CpuQuota:
    """A control group whose processes together get `share` of one core's time (0.4: 40 %). Needs root on Linux.

    Works with cgroups of version 1 and 2. Deleted on leaving, when its processes must have ended.
    """

    def __init__(self, share: float) -> None:
        if not 0.01 <= share <= 64:
            raise ValueError(f"a share of a core is between 0.01 and 64, not {share}")
        self.share = share
        name = f"swarmd-bench-{secrets.token_hex(3)}"
        self._v1 = (_CGROUPS / "cpu").is_dir()
        self._folder = (_CGROUPS / "cpu" if self._v1 else _CGROUPS) / name

    def __enter__(self) -> CpuQuota:
        quota = round(self.share * PERIOD_MICROSECONDS)
        self._folder.mkdir()
        try:
            if self._v1:
                (self._folder / "cpu.cfs_period_us").write_text(str(PERIOD_MICROSECONDS))
                (self._folder / "cpu.cfs_quota_us").write_text(str(quota))
            else:
                (self._folder / "cpu.max").write_text(f"{quota} {PERIOD_MICROSECONDS}")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.rmdir()

    def add(self, pid: int) -> None:
        """Put a process in; what it starts from then on is in it as well."""
        (self._folder / "cgroup.procs").write_text(str(pid))


def why_no_quota() -> str | None:
    """Why CPU quotas cannot be used here, or None."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "CPU quotas need root"
    try:
        with CpuQuota(0.5):
            return None
    except OSError as error:
        return f"CPU quotas do not work here: {error}"
