"""The command line without a node behind it: what it loads, and what it says when something is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from swarmd.node.cli.app import app
from swarmd.node.data_dir import DataDir
from swarmd.node.options import OPTIONS, environment_name
from swarmd.node.version import VERSION
from swarmd.transport.token import JoinToken

COMMANDS = ["join", "token", "status", "run", "pull", "models", "doctor", "stop"]
HEAVY = {"torch", "numpy", "aiohttp", "pydantic", "cryptography", "zeroconf", "tokenizers", "psutil"}
LIST_HEAVY = f"""
import sys
from swarmd.node.cli.app import main
try:
    main()
except SystemExit as end:
    assert not end.code, end
print("loaded:", *sorted({HEAVY} & set(sys.modules)))
"""


@pytest.fixture(autouse=True)
def data_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where every command of a test works unless told otherwise; not there yet."""
    for option in OPTIONS:
        monkeypatch.delenv(environment_name(option), raising=False)
    monkeypatch.delenv("SWARMD_TOKEN", raising=False)
    monkeypatch.setenv("SWARMD_DATA_DIR", str(tmp_path / "node"))
    return tmp_path / "node"


def swarmd(*words: str | Path, stdin: str = "") -> tuple[int, str]:
    """The exit code of a command, and all that it said on one line: terminals break lines where they like."""
    result = CliRunner().invoke(app, [str(word) for word in words], input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.output.split())


class TestHelp:
    def loaded(self, *words: str) -> set[str]:
        done = subprocess.run([sys.executable, "-c", LIST_HEAVY, *words], capture_output=True, text=True, check=True)
        return set(done.stdout.splitlines()[-1].split()[1:])

    # Loading nothing heavy is what makes it fast; bench/help_time.py measures how fast.
    def test_loads_nothing_heavy(self):
        assert self.loaded("--help") == set()

    @pytest.mark.parametrize("command", COMMANDS)
    def test_of_a_command_loads_no_more_than_typer_does(self, command: str):
        assert self.loaded(command, "--help") <= {"pydantic"}

    def test_tells_of_every_command_and_option(self):
        code, said = swarmd("--help")
        assert code == 0
        for command in COMMANDS:
            assert f" {command} " in said
        for name, option in OPTIONS.items():
            assert f"--{name.replace('_', '-')} {option.value}".strip() in said

    def test_version(self):
        assert swarmd("--version") == (0, f"swarmd {VERSION}")

    @pytest.mark.parametrize("words", [["--memry", "1GB"], ["frobnicate"], ["run", "--bogus"], ["pull"]])
    def test_what_cannot_be_understood_is_a_usage_error(self, words: list[str]):
        code, said = swarmd(*words)
        assert code == 2
        assert "Usage: swarmd" in said


class TestWithoutNode:
    @pytest.mark.parametrize("words", [["status"], ["status", "--json"], ["stop"], ["run", "smollm2:135m", "hi"]])
    def test_what_needs_a_node_says_how_to_start_one(self, words: list[str], data_dir: Path):
        code, said = swarmd(*words)
        assert code == 1
        assert f"swarmd: no node runs with the data dir {data_dir}" in said
        assert "`swarmd`" in said
        assert "--data-dir" in said
        assert not data_dir.exists()

    def test_token_of_no_swarm(self, data_dir: Path):
        code, said = swarmd("token")
        assert code == 1
        assert f"there is no node in {data_dir} yet; start one with `swarmd`" in said

    def test_the_data_dir_may_stand_after_the_command(self, tmp_path: Path):
        for command in ("token", "status", "stop", "run"):
            assert str(tmp_path / "elsewhere") in swarmd(command, "--data-dir", tmp_path / "elsewhere")[1]

    def test_models_lists_what_can_be_had(self):
        code, said = swarmd("models")
        assert code == 0
        assert "smollm2:135m" in said
        assert "98.4 MB" in said

    def test_an_empty_prompt_is_refused(self):
        assert swarmd("run", "smollm2:135m", " ") == (2, "swarmd: the prompt is empty")

    def test_a_note_of_a_node_that_was_killed_is_not_believed(self, data_dir: Path):
        killed = DataDir(data_dir)
        killed.create()
        killed.hold()
        killed.note_running("http://127.0.0.1:1")
        note = (data_dir / "daemon.json").read_bytes()
        killed.release()
        (data_dir / "daemon.json").write_bytes(note)
        assert swarmd("status")[1].startswith("swarmd: no node runs")

    def test_a_node_that_does_not_answer_yet(self, data_dir: Path):
        starting = DataDir(data_dir)
        starting.create()
        with starting:
            code, said = swarmd("status")
        assert code == 1
        assert "is just starting or stopping; try again in a moment" in said


class TestJoin:
    def test_without_a_token(self):
        for words, stdin in ((["join"], ""), (["join", ""], ""), (["join", "-"], ""), (["join", "-"], "  \n")):
            code, said = swarmd(*words, stdin=stdin)
            assert code == 2
            assert "no token given" in said
            assert "swarmd token" in said

    @pytest.mark.parametrize("text", ["hello", "swarmd1", "x" * 10_000, "swarmd9-AAAAA", "-----", "\u00e9"])
    def test_with_something_else(self, text: str):
        code, said = swarmd("join", "--", text)
        assert code == 2
        assert "join token" in said

    def test_mistyped(self, data_dir: Path):
        token = str(JoinToken(bytes(range(20))))
        for place in (8, 20, len(token) - 1):
            wrong = token[:place] + ("Z" if token[place] != "Z" else "Y") + token[place + 1 :]
            for words, stdin in ((["join", wrong], ""), (["join", "-"], wrong + "\n")):
                code, said = swarmd(*words, stdin=stdin)
                assert (code, said.partition(";")[0]) == (
                    2,
                    "swarmd: the join token is mistyped: its checksum is wrong",
                )
                assert wrong[10:] not in said
        assert not data_dir.exists()

    def test_a_member_forgets_the_token_and_says_who_has_it(self, data_dir: Path, monkeypatch: pytest.MonkeyPatch):
        token, replaced = JoinToken.generate(), []
        monkeypatch.setattr("os.execve", lambda *arguments: replaced.append(arguments))
        assert swarmd("join", str(token), "--memory", "1GB", "--peer", "a", "--peer", "b:1", "--no-mdns")[0] == 0
        [(program, arguments, environment)] = replaced
        assert str(token) not in str(arguments)
        assert str(token) not in str(environment)
        wanted = {"SWARMD_MEMORY": "1GB", "SWARMD_PEER": "a b:1", "SWARMD_MDNS": "False"}
        assert wanted.items() <= environment.items()
        assert program == sys.executable
        code, said = swarmd("token")
        assert code == 1
        assert "run `swarmd token` on the machine that founded the swarm" in said
        secret = str(token)[8:].replace("-", "").encode()
        for path in data_dir.iterdir():
            if path.is_file():
                assert secret not in path.read_bytes().replace(b"-", b"")

    def test_the_environment_is_a_place_for_the_token_too(self, monkeypatch: pytest.MonkeyPatch):
        replaced = []
        monkeypatch.setattr("os.execve", lambda *arguments: replaced.append(arguments))
        monkeypatch.setenv("SWARMD_TOKEN", str(JoinToken.generate()))
        assert swarmd("join")[0] == 0
        assert "SWARMD_TOKEN" not in replaced[0][2]


class TestDataDir:
    @pytest.mark.parametrize("words", [[], ["join", str(JoinToken(bytes(20)))], ["models"], ["pull", "smollm2:135m"]])
    def test_below_a_file(self, words: list[str], tmp_path: Path):
        (tmp_path / "file").touch()
        code, said = swarmd("--data-dir", tmp_path / "file" / "node", *words)
        assert code == 2
        assert f"the data dir {tmp_path}/file/node cannot be used (Not a directory)" in said
        assert "--data-dir" in said

    @pytest.mark.parametrize("words", [["status"], ["stop"], ["token"]])
    def test_below_a_file_for_commands_that_only_read(self, words: list[str], tmp_path: Path):
        (tmp_path / "file").touch()
        code, said = swarmd(*words, "--data-dir", tmp_path / "file" / "node")
        assert code in (1, 2)
        assert str(tmp_path / "file" / "node") in said

    def test_a_lock_that_is_none(self, data_dir: Path):
        (data_dir / "lock").mkdir(parents=True)
        code, said = swarmd()
        assert code == 2
        assert "cannot be used (Is a directory)" in said

    @pytest.mark.parametrize("words", [[], ["join", str(JoinToken(bytes(20)))]])
    def test_a_damaged_key(self, words: list[str], data_dir: Path):
        data_dir.mkdir(mode=0o700)
        (data_dir / "node.key").touch(mode=0o600)
        (data_dir / "node.key").write_bytes(b"garbage")
        code, said = swarmd(*words)
        assert code == 2
        assert f"{data_dir}/node.key is damaged" in said

    def test_a_key_that_others_can_read(self, data_dir: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("os.execve", lambda *arguments: None)
        assert swarmd("join", str(JoinToken.generate()))[0] == 0
        (data_dir / "node.key").chmod(0o644)
        code, said = swarmd("--model", "none")
        assert code == 2
        assert f"{data_dir}/node.key" in said
        assert "chmod 600" in said

    def test_it_is_private(self, data_dir: Path):
        assert swarmd("models")[0] == 0
        assert data_dir.stat().st_mode & 0o777 == 0o700

    def test_held_by_one_at_a_time(self, data_dir: Path):
        holder = DataDir(data_dir)
        holder.create()
        with holder:
            holder.note_running("http://127.0.0.1:7475")
            for words in ([], ["join", str(JoinToken(bytes(20)))]):
                code, said = swarmd(*words)
                assert code == 2
                assert f"a node is running already with the data dir {data_dir}" in said
                assert f"(process {os.getpid()}, http://127.0.0.1:7475)" in said
                assert "`swarmd stop`" in said
        assert not DataDir(data_dir).is_held()

    def test_who_only_looks_does_not_keep_a_node_from_starting(self, data_dir: Path):
        DataDir(data_dir).create()
        (data_dir / "lock").touch()
        with (data_dir / "lock").open() as looking:
            import fcntl

            fcntl.flock(looking, fcntl.LOCK_SH)
            assert not DataDir(data_dir).is_held()
