"""A joiner uses the token once: afterwards it is nowhere on its machine, not even in the memory of its processes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.quiet_swarm import QUIET
from support.swarm import Node

from swarmd.transport.authority import AUTHORITY_INFO
from swarmd.transport.token import JoinToken, derive

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.skipif(not psutil.LINUX, reason="processes are looked into through /proc"),
]

# Read in parts, which overlap by more than the longest secret.
PART, OVERLAP = 8 << 20, 256


def secrets_of(token: str) -> dict[str, bytes]:
    """All that would let its finder in."""
    secret = JoinToken.parse(token).secret
    return {
        "the token": token.encode(),
        "the token without hyphens": token.partition("-")[2].replace("-", "").encode(),
        "its secret": secret,
        "its secret in hex": secret.hex().encode(),
        "the authority's key": derive(secret, AUTHORITY_INFO, 32),
    }


def found_in(data: bytes, secrets: dict[str, bytes]) -> set[str]:
    return {name for name, secret in secrets.items() if secret in data}


def found_in_files(folder: Path, secrets: dict[str, bytes]) -> set[str]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size < 1 << 20]
    assert files
    return {f"{name} in {path.name}" for path in files for name in found_in(path.read_bytes(), secrets)}


def found_in_memory(pid: int, secrets: dict[str, bytes]) -> set[str]:
    """What of the secrets is in the writable memory of a process."""
    found: set[str] = set()
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for start, end in writable(pid):
            for place in range(start, end, PART):
                try:
                    part = os.pread(memory.fileno(), min(PART + OVERLAP, end - place), place)
                except OSError:  # unmapped meanwhile, or not to be read
                    continue
                found |= found_in(part, secrets)
    return found


def writable(pid: int) -> Iterator[tuple[int, int]]:
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        area = re.match(r"([0-9a-f]+)-([0-9a-f]+) rw.. ", line)
        if area and not line.endswith(("[vvar]", "[vsyscall]")):
            yield int(area[1], 16), int(area[2], 16)


def test_the_search_finds_what_is_there(tmp_path: Path) -> None:
    token = str(JoinToken.generate())
    secrets = secrets_of(token)
    (tmp_path / "file").write_text(f"x{token}y")
    assert found_in_files(tmp_path, secrets) == {"the token in file"}
    assert found_in_memory(os.getpid(), secrets) == set(secrets)


@pytest.mark.parametrize("way", ["argument", "environment"])
def test_nothing_of_it_is_left(smollm2_path: Path, tmp_path: Path, way: str) -> None:
    with Node(tmp_path / "founder", *QUIET) as founder:
        token = founder.token()
        secrets = secrets_of(token)
        peer = f"127.0.0.1:{founder.link_port}"
        assert found_in_files(founder.data_dir, secrets), "a founder keeps it"
        options = ("--no-mdns", "--peer", peer, "--model", str(smollm2_path), "--context", "1024", "--threads", "1")
        given = ("join", token) if way == "argument" else ("join",)
        environment = {} if way == "argument" else {"SWARMD_TOKEN": token}
        with Node(tmp_path / "joiner", *options, *given, environment=environment) as joiner:
            joiner.until_members(2)
            joiner.until_ready(stages=1)
            assert joiner.text("Hello", max_tokens=2)
            daemon = psutil.Process(joiner.process.pid)
            processes = [daemon, *daemon.children(recursive=True)]
            assert len(processes) > 1, "there is a stage process"
            for process in processes:
                for name in ("cmdline", "environ"):
                    assert not found_in(Path(f"/proc/{process.pid}/{name}").read_bytes(), secrets), name
                assert not found_in_memory(process.pid, secrets)
            assert not found_in_files(joiner.data_dir, secrets)
            assert not found_in(joiner.log.encode(), secrets)
