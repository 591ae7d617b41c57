"""`swarmd doctor`: each check sees what is wrong, and says what to do."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import shutil
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from typer.testing import CliRunner

from swarmd.discovery import survey
from swarmd.discovery.mdns import MdnsDiscovery
from swarmd.discovery.survey import multicast_troubles, nodes_in_sight
from swarmd.node import hardware
from swarmd.node.cli import checks, doctor
from swarmd.node.cli.app import app
from swarmd.node.cli.checks import (
    Finding,
    check_clock,
    check_data_dir,
    check_devices,
    check_network,
    check_ports,
)
from swarmd.node.config import Settings, load_settings
from swarmd.node.data_dir import DataDir
from swarmd.node.options import OPTIONS, environment_name
from swarmd.transport import authority
from swarmd.transport.identity import issue_credentials, load_or_create_node_key, save_credentials
from swarmd.transport.token import JoinToken

MEASURED = {
    "torch": "2.13.0",
    "weight_bytes": 40_000_000,
    "memory_bandwidth": 20e9,
    "torch_seconds": {"decode": 0.040, "prefill": 0.120},
}


@pytest.fixture(autouse=True)
def data_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for option in OPTIONS:
        monkeypatch.delenv(environment_name(option), raising=False)
    monkeypatch.setenv("SWARMD_DATA_DIR", str(tmp_path / "node"))
    return tmp_path / "node"


def settings(**given: object) -> Settings:
    return load_settings(**given)


def only(findings) -> Finding:
    [finding] = findings
    return finding


class TestKernels:
    def test_what_they_gain_is_said(self):
        measured = MEASURED | {"isa": "avx2", "native_seconds": {"decode": 0.004, "prefill": 0.030}}
        finding = only(doctor.kernel_findings(measured))
        assert finding.state == "ok"
        assert "native, avx2: a 4-bit product is 10 times faster than in plain PyTorch for one token" in finding.said
        assert "4.0 times in a prompt" in finding.said
        assert "reads weights at 10 GB/s, and one core reads memory at 20 GB/s" in finding.said

    def test_without_them_it_says_why_what_it_costs_and_how_to_get_them(self):
        finding = only(doctor.kernel_findings(MEASURED | {"missing": "they were not built"}))
        assert finding.state == "problem"
        assert "plain PyTorch computes: they were not built." in finding.said
        assert "weights at 1.0 GB/s" in finding.said
        assert "up to 20 times faster" in finding.said
        assert "apt install g++" in finding.remedy
        assert "pip install --force-reinstall --no-deps swarmd" in finding.remedy

    def test_a_cpu_without_the_instructions_is_worth_a_note(self):
        measured = MEASURED | {"isa": "portable", "native_seconds": {"decode": 0.02, "prefill": 0.1}}
        assert only(doctor.kernel_findings(measured)).state == "note"

    def test_when_pytorch_does_not_work_its_last_word_is_passed_on(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(doctor, "PROBE", (sys.executable, "-c", "raise SystemExit('libtorch.so: no such file')"))
        finding = only(doctor.check_kernels())
        assert finding.state == "problem"
        assert "libtorch.so: no such file" in finding.said


class TestMemory:
    def test_enough(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(checks.psutil, "virtual_memory", lambda: SimpleNamespace(total=16e9, available=8e9))
        finding = only(check_devices(settings(memory="4GB")))
        assert finding.state == "ok"
        assert "models may take 4.0 GB; 8.0 GB of 16.0 GB are free" in finding.said

    def test_too_little_for_any_model(self):
        finding = only(check_devices(settings(memory="100MB")))
        assert finding.state == "problem"
        assert "--memory" in finding.remedy

    def test_more_than_there_is(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(checks.psutil, "virtual_memory", lambda: SimpleNamespace(total=16e9, available=2e9))
        finding = only(check_devices(settings(memory="4GB")))
        assert finding.state == "problem"
        assert "give less with --memory" in finding.remedy


class TestDataDir:
    def test_one_that_is_not_there_yet_is_not_made(self, data_dir: Path):
        finding = only(check_data_dir(settings()))
        assert finding.state == "ok"
        assert "made at the first start" in finding.said
        assert not data_dir.exists()

    def test_one_that_cannot_be(self, tmp_path: Path):
        (tmp_path / "file").touch()
        finding = only(check_data_dir(settings(data_dir=str(tmp_path / "file" / "node"))))
        assert finding.state == "problem"
        assert "Not a directory" in finding.said
        assert "--data-dir" in finding.remedy

    def test_a_full_disk(self, monkeypatch: pytest.MonkeyPatch, data_dir: Path):
        data_dir.mkdir()
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=20_000_000))
        finding = only(check_data_dir(settings()))
        assert finding.state == "problem"
        assert "20.0 MB free" in finding.said
        assert list(data_dir.iterdir()) == []


class TestClock:
    def certified(self, data_dir: Path, when: dt.datetime) -> None:
        DataDir(data_dir).create()
        token, key = JoinToken.generate(), load_or_create_node_key(data_dir)
        credentials = issue_credentials(key, token)
        leaf = authority.issue_leaf(key.public_key(), token, when).public_bytes(Encoding.PEM)
        save_credentials(data_dir, type(credentials)(**{**vars(credentials), "certificate_pem": leaf}))

    def test_right(self, data_dir: Path):
        now = dt.datetime.now(dt.UTC)
        assert only(check_clock(settings())).state == "ok"
        self.certified(data_dir, now)
        assert only(check_clock(settings())).state == "ok"

    def test_before_the_installation(self):
        finding = only(check_clock(settings(), dt.datetime(1970, 1, 1, tzinfo=dt.UTC)))
        assert finding.state == "problem"
        assert "1970-01-01 00:00 UTC, before swarmd was installed" in finding.said
        assert "NTP" in finding.remedy

    def test_outside_the_certificates_time(self, data_dir: Path):
        now = dt.datetime.now(dt.UTC)
        self.certified(data_dir, now + dt.timedelta(days=300))
        finding = only(check_clock(settings(), now))
        assert finding.state == "problem"
        assert "this node's certificate is valid from" in finding.said

    def test_a_damaged_identity_is_told(self, data_dir: Path):
        self.certified(data_dir, dt.datetime.now(dt.UTC))
        (data_dir / "node.crt").write_text("garbage")
        finding = only(check_clock(settings()))
        assert finding.state == "problem"
        assert "node.crt" in finding.said


class TestPorts:
    def test_free_ones(self):
        assert [finding.state for finding in check_ports(settings(port="0", listen="127.0.0.1:0"))] == ["ok", "ok"]

    def test_one_that_was_asked_for_and_is_taken(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            _, endpoint = check_ports(settings(port="0", listen=f"127.0.0.1:{port}"))
        assert endpoint.state == "problem"
        assert f"127.0.0.1 port {port}" in endpoint.said
        assert "choose another with --listen" in endpoint.remedy

    def test_the_default_may_be_taken(self, monkeypatch: pytest.MonkeyPatch):
        with socket.create_server(("", 0)) as taken:
            monkeypatch.setattr(checks, "DEFAULT_LINK_PORT", taken.getsockname()[1])
            link, _ = check_ports(settings(listen="127.0.0.1:0"))
        assert link.state == "note"
        assert "takes any free one" in link.said

    def test_a_running_node_has_its_own(self, data_dir: Path):
        node = DataDir(data_dir)
        node.create()
        with node:
            node.note_running("http://127.0.0.1:7475")
            finding = only(check_ports(settings()))
        assert finding.state == "ok"
        assert "http://127.0.0.1:7475" in finding.said


class TestDevices:
    GPU: ClassVar = {"id": "cuda:0", "name": "RTX 4090", "memory_total": 24_000_000_000, "memory_free": 20_000_000_000}

    def found(self, monkeypatch: pytest.MonkeyPatch, devices: list[Any], missing: dict[str, str], **given: str):
        async def run(module: str, *arguments: str) -> Any:
            return {"devices": devices, "missing": missing}

        monkeypatch.setattr(hardware, "_run", run)
        monkeypatch.setattr(hardware, "kinds_worth_a_look", lambda wanted: ["cuda"])
        return list(check_devices(settings(memory="4GB", **given)))

    def test_each_device_is_told(self, monkeypatch: pytest.MonkeyPatch):
        gpu, memory = self.found(monkeypatch, [self.GPU], {})
        assert (gpu.subject, gpu.state) == ("cuda:0", "ok")
        assert "RTX 4090: models may take 16.0 GB; 20.0 GB of 24.0 GB are free" in gpu.said
        assert memory.subject == "memory"

    def test_a_gpu_that_cannot_be_used_is_worth_a_note_with_the_reason(self, monkeypatch: pytest.MonkeyPatch):
        note, _ = self.found(monkeypatch, [], {"cuda": "PyTorch was built without CUDA; install another"})
        assert (note.subject, note.state) == ("cuda", "note")
        assert "install another" in note.remedy

    def test_a_device_that_was_asked_for_and_is_not_there(self, monkeypatch: pytest.MonkeyPatch):
        finding = only(self.found(monkeypatch, [self.GPU], {}, device="cuda:1"))
        assert finding.state == "problem"
        assert "there is no cuda:1 here; this machine has cpu, cuda:0" in finding.said


class TestNetwork:
    def network(
        self, monkeypatch: pytest.MonkeyPatch, troubles: dict[str, str], *seen: tuple[str, str]
    ) -> list[Finding]:
        async def look(seconds: float) -> list[SimpleNamespace]:
            return [SimpleNamespace(node_id=node, swarm_tag=tag) for node, tag in seen]

        monkeypatch.setattr(checks, "multicast_troubles", lambda: troubles)
        monkeypatch.setattr(checks, "nodes_in_sight", look)
        return list(check_network(settings()))

    def joined(self, data_dir: Path) -> tuple[str, str]:
        DataDir(data_dir).create()
        credentials = issue_credentials(load_or_create_node_key(data_dir), JoinToken.generate())
        save_credentials(data_dir, credentials)
        return credentials.node_id, credentials.swarm_tag

    def test_switched_off(self):
        assert only(check_network(settings(mdns=False))).state == "problem"
        assert only(check_network(settings(mdns=False, peer=["10.0.0.1"]))).state == "ok"

    def test_an_interface_that_lets_nothing_out(self, monkeypatch: pytest.MonkeyPatch):
        bad, good, nodes = self.network(monkeypatch, {"10.0.0.1": "Operation not permitted", "10.1.0.1": ""})
        assert (bad.state, good.state, nodes.state) == ("problem", "ok", "note")
        assert "10.0.0.1 (Operation not permitted)" in bad.said
        assert "UDP port 5353" in bad.remedy
        assert "--peer" in nodes.remedy

    def test_nodes_of_this_swarm_and_others(self, monkeypatch: pytest.MonkeyPatch, data_dir: Path):
        own, tag = self.joined(data_dir)
        assert "no other node" in self.network(monkeypatch, {"10.0.0.1": ""}, (own, tag))[-1].said
        found = self.network(monkeypatch, {"10.0.0.1": ""}, (own, tag), ("b" * 64, tag), ("c" * 64, "0" * 16))[-1]
        assert (found.state, found.said) == ("ok", "2 other node(s) answer, 1 of this swarm")
        found = self.network(monkeypatch, {"10.0.0.1": ""}, ("c" * 64, "0" * 16))[-1]
        assert found.state == "note"
        assert "swarmd token" in found.remedy

    def test_where_mdns_cannot_be_used(self, monkeypatch: pytest.MonkeyPatch):
        def broken(*args: object, **kwargs: object) -> None:
            raise OSError(19, "No such device")

        monkeypatch.setattr(checks, "multicast_troubles", lambda: {"10.0.0.1": ""})
        monkeypatch.setattr(survey, "open_zeroconf", broken)
        finding = list(check_network(settings()))[-1]
        assert finding.state == "problem"
        assert "No such device" in finding.said

    async def test_a_node_that_announces_itself_is_in_sight(self):
        if "" not in multicast_troubles().values():
            pytest.skip("no multicast leaves this machine")
        node = MdnsDiscovery("d" * 64, "0123456789abcdef", 1, 7000, lambda sighting: None)
        await node.start()
        try:
            async with asyncio.timeout(30):
                while not (seen := [s for s in await nodes_in_sight(0.3) if s.node_id == "d" * 64]):
                    pass
        finally:
            await node.close()
        assert seen[0].swarm_tag == "0123456789abcdef"


class TestCommand:
    def run(self, *words: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["doctor", *words])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.stdout

    def test_the_real_machine_as_json(self):
        """Whatever this machine is like, everything is looked at, and the exit status says what the findings say."""
        code, said = self.run("--json", "--port", "0", "--listen", "127.0.0.1:0")
        content = json.loads(said)
        subjects = {finding["subject"] for finding in content["findings"]}
        wanted = {"python", "pytorch", "kernels", "memory", "data dir", "clock", "link port", "endpoint"}
        assert subjects >= wanted, content
        problems = [finding for finding in content["findings"] if finding["state"] == "problem"]
        assert content["ok"] == (not problems)
        assert code == (1 if problems else 0)
        assert all(finding["remedy"] for finding in problems)

    @pytest.mark.parametrize(("state", "code", "last"), [("ok", 0, "all is well"), ("note", 0, "all is well")])
    def test_notes_are_no_alarm(self, monkeypatch: pytest.MonkeyPatch, state, code: int, last: str):
        monkeypatch.setattr(doctor, "checks", lambda _: [("it", lambda: iter([Finding("disk", state, "half [full]")]))])
        found, said = self.run()
        assert found == code
        assert "half [full]" in said
        assert said.splitlines()[-1] == last

    def test_a_problem_is_told_with_its_remedy(self, monkeypatch: pytest.MonkeyPatch):
        finding = Finding("disk", "problem", "it is full", "make room")
        monkeypatch.setattr(doctor, "checks", lambda _: [("it", lambda: iter([finding]))])
        code, said = self.run()
        assert code == 1
        assert "-> make room" in said
        assert said.splitlines()[-1] == "1 thing(s) need attention"
