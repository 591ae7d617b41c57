"""`swarmd doctor`: what this machine has, what is wrong with it, and what to do about that."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from swarmd.node.cli.checks import (
    Finding,
    check_clock,
    check_data_dir,
    check_devices,
    check_network,
    check_ports,
    check_system,
)
from swarmd.node.cli.console import FAILURE, guarded, settings_of
from swarmd.node.config import Settings

PROBE_SECONDS = 120.0
# -P: a folder named swarmd in the working directory is not this program.
PROBE = (sys.executable, "-P", "-m", "swarmd.node.engine.cpu.probe")

COMPILER = "install a C++ compiler (Debian, Ubuntu: apt install g++; macOS: xcode-select --install)"
REBUILD = "then `make native` in a checkout, else: pip install --force-reinstall --no-deps swarmd"
COLORS = {"ok": "green", "note": "yellow", "problem": "red"}


def doctor(given: Mapping[str, Any], *, as_json: bool) -> int:
    """Look at everything and print what was found; the exit code, 0 when nothing needs attention."""

    def work() -> int:
        settings = settings_of(given)
        findings: list[Finding] = []
        table = Table(box=None, show_header=False, pad_edge=False)
        with Console(stderr=True).status("looking") as status:
            for about, check in checks(settings):
                status.update(f"looking at {about}")
                findings += check()
        problems = sum(finding.state == "problem" for finding in findings)
        if as_json:
            listed = [dataclasses.asdict(finding) for finding in findings]
            print(json.dumps({"ok": not problems, "findings": listed}, indent=2))
        else:
            for finding in findings:
                _add(table, finding)
            console = Console()
            console.print(table)
            console.print(f"{problems} thing(s) need attention" if problems else "all is well")
        return FAILURE if problems else 0

    return guarded(work)


def checks(settings: Settings) -> list[tuple[str, Callable[[], Iterator[Finding]]]]:
    """What is looked at, in this order: its name while it goes on, and the check."""
    return [
        ("this system", check_system),
        ("PyTorch and the kernels (some seconds)", check_kernels),
        ("devices and memory", lambda: check_devices(settings)),
        ("the data dir", lambda: check_data_dir(settings)),
        ("the clock", lambda: check_clock(settings)),
        ("ports", lambda: check_ports(settings)),
        ("the network", lambda: check_network(settings)),
    ]


def check_kernels() -> Iterator[Finding]:
    """PyTorch, our kernels, and what each of them makes of this CPU, measured in a process of its own."""
    try:
        done = subprocess.run(PROBE, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PROBE_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        yield Finding("pytorch", "problem", f"computing cannot be tried here: {error}", "see the message")
        return
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        yield Finding("pytorch", "problem", f"computing does not work here: {reason}", "install swarmd again")
        return
    measured = json.loads(done.stdout)
    yield Finding("pytorch", "ok", f"PyTorch {measured['torch']}")
    yield from kernel_findings(measured)


def kernel_findings(measured: Mapping[str, Any]) -> Iterator[Finding]:
    """What a measurement of `swarmd.node.engine.cpu.probe` means."""
    bandwidth, plain = measured["memory_bandwidth"], measured["torch_seconds"]
    reading = f"one core reads memory at {bandwidth / 1e9:.0f} GB/s"
    if "missing" in measured:
        best = max(1.0, bandwidth * plain["decode"] / measured["weight_bytes"])
        yield Finding(
            "kernels",
            "problem",
            f"plain PyTorch computes: {measured['missing']}. It reads weights at "
            f"{measured['weight_bytes'] / plain['decode'] / 1e9:.1f} GB/s, and {reading}: with the kernels decoding "
            f"would be up to {best:.0f} times faster",
            f"{COMPILER}, {REBUILD}",
        )
        return
    ours = measured["native_seconds"]
    decode, prefill = (plain[kind] / ours[kind] for kind in ("decode", "prefill"))
    said = (
        f"native, {measured['isa']}: a 4-bit product is {decode:.0f} times faster than in plain PyTorch for one token, "
        f"{prefill:.1f} times in a prompt; it reads weights at "
        f"{measured['weight_bytes'] / ours['decode'] / 1e9:.0f} GB/s, and {reading}"
    )
    if measured["isa"] == "portable":
        yield Finding("kernels", "note", said, "this CPU has none of the instructions that make them fast (AVX2, NEON)")
    else:
        yield Finding("kernels", "ok", said)


def _add(table: Table, finding: Finding) -> None:
    color = COLORS[finding.state]
    table.add_row(f"[{color}]{finding.state}[/]", finding.subject, escape(finding.said))
    if finding.remedy:
        table.add_row("", "", f"-> {escape(finding.remedy)}")
