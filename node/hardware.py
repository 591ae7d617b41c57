"""What this machine can carry: its devices, memory now, and speeds as measured once and then cached."""

from __future__ import annotations

import asyncio
import json
import logging
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from swarmd.discovery.records import DeviceRecord
from swarmd.node.devices import (
    AUTO,
    CPU,
    FoundDevice,
    MemoryCaps,
    choose,
    kind_of,
    memory_limits,
)
from swarmd.node.engine.cpu.bindings import NativeMissing
from swarmd.node.engine.cpu.bindings import load as load_library
from swarmd.node.version import VERSION
from swarmd.partition.units import format_bytes

log = logging.getLogger("swarmd.hardware")

PROBE_SECONDS = 60.0
# Free memory is told in steps, or every record would change with every breath of the machine.
FREE_STEP = 64 << 20


@dataclass(frozen=True)
class Speed:
    """Measured: memory bandwidth in bytes/s (reading), compute in FLOP/s (fp32 products). Zero: not measured yet."""

    memory_bandwidth: float = 0.0
    compute: float = 0.0


@dataclass(frozen=True)
class _Device:
    """A device that carries layers, and what models may take there in bytes."""

    found: FoundDevice
    limit: int
    speed: Speed = Speed()

    def record(self) -> DeviceRecord:
        free = psutil.virtual_memory().available if self.found.in_main_memory else self.found.memory_free
        return DeviceRecord(
            id=self.found.id,
            kind=kind_of(self.found.id),
            name=self.found.name[:128],
            memory_total=self.found.memory_total,
            memory_free=free // FREE_STEP * FREE_STEP,
            memory_limit=self.limit,
            memory_bandwidth=self.speed.memory_bandwidth,
            compute=self.speed.compute,
        )


class Hardware:
    """The devices of this machine that carry layers, with the memory that models may take on each."""

    def __init__(self, *, memory: MemoryCaps, threads: int | None, kernels: str) -> None:
        """`memory` are the user's caps; where there is none it is a share of what is free when the devices are found.

        `kernels` is what is to compute on the CPU: "auto", "native" or "torch". Plain torch and MLX keep the KV cache
        in fp32, twice what a plan counts, and MLX wider scales: so that no plan takes too much, half is offered there.
        """
        self.threads = threads or psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
        self._caps = memory
        self._plain_torch = kernels == "torch" or not _kernels_built()
        self._devices: dict[str, _Device] = {}
        self.missing: dict[str, str] = {}
        """Of the kinds of devices that were looked for and are not there or not usable: why, and what to do."""

    @property
    def devices(self) -> tuple[DeviceRecord, ...]:
        """The devices as they are now; none before they were looked for."""
        return tuple(device.record() for device in self._devices.values())

    @property
    def ids(self) -> tuple[str, ...]:
        """The devices' ids."""
        return tuple(self._devices)

    @property
    def limits(self) -> dict[str, int]:
        """Bytes that models may take on each device, by its id."""
        return {name: device.limit for name, device in self._devices.items()}

    async def find(self, wanted: Sequence[str]) -> None:
        """Look for the devices `wanted` (ids, or `auto`), in a process of its own if that may find any but the CPU.

        Raises DeviceError for what is not there, and for caps that do not fit what is.
        """
        found = [_processor()]
        kinds = kinds_worth_a_look(wanted)
        if kinds:
            others, self.missing = await _look(kinds)
            found += others
        chosen = choose(wanted, found, self.missing)
        for kind, reason in self.missing.items():
            log.info("no %s device is used: %s", kind, reason)
        limits = memory_limits(chosen, self._caps)
        for device in chosen:
            if kind_of(device.id) in ("metal", "mlx") or (device.id == CPU and self._plain_torch):
                limits[device.id] //= 2
        self._devices = {device.id: _Device(device, limits[device.id]) for device in chosen}
        told = (f"{device.id} ({device.name}), {format_bytes(limits[device.id])} for models" for device in chosen)
        log.info("devices: %s", "; ".join(told))

    def take(self, count: int, what: str) -> None:
        """Keep `count` bytes of the main memory for `what`. Raises MemoryError, in plain words, when there is less."""
        there = (device for device in self._devices.values() if device.found.in_main_memory)
        device = self._devices.get(CPU) or next(there, None)
        free = device.limit if device is not None else psutil.virtual_memory().available
        if count > free:
            raise MemoryError(
                f"{what} needs {format_bytes(count)}; models may take {format_bytes(free)} here (--memory)"
            )
        if device is not None:
            self._devices[device.found.id] = replace(device, limit=free - count)

    async def calibrate(self, data_dir: Path) -> None:
        """Fill in the speeds: from the cache, or by measuring for some seconds in processes of their own.

        A failed measurement is logged and leaves the speed unknown.
        """
        cache = data_dir / "calibration.json"
        known = _read_cache(cache)
        for device in list(self._devices.values()):
            key = self._calibration_key(device.found)
            if key not in known:
                log.info("measuring memory bandwidth and compute of %s", device.found.id)
                speed = await _measure(device.found.id, self.threads)
                if speed is None:
                    continue
                known[key] = speed
                _keep_cache(cache, known)
            self._devices[device.found.id] = replace(self._devices[device.found.id], speed=known[key])

    def _calibration_key(self, device: FoundDevice) -> str:
        """What a measurement holds for; equal devices are measured once."""
        place = f"{self.threads} threads" if device.id == CPU else kind_of(device.id)
        return f"{VERSION} {device.name} {place}"


def kinds_worth_a_look(wanted: Sequence[str]) -> list[str]:
    """Which kinds of devices to look for beside the CPU: those that are named, and for `auto` those that the machine
    shows signs of. Looking takes seconds, which a machine without any does not have to pay.
    """
    kinds = {kind_of(device) for device in wanted} - {AUTO, CPU}
    if AUTO in wanted:
        if Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None:
            kinds.add("cuda")
        if (sys.platform, platform.machine()) == ("darwin", "arm64"):
            kinds.add("metal")
    return sorted(kinds)


def processor_name() -> str:
    """The processor's name, as people know it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()[:128]
    except OSError:
        pass
    return (platform.processor() or platform.machine() or "CPU")[:128]


def _processor() -> FoundDevice:
    memory = psutil.virtual_memory()
    return FoundDevice(CPU, processor_name(), int(memory.total), int(memory.available))


def _kernels_built() -> bool:
    try:
        load_library()
    except NativeMissing:
        return False
    return True


def _read_cache(path: Path) -> dict[str, Speed]:
    try:
        content = json.loads(path.read_text())["speeds"]
        return {key: Speed(float(s["memory_bandwidth"]), float(s["compute"])) for key, s in content.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _keep_cache(path: Path, known: dict[str, Speed]) -> None:
    speeds = {key: {"memory_bandwidth": s.memory_bandwidth, "compute": s.compute} for key, s in known.items()}
    try:
        path.write_text(json.dumps({"speeds": speeds}))
    except OSError as error:
        log.warning("the measurement could not be kept: %s", error)


async def _look(kinds: list[str]) -> tuple[list[FoundDevice], dict[str, str]]:
    """The devices of these kinds, and why there are none of a kind."""
    try:
        content = await _run("swarmd.node.engine.devices", *kinds)
        found = [FoundDevice(d["id"], d["name"], d["memory_total"], d["memory_free"]) for d in content["devices"]]
        return found, dict(content["missing"])
    except (TimeoutError, OSError, ValueError, KeyError, TypeError) as error:
        return [], dict.fromkeys(kinds, f"looking for it failed: {error}")


async def _measure(device: str, threads: int) -> Speed | None:
    try:
        if device == CPU:
            content = await _run("swarmd.node.engine.calibrate", "--threads", str(threads))
        else:
            content = (await _run("swarmd.node.engine.devices", "--measure", device))[device]
        return Speed(float(content["memory_bandwidth"]), float(content["compute"]))
    except (TimeoutError, OSError, ValueError, KeyError, TypeError) as error:
        log.warning("the measurement of %s failed, its speed stays unknown: %s", device, error)
        return None


async def _run(module: str, *arguments: str) -> Any:
    """The JSON that a module prints, run as a process of its own for a minute at most.

    Raises ValueError with its last words, TimeoutError.
    """
    process = await asyncio.create_subprocess_exec(
        # -P: a folder named swarmd in the working directory is not this program.
        *(sys.executable, "-P", "-m", module, *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(PROBE_SECONDS):
            out, said = await process.communicate()
    except TimeoutError:
        raise TimeoutError(f"it took more than {PROBE_SECONDS:.0f} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    try:
        return json.loads(out)
    except ValueError:
        raise ValueError(said.decode(errors="replace").strip()[-300:] or f"exit status {process.returncode}") from None
