"""What this machine can carry: memory now, and speed as measured once by a calibration and then cached."""

from __future__ import annotations

import asyncio
import json
import logging
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from swarmd.discovery.records import DeviceRecord
from swarmd.node.engine.cpu.bindings import NativeMissing
from swarmd.node.engine.cpu.bindings import load as load_library
from swarmd.node.version import VERSION
from swarmd.partition.units import format_bytes

log = logging.getLogger("swarmd.hardware")

FREE_SHARE = 0.8
CALIBRATION_SECONDS = 60.0
# Free memory is told in steps, or every record would change with every breath of the machine.
FREE_STEP = 64 << 20


@dataclass(frozen=True)
class Speed:
    """Measured: memory bandwidth in bytes/s (reading), compute in FLOP/s (fp32 products). Zero: not measured yet."""

    memory_bandwidth: float = 0.0
    compute: float = 0.0


class Hardware:
    """The CPU of this machine as a device of the swarm, with the memory that models may take."""

    def __init__(self, *, memory: int | None, threads: int | None, kernels: str) -> None:
        """`memory` is the user's cap in bytes; without one it is a share of what is free now.

        `kernels` is what is to compute: "auto", "native" or "torch". Plain torch keeps the KV cache in fp32, twice what
        a plan counts: so that no plan takes too much, such a node offers half of its memory.
        """
        found = psutil.virtual_memory()
        self.threads = threads or psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
        self.memory_limit = memory if memory is not None else int(found.available * FREE_SHARE)
        if kernels == "torch" or not _kernels_built():
            self.memory_limit //= 2
        self.speed = Speed()
        self._taken = 0

    def take(self, count: int, what: str) -> None:
        """Keep `count` bytes of the memory for `what`. Raises MemoryError, in plain words, when there is less."""
        free = self.memory_limit - self._taken
        if count > free:
            raise MemoryError(
                f"{what} needs {format_bytes(count)}; models may take {format_bytes(free)} here (--memory)"
            )
        self._taken += count

    def device(self) -> DeviceRecord:
        """The CPU as it is now."""
        memory = psutil.virtual_memory()
        return DeviceRecord(
            kind="cpu",
            name=processor_name(),
            memory_total=memory.total,
            memory_free=memory.available // FREE_STEP * FREE_STEP,
            memory_limit=self.memory_limit - self._taken,
            memory_bandwidth=self.speed.memory_bandwidth,
            compute=self.speed.compute,
        )

    async def calibrate(self, data_dir: Path) -> None:
        """Fill in `speed`: from the cache, or by measuring for a second or two in a process of its own.

        A failed measurement is logged and leaves the speed unknown.
        """
        cache = data_dir / "calibration.json"
        key = f"{VERSION} {processor_name()} {self.threads} threads"
        speed = _read_cache(cache, key)
        if speed is None:
            log.info("measuring this machine's memory bandwidth and compute")
            speed = await _measure(self.threads)
            if speed is None:
                return
            content = {"key": key, "memory_bandwidth": speed.memory_bandwidth, "compute": speed.compute}
            try:
                cache.write_text(json.dumps(content))
            except OSError as error:
                log.warning("the measurement could not be kept: %s", error)
        self.speed = speed


def _kernels_built() -> bool:
    try:
        load_library()
    except NativeMissing:
        return False
    return True


def processor_name() -> str:
    """The processor's name, as people know it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()[:128]
    except OSError:
        pass
    return (platform.processor() or platform.machine() or "CPU")[:128]


def _read_cache(path: Path, key: str) -> Speed | None:
    try:
        content = json.loads(path.read_text())
        if content["key"] == key:
            return Speed(float(content["memory_bandwidth"]), float(content["compute"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


async def _measure(threads: int) -> Speed | None:
    process = await asyncio.create_subprocess_exec(
        # -P: a folder named swarmd in the working directory is not this program.
        *(sys.executable, "-P", "-m", "swarmd.node.engine.calibrate", "--threads", str(threads)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    said = b""
    try:
        async with asyncio.timeout(CALIBRATION_SECONDS):
            out, said = await process.communicate()
        content = json.loads(out)
        return Speed(float(content["memory_bandwidth"]), float(content["compute"]))
    except (TimeoutError, ValueError, KeyError, TypeError) as error:
        reason = said.decode(errors="replace").strip()[-300:] or f"{type(error).__name__}: {error}"
        log.warning("the measurement failed, speeds stay unknown: %s", reason)
        return None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
