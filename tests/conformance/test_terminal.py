"""What a person types against a running node, and what the terminal shows."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from support.answers import MODEL
from support.bad_models import BAD_MODELS, write_bad_model
from support.swarm import Node
from support.tiny_gguf import write_tiny_gguf


def swarmd(node: Node, *words: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run `swarmd WORDS --data-dir ...` in a folder of its own; its output is wide enough for every table."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SWARMD_")}
    return subprocess.run(
        [sys.executable, "-m", "swarmd.node.cli.app", *map(str, words), "--data-dir", str(node.data_dir)],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        cwd=node.data_dir.parent,
        env=clean | {"COLUMNS": "160"},
    )


def test_run_answers_a_prompt(node: Node):
    done = swarmd(node, "run", MODEL, "What is the capital of France?", "--temperature", "0")
    assert done.returncode == 0
    assert "Paris" in done.stdout
    assert done.stderr == ""


def test_run_knows_aliases_and_the_default(node: Node):
    for words in (["run", "SmolLM2", "Say yes."], ["run", "default", "Say yes."]):
        done = swarmd(node, *words, "--max-tokens", "2")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.strip()


def test_run_passes_wishes_on_and_says_what_is_wrong_with_them(node: Node):
    done = swarmd(node, "run", MODEL, "Say yes.", "--temperature", "3")
    assert (done.returncode, done.stdout) == (1, "")
    assert "temperature" in done.stderr


def test_run_reads_a_conversation_from_a_pipe(node: Node):
    questions = "What is the capital of France?\nAnd of Italy?\n\nnever asked\n"
    done = swarmd(node, "run", "--temperature", "0", "--max-tokens", "12", stdin=questions)
    assert done.returncode == 0
    first, _, rest = done.stdout.partition("\n")
    assert "Paris" in first
    assert rest.strip()


def test_run_starts_a_model_by_a_path_seen_from_where_one_stands(node: Node):
    path = write_tiny_gguf(node.data_dir.parent / "tiny-a.gguf", context_length=512)
    done = swarmd(node, "run", "./tiny-a.gguf", "hello", "--max-tokens", "4")
    assert done.returncode == 0, done.stderr
    [instance] = [i for i in node.get("/api/swarm")["instances"] if i["model"] == path.stem]
    assert instance["state"] == "ready"
    assert path.stem in swarmd(node, "models").stdout


def test_status_shows_nodes_and_stages(node: Node):
    done = swarmd(node, "status")
    assert (done.returncode, done.stderr) == (0, "")
    for word in ("attic", "this node", "alive", "cpu", "1.0 GB", MODEL, "ready", "epoch 1", "0 to 29"):
        assert word in done.stdout


def test_status_as_json_is_the_public_state(node: Node):
    shown, served = json.loads(swarmd(node, "status", "--json").stdout), node.get("/api/swarm")
    [mine] = shown["nodes"]
    assert {"id", "name", "state", "devices"} <= mine.keys()
    assert (mine["id"], mine["name"], mine["state"]) == (node.id, "attic", "alive")
    [device] = mine["devices"]
    assert {"kind", "memory_total", "memory_free", "memory_bandwidth", "compute"} <= device.keys()
    assert device["memory_limit"] == 1_000_000_000
    instance = next(i for i in shown["instances"] if i["model"] == MODEL)
    assert {"model", "state", "epoch", "stages"} <= instance.keys()
    [stage] = instance["stages"]
    assert {key: stage[key] for key in ("node", "device", "start", "end")} == {
        "node": node.id,
        "device": "cpu",
        "start": 0,
        "end": 30,
    }
    assert stage["bytes"] > 90_000_000
    assert shown.keys() == served.keys()


def test_pull_of_what_is_here_is_quick(node: Node):
    done = swarmd(node, "pull", MODEL)
    assert done.returncode == 0
    assert f"{MODEL} is on this machine: 98.4 MB" in done.stdout


def test_models_says_what_is_here(node: Node):
    [row] = [line for line in swarmd(node, "models").stdout.splitlines() if MODEL in line]
    assert "98.4 MB" in row
    assert "yes" in row


@pytest.mark.parametrize("kind", BAD_MODELS)
def test_a_bad_model_is_refused_everywhere_and_the_node_stays_up(kind: str, node: Node, tmp_path: Path):
    path, words = write_bad_model(kind, tmp_path)
    status, body = node.post("/api/instances", {"model": str(path)})
    assert (status, body["error"]["param"]) == (400, "model")
    done = swarmd(node, "run", path, "hello")
    assert (done.returncode, done.stdout) == (1, "")
    for word in words:
        assert word in body["error"]["message"]
        assert word in done.stderr
    assert MODEL in node.get("/health")["ready"]


def test_an_unknown_model_is_refused_everywhere(node: Node):
    for path, body in (("/api/instances", {}), ("/v1/completions", {"prompt": "hi"})):
        status, answer = node.post(path, body | {"model": "no-such-model"})
        assert (status, answer["error"]["code"]) == (404, "model_not_found")
    done = swarmd(node, "run", "no-such-model", "hi")
    assert done.returncode == 1
    assert "no model is called 'no-such-model'; known here: smollm2:135m" in done.stderr


def test_the_nodes_files_are_private(node: Node):
    for name in ("node.key", "token"):
        assert stat.S_IMODE((node.data_dir / name).stat().st_mode) == 0o600


def test_a_model_larger_than_the_swarm(smollm2_path: Path, tmp_path: Path):
    with Node(tmp_path / "tiny", "--no-mdns", "--memory", "50MB", "--model", str(smollm2_path)) as small:
        small.until(lambda state: any("missing" in i["reason"] for i in state["instances"]))
        [instance] = small.get("/api/swarm")["instances"]
        assert instance["state"] == "waiting"
        assert "50.0 MB" in instance["reason"]
        status, answer = small.post("/v1/completions", {"model": MODEL, "prompt": "hi"})
        assert (status, answer["error"]["code"]) == (503, "not_enough_memory")
        assert answer["error"]["message"] == instance["reason"]
        done = swarmd(small, "run", MODEL, "hi")
        assert done.returncode == 1
        assert instance["reason"] in " ".join(done.stderr.split())
        assert small.get("/health") == {"status": "ok", "ready": []}
        assert instance["reason"] in " ".join(swarmd(small, "status").stdout.split())
