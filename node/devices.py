"""The devices of a node: their names, which of them carry layers, and how much memory models may take on each. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from swarmd.partition.units import format_bytes, parse_bytes

AUTO, CPU, METAL, MLX_CPU = "auto", "cpu", "metal", "mlx-cpu"
FREE_SHARE = 0.8
MAX_DEVICES = 64

_ID = re.compile(r"cpu|metal|mlx-cpu|cuda:(?:0|[1-9]\d?)")
_IN_MAIN_MEMORY = frozenset({CPU, METAL, MLX_CPU})
_KINDS = {CPU: "cpu", METAL: "metal", MLX_CPU: "mlx"}


class DeviceError(ValueError):
    """A wish about devices that cannot be had; the message says what there is and what to do."""


@dataclass(frozen=True)
class FoundDevice:
    """A device that is there and usable; memory in bytes, as it was when it was looked for."""

    id: str
    name: str
    memory_total: int
    memory_free: int

    @property
    def in_main_memory(self) -> bool:
        """Whether what it holds lies in the machine's main memory, which such devices share."""
        return self.id in _IN_MAIN_MEMORY


@dataclass(frozen=True)
class MemoryCaps:
    """The most memory that models may take, in bytes: in `main` memory over all devices there, and on single ones."""

    main: int | None = None
    by_device: Mapping[str, int] = field(default_factory=dict[str, int])


def kind_of(device: str) -> str:
    """What computes on the device of this id: "cpu", "cuda", "metal" or "mlx"."""
    return _KINDS.get(device) or device.partition(":")[0]


def parse_devices(texts: Iterable[str]) -> tuple[str, ...]:
    """`cpu,cuda:0` -> ids without doubles, in the order given; `auto` may be among them. Raises DeviceError."""
    words = [word for text in texts for word in text.replace(",", " ").lower().split()]
    for word in words:
        if word != AUTO and _ID.fullmatch(word) is None:
            raise DeviceError(f"{word!r} is no device; there are auto, cpu, cuda:0, cuda:1 and so on, metal, mlx-cpu")
    if not words:
        raise DeviceError("the name of a device is wanted: auto, cpu, cuda:0, metal or mlx-cpu")
    return tuple(dict.fromkeys(words))


def parse_memory(text: str) -> MemoryCaps:
    """`600MB`, `cuda:0=20GB,cpu=8GB` or `8GB,cuda:0=20GB` -> caps. Raises ValueError in words for people."""
    main, by_device = None, dict[str, int]()
    for part in text.split(","):
        name, equals, size = part.rpartition("=")
        name, count = name.strip().lower(), parse_bytes(size)
        if count <= 0:
            raise ValueError(f"{part.strip()!r} leaves no memory for models; write a size above zero")
        if not equals and main is None:
            main = count
        elif not equals or name in by_device:
            raise ValueError(f"{text!r} names the same memory twice")
        elif _ID.fullmatch(name) is None:
            raise ValueError(f"{name!r} is no device; write SIZE, or DEVICE=SIZE like cuda:0=20GB")
        else:
            by_device[name] = count
    return MemoryCaps(main, by_device)


def choose(wanted: Sequence[str], found: Sequence[FoundDevice], missing: Mapping[str, str]) -> tuple[FoundDevice, ...]:
    """The devices of `found` that are to carry layers, accelerators first.

    `auto` means every accelerator, and the CPU unless its memory is an accelerator's too (a Mac's): then it would only
    take from it. `missing` says, for kinds that are not among `found`, why not and what to do. Raises DeviceError for a
    device that is not there.
    """
    there = {device.id: device for device in found}
    ids = [device for device in wanted if device != AUTO]
    for device in ids:
        if device not in there:
            reason = f": {missing[kind_of(device)]}" if kind_of(device) in missing else ""
            raise DeviceError(f"--device: there is no {device} here{reason}; this machine has {', '.join(there)}")
    if AUTO in wanted:
        accelerators = [device for device in there if kind_of(device) in ("cuda", "metal")]
        ids += [*accelerators, *([] if METAL in accelerators else [CPU])]
    return tuple(device for device in sorted(found, key=lambda d: d.id == CPU) if device.id in ids)


def memory_limits(devices: Sequence[FoundDevice], caps: MemoryCaps) -> dict[str, int]:
    """Bytes that models may take on each device: its cap, or 80 % of what is free there.

    Devices in main memory have one amount together, `caps.main` or 80 % of what is free: those without a cap of their
    own share evenly what the caps of the others leave. Raises DeviceError for a cap that says nothing about this node.
    """
    ids = [device.id for device in devices]
    for name in caps.by_device:
        if name not in ids:
            raise DeviceError(f"--memory: {name} carries no layers here (see --device), only {', '.join(ids)}")
    shared = [device for device in devices if device.in_main_memory]
    if caps.main is not None and not shared:
        raise DeviceError(
            f"--memory: main memory carries no layers here (see --device); write DEVICE=SIZE, like {ids[0]}=20GB"
        )
    pool = caps.main
    if pool is None:
        pool = int(min((device.memory_free for device in shared), default=0) * FREE_SHARE)
    open_ended = [device.id for device in shared if device.id not in caps.by_device]
    left = max(0, pool - sum(caps.by_device.get(device.id, 0) for device in shared))
    limits = dict[str, int]()
    for device in devices:
        limit = caps.by_device.get(device.id)
        if limit is not None and device.id != CPU and limit > device.memory_total:
            has = format_bytes(device.memory_total)
            raise DeviceError(f"--memory: {device.id} has {has}, less than {format_bytes(limit)}")
        if limit is None:
            limit = left // len(open_ended) if device.in_main_memory else int(device.memory_free * FREE_SHARE)
            limit = limit if device.id == CPU else min(limit, device.memory_total)
        limits[device.id] = limit
    return limits
