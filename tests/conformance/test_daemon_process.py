"""The daemon as a process: how it starts, what it keeps to itself, and how it ends."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from support.swarm import Node, join
from support.tiny_gguf import write_tiny_gguf

QUIET = ("--no-mdns", "--model", "none")


@pytest.fixture(scope="module")
def founder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A node without a model that has founded a swarm."""
    with Node(tmp_path_factory.mktemp("daemons") / "founder", *QUIET) as node:
        assert node.url
        yield node


def refused(data_dir: Path, *options: str) -> str:
    """What a daemon says that does not start; it must end with exit code 2 and no traceback."""
    with Node(data_dir, *QUIET, *options) as node:
        assert node.process.wait(60) == 2
    assert "Traceback" not in node.log
    return node.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_daemon_and_its_stages(number: signal.Signals, tmp_path: Path):
    model = write_tiny_gguf(tmp_path / "tiny.gguf")
    with Node(tmp_path / "node", "--no-mdns", "--model", str(model)) as node:
        node.until_ready()
        stage = node.stage_process()
        with node.request("GET", "/api/events") as feed:
            assert feed.readline()
            node.process.send_signal(number)
            assert node.process.wait(15) == 0
        psutil.wait_procs([stage], timeout=10)
        assert not stage.is_running()
        assert not (node.data_dir / "daemon.json").exists()
    assert "Traceback" not in node.log


def test_stop_ends_it_and_the_data_dir_can_be_used_again(tmp_path: Path):
    with Node(tmp_path / "node", *QUIET) as node:
        identity = node.id
        assert node.command("stop") == "stopped\n"
        assert node.process.wait(10) == 0
    with Node(tmp_path / "node", *QUIET) as again:
        assert again.id == identity


def test_two_nodes_on_one_machine_are_two(founder: Node, tmp_path: Path):
    with Node(tmp_path / "other", *QUIET) as other:
        assert other.id != founder.id
        assert other.url != founder.url
        assert other.link_port != founder.link_port


def test_a_data_dir_is_for_one_daemon(founder: Node):
    said = refused(founder.data_dir)
    assert f"a node is running already with the data dir {founder.data_dir}" in said
    assert f"(process {founder.process.pid}, {founder.url})" in said
    assert founder.get("/health")["status"] == "ok"


@pytest.mark.parametrize("option", ["--listen", "--port"])
def test_a_port_in_use_is_named_with_its_option(option: str, founder: Node, tmp_path: Path):
    port = founder.link_port if option == "--port" else urlsplit(founder.url).port
    said = refused(tmp_path / "late", option, str(port) if option == "--port" else f"127.0.0.1:{port}")
    assert str(port) in said
    assert "in use" in said
    assert f"choose another with {option}" in said


def test_joining_is_refused_while_the_node_runs(founder: Node):
    command = [
        sys.executable,
        "-m",
        "swarmd.node.cli.app",
        "join",
        founder.token(),
        "--data-dir",
        str(founder.data_dir),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "stop it with `swarmd stop`" in done.stderr


def test_the_token_is_nowhere_to_be_seen_after_joining(founder: Node, tmp_path: Path):
    token = founder.token()
    secret = re.compile(re.escape(token.removeprefix("swarmd1-")[:11]), re.IGNORECASE)
    peer = f"127.0.0.1:{founder.link_port}"
    # The options stand after the token, as people type them.
    with Node(tmp_path / "joiner", *QUIET, "join", token, "--peer", peer, "--threads", "1") as joiner:
        joiner.until_members(2)
        process = psutil.Process(joiner.process.pid)
        for one in (process, *process.children(recursive=True)):
            assert not secret.search(" ".join(one.cmdline()))
            assert not secret.search(str(one.environ()))
        assert not secret.search(joiner.log + founder.log)
        for node in (joiner, founder):
            assert not secret.search(node.request("GET", "/api/swarm").read().decode())
            assert not secret.search(node.request("GET", "/metrics").read().decode())
        for path in joiner.data_dir.rglob("*"):
            assert not path.is_file() or not secret.search(path.read_bytes().decode("latin-1"))


def test_a_joiner_that_finds_nobody_is_up_and_tells_where_the_token_is(founder: Node, tmp_path: Path):
    with join(founder.token(), tmp_path / "alone", *QUIET) as joiner:
        assert [node["self"] for node in joiner.get("/api/swarm")["nodes"]] == [True]
        assert "on the machine that founded the swarm" in joiner.until_said("next machine:")


def test_listening_wider_demands_a_key_that_no_log_shows(tmp_path: Path):
    with Node(tmp_path / "wide", *QUIET, "--listen", "0.0.0.0:0") as node:
        assert urlsplit(node.url).hostname == "127.0.0.1"
        key = (node.data_dir / "api-key").read_text().strip()
        refusal = node.request("GET", "/api/swarm")
        assert refusal.status == 401
        assert refusal.getheader("WWW-Authenticate") == "Bearer"
        assert "api-key" in node.until_said("API key:")
        assert key not in node.log
        # The commands of this machine's owner know it.
        assert '"self"' in node.command("status", "--json")
        (node.data_dir / "api-key").rename(node.data_dir / "hidden")
        with pytest.raises(subprocess.CalledProcessError) as caught:
            node.command("status")
        assert "--api-key" in caught.value.stderr


@pytest.mark.parametrize("form", [["--api-key", "correct horse"], ["--api-key=correct horse"]])
def test_a_key_on_the_command_line_does_not_stay_there(form: list[str], tmp_path: Path):
    model = write_tiny_gguf(tmp_path / "tiny.gguf")
    with Node(tmp_path / "node", "--no-mdns", "--model", str(model), *form) as node:
        assert node.request("GET", "/api/swarm").status == 401
        node.until_said("answers. Try:")
        process = psutil.Process(node.process.pid)
        children = process.children(recursive=True)
        assert children
        assert "correct horse" not in " ".join(process.cmdline())
        for child in children:
            assert "correct horse" not in " ".join(child.cmdline())
            assert "correct horse" not in str(child.environ())
        assert "correct horse" not in node.log


def test_a_person_at_a_terminal_is_shown_the_token_and_the_key_once(tmp_path: Path):
    with on_terminal("--data-dir", str(tmp_path / "node"), "--listen", "0.0.0.0:0", "--port", "0", *QUIET) as screen:
        shown = read_until(screen, "next machine:")
    assert "next machine: swarmd join swarmd1-" in shown
    key = (tmp_path / "node" / "api-key").read_text().strip()
    assert f"API key:      {key}" in shown
    with on_terminal("--data-dir", str(tmp_path / "node"), "--listen", "0.0.0.0:0", "--port", "0", *QUIET) as screen:
        assert "API key" not in read_until(screen, "next machine:")


def test_a_folder_named_like_the_program_does_not_stand_in_its_way(founder: Node, tmp_path: Path):
    (tmp_path / "swarmd" / "node" / "cli").mkdir(parents=True)
    (tmp_path / "swarmd" / "node" / "cli" / "app.py").write_text("raise SystemExit('not the program')")
    options = ("--data-dir", str(tmp_path / "node"), "--listen", "127.0.0.1:0", "--port", "0", *QUIET)
    with on_terminal("join", founder.token(), *options, folder=tmp_path) as screen:
        assert "dashboard:" in read_until(screen, "next machine:")


@contextmanager
def on_terminal(*words: str, folder: Path | None = None) -> Iterator[BufferedReader]:
    """`swarmd WORDS` with a terminal as its output; what it shows can be read. It must end well on SIGTERM."""
    script = Path(sys.executable).with_name("swarmd")
    if not script.exists():
        pytest.skip("the `swarmd` script is not installed beside this Python")
    ours, its = pty.openpty()
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SWARMD_")}
    process = subprocess.Popen([script, *words], stdin=its, stdout=its, stderr=its, cwd=folder, env=clean)
    os.close(its)
    try:
        with open(ours, "rb") as screen:
            yield screen
            process.terminate()
            assert process.wait(15) == 0
    finally:
        process.kill()
        process.wait()


def read_until(screen: BufferedReader, words: str) -> str:
    """All lines up to the one that holds the words; a program that ends earlier fails the test."""
    lines: list[str] = []
    while not lines or words not in lines[-1]:
        lines.append(screen.readline().decode())
    return "".join(lines)
