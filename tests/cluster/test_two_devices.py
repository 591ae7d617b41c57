"""One node with two stages of one model: real stage processes, wired to each other over loopback."""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
from support.host_faults import stages_of
from support.stage_swarm import StageSwarm, stage_swarm
from support.swarm import Node
from support.tiny_gguf import TinyModel, write_tiny_gguf

from swarmd.node.engine.computes import require_backend

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

LAYERS = 4


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[StageSwarm]:
    async with stage_swarm(tmp_path) as made:
        yield made


async def test_they_answer_as_one_stage_and_the_loss_of_one_is_told(node: StageSwarm, tmp_path: Path):
    model = write_tiny_gguf(tmp_path / "tiny.gguf", TinyModel(n_layers=LAYERS))
    alone = await node.serve(model, "alone", 0, LAYERS)
    split = await node.serve(model, "split", 0, 1, LAYERS)
    assert sorted((stage.job.instance, stage.job.index) for stage in node.stages) == [
        ("alone", 0),
        ("split", 0),
        ("split", 1),
    ]
    expected = await node.generate("alone", alone)
    assert len(expected) == 24
    assert len(set(expected)) > 1
    assert await node.generate("split", split) == expected
    [second] = [stage.pid for stage in node.stages if stage.job.index == 1]
    psutil.Process(second).kill()
    assert (await node.losses(2)).keys() == {0, 1}, "the one that was killed, and its neighbour in the ring"
    await node.nodes[0].host.stop("split", 0, 1)
    assert [stage.job.instance for stage in node.stages] == ["alone"]
    assert await node.generate("alone", alone) == expected, "another instance goes on"


def why_no_mlx() -> str:
    """Why no stage can compute with MLX here; empty if one can."""
    if importlib.util.find_spec("mlx") is None:
        return "MLX is not installed (pip install 'mlx[cpu]')"
    try:
        require_backend("mlx-cpu")
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.skipif(bool(why_no_mlx()), reason=why_no_mlx())
def test_a_node_with_two_devices_has_a_stage_on_each_and_comes_back_after_a_loss(smollm2_path: Path, tmp_path: Path):
    options = ("--device", "cpu,mlx-cpu", "--memory", "cpu=400MB,mlx-cpu=800MB", "--split", "--context", "1024")
    with Node(tmp_path / "both", *options, "--model", str(smollm2_path), "--no-mdns", "--threads", "1") as node:
        instance = node.until_ready(stages=2)
        assert {stage["device"] for stage in instance["stages"]} == {"cpu", "mlx-cpu"}
        [own] = node.get("/api/swarm")["nodes"]
        assert [(d["id"], d["kind"], d["memory_limit"]) for d in own["devices"]] == [
            ("mlx-cpu", "mlx", 400_000_000),  # half: its KV cache is fp32
            ("cpu", "cpu", 400_000_000),
        ]
        before = node.answer("What is the capital of France?", max_tokens=12)
        assert "Paris" in before.text
        printed = node.command("status")
        assert "mlx-cpu" in printed
        stages = stages_of(node.process.pid)
        assert len(stages) == 2
        stages[0].kill()
        node.until(lambda s: any(i["epoch"] > instance["epoch"] and i["state"] == "ready" for i in s["instances"]), 90)
        assert node.answer("What is the capital of France?", max_tokens=12) == before
