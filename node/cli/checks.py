"""What `swarmd doctor` looks at on this machine. Each check returns findings: what is so, and what to do about it."""

from __future__ import annotations

import asyncio
import datetime as dt
import errno
import platform
import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from cryptography import x509

from swarmd.discovery.survey import multicast_troubles, nodes_in_sight
from swarmd.node.config import Settings
from swarmd.node.data_dir import DataDir
from swarmd.node.devices import CPU, DeviceError, MemoryCaps
from swarmd.node.hardware import Hardware, processor_name
from swarmd.node.options import DEFAULT_LINK_PORT, DEFAULT_LISTEN
from swarmd.partition.units import format_bytes
from swarmd.transport.identity import IdentityError, load_credentials

State = Literal["ok", "note", "problem"]

LEAST_MEMORY = 250_000_000
"""The default model with its KV cache."""
LEAST_DISK = 1_000_000_000
LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. A `note` is worth knowing, a `problem` needs somebody; `remedy` says what to do."""

    subject: str
    state: State
    said: str
    remedy: str = ""


def check_system() -> Iterator[Finding]:
    """The interpreter and the machine."""
    yield Finding("python", "ok", f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")


def check_devices(settings: Settings) -> Iterator[Finding]:
    """Which devices carry layers here, and what models may take on each, against what is there."""
    hardware = Hardware(memory=settings.memory, threads=settings.threads, kernels=settings.kernels)
    try:
        asyncio.run(hardware.find(settings.device))
    except DeviceError as error:
        yield Finding("devices", "problem", str(error), "name other devices, or other limits")
        return
    for kind, reason in hardware.missing.items():
        yield Finding(kind, "note", f"no {kind} device is used", reason)
    for device in hardware.devices:
        if device.kind != "cpu":
            free = f"{format_bytes(device.memory_free)} of {format_bytes(device.memory_total)} are free"
            said = f"{device.name}: models may take {format_bytes(device.memory_limit)}; {free}"
            yield Finding(device.id, "ok", said)
    if CPU in hardware.ids:
        yield _main_memory(settings, hardware)


def _main_memory(settings: Settings, hardware: Hardware) -> Finding:
    memory = psutil.virtual_memory()
    limit = next(device.memory_limit for device in hardware.devices if device.id == CPU)
    said = (
        f"models may take {format_bytes(limit)}; {format_bytes(memory.available)} of {format_bytes(memory.total)} are "
        f"free; {hardware.threads} thread(s) on {processor_name()}"
    )
    if limit < LEAST_MEMORY:
        wanted = "give more with --memory" if settings.memory != MemoryCaps() else "close other programs"
        remedy = f"even the default model wants {format_bytes(LEAST_MEMORY)}: {wanted}"
        return Finding("memory", "problem", said, remedy)
    if limit > memory.available:
        return Finding("memory", "problem", said, "give less with --memory, or close other programs")
    return Finding("memory", "ok", said)


def check_data_dir(settings: Settings) -> Iterator[Finding]:
    """Whether the node can keep its files, and what is left for models. Leaves nothing behind."""
    path = settings.data_dir
    there = path
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        remedy = "check its owner and permissions, or choose another with --data-dir"
        yield Finding("data dir", "problem", f"{path} cannot be used ({there}: {error.strerror})", remedy)
        return
    free = shutil.disk_usage(there).free
    said = f"{path}, {format_bytes(free)} free" + ("" if there == path else " (made at the first start)")
    if free < LEAST_DISK:
        yield Finding("data dir", "problem", said, "make room for models, or choose another disk with --data-dir")
    else:
        yield Finding("data dir", "ok", said)


def check_clock(settings: Settings, now: dt.datetime | None = None) -> Iterator[Finding]:
    """The clock against what is known to be past: the installation, and the making of this node's certificate."""
    now = now or dt.datetime.now(dt.UTC)
    said = f"{now:%Y-%m-%d %H:%M} UTC"
    remedy = "set the clock, best by NTP: nodes refuse certificates that are off by more than a week"
    installed = dt.datetime.fromtimestamp(Path(__file__).stat().st_mtime, dt.UTC)
    if now < installed:
        yield Finding("clock", "problem", f"{said}, before swarmd was installed ({installed:%Y-%m-%d})", remedy)
        return
    try:
        credentials = load_credentials(settings.data_dir)
    except IdentityError as error:
        yield Finding("identity", "problem", str(error), "see the message")
        return
    if credentials is None:
        yield Finding("clock", "ok", said)
        return
    certificate = x509.load_pem_x509_certificate(credentials.certificate_pem)
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if begin <= now <= end:
        yield Finding("clock", "ok", f"{said}; this node's certificate holds until {end:%Y}")
    else:
        span = f"{begin:%Y-%m-%d} to {end:%Y-%m-%d}"
        yield Finding("clock", "problem", f"{said}, but this node's certificate is valid from {span}", remedy)


def check_ports(settings: Settings) -> Iterator[Finding]:
    """Whether the ports that a node takes are free, or held by the node of this data dir."""
    running = DataDir(settings.data_dir).running()
    if running is not None:
        yield Finding("ports", "ok", f"this node is running (process {running.pid}, {running.url}) and has its ports")
        return
    port = DEFAULT_LINK_PORT if settings.port is None else settings.port
    yield _port_finding("link port", "", port, "--port", chosen=settings.port is not None)
    host, number = settings.listen or _default_listen()
    yield _port_finding("endpoint", host, number, "--listen", chosen=settings.listen is not None)


def _port_finding(subject: str, host: str, port: int, flag: str, *, chosen: bool) -> Finding:
    where = f"{host} port {port}" if host else f"TCP port {port}"
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE and not chosen:
            taken = f"{where} is taken by another program; a node started now takes any free one"
            return Finding(subject, "note", taken, f"if others name this node as a --peer, fix its port with {flag}")
        said = f"{where} cannot be used ({error.strerror or error})"
        return Finding(subject, "problem", said, f"choose another with {flag}, or stop the program that has it")
    return Finding(subject, "ok", f"{where} is free")


def _default_listen() -> tuple[str, int]:
    host, _, port = DEFAULT_LISTEN.rpartition(":")
    return host, int(port)


def check_network(settings: Settings) -> Iterator[Finding]:
    """Whether mDNS can work here, and which nodes are in sight. Takes LOOK_SECONDS."""
    peers = "name another node by its address instead: --peer HOST"
    if not settings.mdns:
        state: State = "ok" if settings.peer else "problem"
        yield Finding("mdns", state, "switched off with --no-mdns", "" if settings.peer else peers)
        return
    troubles = multicast_troubles()
    if not troubles:
        said = "this machine has no IPv4 address but loopback"
        yield Finding("mdns", "note", said, "connect it to the others' network")
    for address, trouble in troubles.items():
        if trouble:
            remedy = f"let UDP port 5353 through this machine's firewall, or {peers}"
            yield Finding("mdns", "problem", f"no multicast leaves by {address} ({trouble})", remedy)
        else:
            yield Finding("mdns", "ok", f"multicast leaves by {address}")
    try:
        sightings = asyncio.run(nodes_in_sight(LOOK_SECONDS))
    except OSError as error:
        yield Finding("mdns", "problem", f"mDNS cannot be used ({error.strerror or error})", peers)
        return
    yield _sightings_finding(settings, [(s.node_id, s.swarm_tag) for s in sightings], peers)


def _sightings_finding(settings: Settings, seen: list[tuple[str, str]], peers: str) -> Finding:
    try:
        own = load_credentials(settings.data_dir)
    except IdentityError:
        own = None
    others = [(node, tag) for node, tag in seen if own is None or node != own.node_id]
    if not others:
        remedy = f"if there are any: guest Wi-Fi, VPNs and containers drop multicast; {peers}"
        return Finding("nodes", "note", "no other node answers by mDNS", remedy)
    same = sum(own is not None and tag == own.swarm_tag for _, tag in others)
    if same:
        return Finding("nodes", "ok", f"{len(others)} other node(s) answer, {same} of this swarm")
    remedy = "to join them, run `swarmd token` on one of them, and what it prints here"
    return Finding("nodes", "note", f"{len(others)} other node(s) answer, none of this swarm", remedy)
