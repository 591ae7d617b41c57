"""The devices of a node: what `--device` and `--memory` mean on all kinds of machines, and how devices are found."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from swarmd.node import hardware as hardware_module
from swarmd.node.cli.app import app
from swarmd.node.cli.status import _nodes
from swarmd.node.devices import (
    DeviceError,
    FoundDevice,
    MemoryCaps,
    choose,
    kind_of,
    memory_limits,
    parse_devices,
    parse_memory,
)
from swarmd.node.hardware import Hardware, Speed, kinds_worth_a_look

GB = 1_000_000_000
PROCESSOR = FoundDevice("cpu", "EPYC", 64 * GB, 50 * GB)
GPUS = [FoundDevice(f"cuda:{i}", "RTX", 24 * GB, 20 * GB) for i in range(2)]
METAL = FoundDevice("metal", "Apple M4", 48 * GB, 48 * GB)
MLX_CPU = FoundDevice("mlx-cpu", "CPU by MLX", 64 * GB, 50 * GB)


def ids(devices: tuple[FoundDevice, ...]) -> list[str]:
    return [device.id for device in devices]


class TestChoice:
    @pytest.mark.parametrize(
        ("wanted", "found", "chosen"),
        [
            ("auto", [PROCESSOR], ["cpu"]),
            ("auto", [PROCESSOR, *GPUS], ["cuda:0", "cuda:1", "cpu"]),
            ("auto", [PROCESSOR, METAL], ["metal"]),
            ("auto,cpu", [PROCESSOR, METAL], ["metal", "cpu"]),
            ("auto", [PROCESSOR, MLX_CPU], ["cpu"]),
            ("auto,mlx-cpu", [PROCESSOR, MLX_CPU], ["mlx-cpu", "cpu"]),
            ("cuda:1", [PROCESSOR, *GPUS], ["cuda:1"]),
            ("cpu,cuda:1", [PROCESSOR, *GPUS], ["cuda:1", "cpu"]),
        ],
    )
    def test_which_devices_carry_layers(self, wanted: str, found: list[FoundDevice], chosen: list[str]):
        assert ids(choose(parse_devices([wanted]), found, {})) == chosen

    def test_one_that_is_not_there_is_named_with_what_is_and_what_to_do(self):
        with pytest.raises(DeviceError, match=r"no cuda:2 here; this machine has cpu, cuda:0, cuda:1"):
            choose(("cpu", "cuda:2"), [PROCESSOR, *GPUS], {})
        with pytest.raises(DeviceError, match=r"no metal here: MLX is not installed: pip install mlx; .* has cpu"):
            choose(("metal",), [PROCESSOR], {"metal": "MLX is not installed: pip install mlx"})

    @pytest.mark.parametrize("text", ["gpu", "cuda", "cuda:", "cuda:01", "cuda:-1", "cuda:100", "cpu:0", "", " , "])
    def test_a_typo_is_told(self, text: str):
        with pytest.raises(DeviceError, match=r"cuda:0"):
            parse_devices([text])

    def test_several_ways_to_write_several(self):
        assert parse_devices(["CPU, cuda:0", "cuda:0 metal"]) == ("cpu", "cuda:0", "metal")

    def test_kinds(self):
        assert [kind_of(d) for d in ("cpu", "cuda:3", "metal", "mlx-cpu")] == ["cpu", "cuda", "metal", "mlx"]


class TestMemory:
    def limits(self, devices: list[FoundDevice], text: str = "") -> dict[str, float]:
        found = memory_limits(devices, parse_memory(text) if text else MemoryCaps())
        return {device: limit / GB for device, limit in found.items()}

    def test_without_caps_it_is_a_share_of_what_is_free(self):
        assert self.limits([*GPUS, PROCESSOR]) == {"cuda:0": 16, "cuda:1": 16, "cpu": 40}

    def test_devices_in_main_memory_share_it(self):
        assert self.limits([METAL, PROCESSOR], "16GB") == {"metal": 8, "cpu": 8}
        assert self.limits([METAL, PROCESSOR], "16GB,cpu=4GB") == {"metal": 12, "cpu": 4}
        assert self.limits([MLX_CPU, PROCESSOR]) == {"mlx-cpu": 20, "cpu": 20}
        assert self.limits([METAL]) == {"metal": pytest.approx(38.4)}
        assert self.limits([METAL], "60GB") == {"metal": 48}, "no more than the system lets it have"

    def test_one_size_caps_main_memory_and_leaves_the_gpus_theirs(self):
        assert self.limits([*GPUS, PROCESSOR], "8GB,cuda:1=5GB") == {"cuda:0": 16, "cuda:1": 5, "cpu": 8}

    @pytest.mark.parametrize(
        ("devices", "text", "words"),
        [
            ([PROCESSOR], "cuda:0=2GB", "cuda:0 carries no layers here"),
            (GPUS, "8GB", "like cuda:0=20GB"),
            (GPUS, "cuda:0=25GB", r"cuda:0 has 24\.0 GB, less than 25\.0 GB"),
        ],
    )
    def test_a_cap_that_cannot_be_kept_is_told(self, devices: list[FoundDevice], text: str, words: str):
        with pytest.raises(DeviceError, match=f"--memory: .*{words}"):
            self.limits(devices, text)

    @pytest.mark.parametrize("text", ["0", "cpu=0", "1GB,2GB", "cpu=1GB,cpu=2GB", "gpu=1GB", "cpu=much", "=1GB"])
    def test_what_is_no_size(self, text: str):
        with pytest.raises(ValueError, match=r"\w"):
            parse_memory(text)

    @given(
        st.lists(st.sampled_from([PROCESSOR, METAL, MLX_CPU, *GPUS]), min_size=1, unique=True),
        st.none() | st.integers(1, 40 * GB),
        st.dictionaries(st.sampled_from(["cpu", "metal", "cuda:0"]), st.integers(1, 10 * GB)),
    )
    def test_main_memory_is_never_counted_twice(self, devices, main, by_device):
        caps = MemoryCaps(main, by_device)
        try:
            limits = memory_limits(devices, caps)
        except DeviceError:
            return
        shared = [device.id for device in devices if device.in_main_memory]
        pool = main if main is not None else 40 * GB
        assert sum(limits[d] for d in shared) <= max(pool, sum(by_device.get(d, 0) for d in shared))
        assert all(limits[device] == cap for device, cap in by_device.items())


class TestLooking:
    def hardware(self, memory: MemoryCaps | None = None) -> Hardware:
        return Hardware(memory=memory or MemoryCaps(), threads=2, kernels="auto")

    def answering(self, monkeypatch: pytest.MonkeyPatch, *answers: object) -> list[tuple[str, ...]]:
        """Processes of probes answer so; what they were started with."""
        started: list[tuple[str, ...]] = []
        left = list(answers)

        async def run(module: str, *arguments: str) -> Any:
            started.append((module.rpartition(".")[2], *arguments))
            answer = left.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(hardware_module, "_run", run)
        return started

    def signs(self, monkeypatch: pytest.MonkeyPatch, *, smi: bool = False, mac: bool = False) -> None:
        monkeypatch.setattr(hardware_module.shutil, "which", lambda name: "/usr/bin/nvidia-smi" if smi else None)
        monkeypatch.setattr(hardware_module.Path, "exists", lambda path: False)
        monkeypatch.setattr(hardware_module.sys, "platform", "darwin" if mac else "linux")
        monkeypatch.setattr(hardware_module.platform, "machine", lambda: "arm64" if mac else "x86_64")

    def test_only_what_the_machine_shows_signs_of_is_looked_for(self, monkeypatch: pytest.MonkeyPatch):
        self.signs(monkeypatch)
        assert kinds_worth_a_look(("auto",)) == []
        assert kinds_worth_a_look(("cpu", "mlx-cpu", "cuda:1")) == ["cuda", "mlx"]
        self.signs(monkeypatch, smi=True)
        assert kinds_worth_a_look(("auto",)) == ["cuda"]
        assert kinds_worth_a_look(("cpu",)) == []
        self.signs(monkeypatch, mac=True)
        assert kinds_worth_a_look(("auto",)) == ["metal"]

    async def test_a_machine_without_signs_of_a_gpu_starts_no_process(self, monkeypatch: pytest.MonkeyPatch):
        self.signs(monkeypatch)
        started = self.answering(monkeypatch)
        hardware = self.hardware()
        await hardware.find(("auto",))
        assert (hardware.ids, started) == (("cpu",), [])

    async def test_gpus_and_their_speeds_which_are_kept(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        self.signs(monkeypatch, smi=True)
        gpus = [
            {"id": g.id, "name": g.name, "memory_total": g.memory_total, "memory_free": g.memory_free} for g in GPUS
        ]
        found = {"devices": gpus, "missing": {}}
        rates = {"memory_bandwidth": 3e12, "compute": 5e13}
        cpu_rates = {"memory_bandwidth": 2e10, "compute": 1e11}
        started = self.answering(monkeypatch, found, {"cuda:0": rates}, cpu_rates, found)
        for _ in range(2):
            hardware = self.hardware(MemoryCaps(8 * GB))
            await hardware.find(("auto",))
            await hardware.calibrate(tmp_path)
            first, second, processor = hardware.devices
            assert [d.id for d in hardware.devices] == ["cuda:0", "cuda:1", "cpu"]
            assert (first.kind, first.name, first.memory_limit) == ("cuda", "RTX", 16 * GB)
            assert (first.memory_bandwidth, second.memory_bandwidth, processor.compute) == (3e12, 3e12, 1e11)
            assert processor.memory_limit in (8 * GB, 4 * GB), "half where plain torch computes"
        assert started == [
            ("devices", "cuda"),
            ("devices", "--measure", "cuda:0"),
            ("calibrate", "--threads", "2"),
            ("devices", "cuda"),
        ]

    async def test_a_probe_that_fails_costs_its_devices_only(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ):
        self.signs(monkeypatch, smi=True)
        self.answering(monkeypatch, ValueError("CUDA driver died"), ValueError("no"), ValueError("driver died again"))
        hardware = self.hardware()
        await hardware.find(("auto",))
        assert hardware.ids == ("cpu",)
        assert "CUDA driver died" in hardware.missing["cuda"]
        await hardware.calibrate(tmp_path)
        assert hardware.devices[0].memory_bandwidth == Speed().memory_bandwidth
        with pytest.raises(DeviceError, match=r"no cuda:0 here.*driver died again"):
            await hardware.find(("cuda:0",))

    async def test_a_process_that_says_nothing_is_told_by_its_last_words(self):
        with pytest.raises(ValueError, match=r"No module named swarmd\.no_such"):
            await hardware_module._run("swarmd.no_such")

    async def test_one_that_hangs_is_ended(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        monkeypatch.setattr(hardware_module, "PROBE_SECONDS", 0.05)
        with pytest.raises(TimeoutError, match="it took more than"):
            await hardware_module._run("http.server", "--bind", "127.0.0.1", "0")

    async def test_what_this_machine_has_not_is_told_with_what_to_do(self):
        """The real probe, whatever this machine is: a GPU that does not exist is named, with a remedy."""
        with pytest.raises(DeviceError, match=r"no cuda:99 here(: \w.*)?; this machine has cpu"):
            await self.hardware().find(("cpu", "cuda:99"))

    async def test_the_real_probe_of_mlx(self):
        pytest.importorskip("mlx.core", reason="MLX is not installed")
        content = await hardware_module._run("swarmd.node.engine.devices", "mlx", "metal")
        assert json.dumps(content)
        assert ("metal" in content["missing"]) == (not any(d["id"] == "metal" for d in content["devices"]))
        rates = await hardware_module._run("swarmd.node.engine.devices", "--measure", "mlx-cpu")
        assert rates["mlx-cpu"]["memory_bandwidth"] > 1e8
        assert rates["mlx-cpu"]["compute"] > 1e8


def test_a_node_told_to_use_what_is_not_there_does_not_start(tmp_path: Path):
    words = ["--data-dir", str(tmp_path), "--model", "none", "--no-mdns", "--listen", "127.0.0.1:0", "--port", "0"]
    for option, value, said in (
        ("--device", "cpu,cuda:99", "--device: there is no cuda:99 here"),
        ("--memory", "metal=1GB", "--memory: metal carries no layers here (see --device), only cpu"),
    ):
        given = ["--device", "cpu", option, value] if option == "--memory" else [option, value]
        result = CliRunner().invoke(app, [*words, *given])
        assert result.exit_code == 2
        assert said in " ".join(result.output.split())


def test_status_tells_of_each_device_and_its_layers():
    devices = [
        {"id": "cuda:0", "kind": "cuda", "name": "RTX 4090"},
        {"id": "cpu", "kind": "cpu", "name": "EPYC"},
    ]
    figures = {"memory_limit": 8 * GB, "memory_total": 24 * GB, "memory_bandwidth": 1e12, "compute": 0.0}
    node = {"id": "a", "name": "attic", "self": True, "state": "alive", "devices": [d | figures for d in devices]}
    stages = [
        {"node": "a", "device": "cuda:0", "start": 0, "end": 20},
        {"node": "a", "device": "cpu", "start": 20, "end": 24},
        {"node": "b", "device": "cpu", "start": 24, "end": 30},
    ]
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(_nodes({"swarm": "0123456789", "nodes": [node], "instances": [{"stages": stages}]}))
    gpu, processor = [line for line in console.export_text().splitlines() if "attic" in line]
    assert re.search(r"cuda:0, RTX 4090 .* 0 to 19 .* 8.0 GB of 24.0 GB .* 1000 GB/s", gpu)
    assert re.search(r"cpu .* 20 to 23 ", processor)
    assert "24 to 29" not in gpu + processor
