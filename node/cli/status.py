"""`swarmd status` and `swarmd stop`."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from swarmd.node.cli.console import CommandError, DaemonClient, guarded, running_daemon, settings_of
from swarmd.node.data_dir import DataDir
from swarmd.partition.units import format_bytes

STOP_SECONDS = 45.0
PATIENT_SECONDS = 2.0


def status(given: Mapping[str, Any], *, as_json: bool) -> int:
    """Print the state of the swarm; the exit code."""

    def work() -> int:
        state = DaemonClient(settings_of(given)).get("/api/swarm")
        if as_json:
            print(json.dumps(state, indent=2))
        else:
            console = Console()
            console.print(_nodes(state))
            _print_trust(console, state)
            _print_instances(console, state)
        return 0

    return guarded(work)


def stop(given: Mapping[str, Any]) -> int:
    """End the daemon of the data dir and wait until it is gone; the exit code."""

    def work() -> int:
        settings = settings_of(given)
        running = running_daemon(settings)
        try:
            os.kill(running.pid, signal.SIGTERM)
        except OSError as error:
            raise CommandError(f"process {running.pid} cannot be stopped ({error.strerror})") from None
        began = time.monotonic()
        deadline, told = began + STOP_SECONDS, False
        while DataDir(settings.data_dir).is_held():
            if not told and time.monotonic() > began + PATIENT_SECONDS:
                print("it finishes its answers and hands its layers on; its log says more", flush=True)
                told = True
            if time.monotonic() > deadline:
                raise CommandError(f"process {running.pid} has not ended in {STOP_SECONDS:.0f} s; it may be stuck")
            time.sleep(0.05)
        print("stopped")
        return 0

    return guarded(work)


def _nodes(state: dict[str, Any]) -> Table:
    table = Table(title=f"swarm {state['swarm'][:8]}", title_justify="left")
    for column in ("node", "state", "device", "layers", "memory for models", "bandwidth", "compute"):
        table.add_column(column)
    for node in state["nodes"]:
        name = node["name"] + (" (this node)" if node["self"] else "")
        for device in node["devices"]:
            shown = device["id"] if device["kind"] == "cpu" else f"{device['id']}, {device['name']}"
            memory = f"{format_bytes(device['memory_limit'])} of {format_bytes(device['memory_total'])}"
            bandwidth, compute = device["memory_bandwidth"], device["compute"]
            table.add_row(
                name,
                node["state"] + (", new" if node.get("new") else ""),
                shown,
                _layers(state, node["id"], device["id"]),
                memory,
                f"{bandwidth / 1e9:.0f} GB/s" if bandwidth else "not measured",
                f"{compute / 1e9:.0f} GFLOP/s" if compute else "not measured",
            )
    return table


def _print_trust(console: Console, state: dict[str, Any]) -> None:
    """Who came lately, whose name is suspicious, and who was evicted."""
    for node in state["nodes"]:
        if node.get("new"):
            console.print(
                f"  new: {node['name']} ({node['id'][:12]}), first seen {_time(node['first_seen'])}",
                highlight=False,
                markup=False,
            )
        if node["trouble"]:
            console.print(f"  warning: {node['trouble']}", highlight=False, markup=False, style="yellow")
    for node in state["evicted"]:
        console.print(
            f"  evicted: {node['name']} ({node['id'][:12]}), {_time(node['at'])}", highlight=False, markup=False
        )


def _time(seconds: int) -> str:
    """Unix time, for a person of this machine."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _layers(state: dict[str, Any], node: str, device: str) -> str:
    """What a device holds of all models: "0 to 14", one line per stage."""
    stages = [stage for instance in state["instances"] for stage in instance["stages"]]
    here = [stage for stage in stages if (stage["node"], stage["device"]) == (node, device)]
    return "\n".join(f"{stage['start']} to {stage['end'] - 1}" for stage in here)


def _print_instances(console: Console, state: dict[str, Any]) -> None:
    names = {node["id"]: node["name"] for node in state["nodes"]}
    if not state["instances"]:
        console.print("no model is served; start one with `swarmd run`")
    for instance in state["instances"]:
        table = Table(
            title=f"{instance['model']}: {instance['state']}, epoch {instance['epoch']}", title_justify="left"
        )
        for column in ("stage", "node", "device", "layers", "bytes"):
            table.add_column(column)
        for index, stage in enumerate(instance["stages"]):
            layers = f"{stage['start']} to {stage['end'] - 1}"
            node = names.get(stage["node"], stage["node"][:12])
            table.add_row(str(index), node, stage["device"], layers, format_bytes(stage["bytes"]))
        console.print(table if instance["stages"] else f"{instance['model']}: {instance['state']}")
        for line in [instance["reason"], *instance["explanation"]]:
            if line:
                console.print(f"  {line}", highlight=False, markup=False)
