"""`swarmd evict` among real daemons: links end at once, everybody hears of it, the expelled one stays calm."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.quiet_swarm import QUIET, Swarm, refusal, until_gone
from support.swarm import Node, join
from support.three_nodes import STORY, options

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    with Node(tmp_path / "founder", *QUIET) as founder:
        yield Swarm(tmp_path, founder)


def test_a_member_is_expelled_everywhere_and_let_in_again(swarm: Swarm) -> None:
    founder = swarm.founder
    with swarm.join("gamer") as gamer, swarm.join("attic") as attic:
        for node in (founder, gamer, attic):
            node.until_members(3)
        assert "gamer" in founder.command("evict", gamer.id[:8])
        for node in (founder, attic):
            until_gone(node, gamer)
            node.until_said("node gamer .* was evicted from this swarm on .*links with it are closed and refused")
            [evicted] = node.get("/api/swarm")["evicted"]
            assert (evicted["id"], evicted["name"]) == (gamer.id, "gamer")
        # It knows, by the authority's own word, knocks once more and is told why; each refuses it in one line.
        gamer.until_said(r"this node was evicted from this swarm on .*`swarmd join TOKEN`.*swarmd evict --undo")
        gamer.until_said("a member says that this node was evicted")
        founder.until_said(f"refused a connection from .*: node {gamer.id[:12]} is evicted from this swarm on")
        gamer.until(lambda s: sum(n["state"] == "alive" for n in s["nodes"]) == 1)
        assert founder.log.count("refused a connection") == 1
        assert "evicted: gamer" in founder.command("status")
        assert "already" in refusal(founder, "evict", "gamer")

        founder.command("evict", "gamer", "--undo")
        for node in (founder, gamer, attic):
            node.until_members(3)
        assert founder.get("/api/swarm")["evicted"] == []
        assert "is not evicted" in refusal(founder, "evict", "gamer", "--undo")


def test_who_was_away_hears_of_it_from_any_member_also_after_restarts(swarm: Swarm) -> None:
    founder = swarm.founder
    with swarm.join("gamer") as gamer, swarm.join("attic") as attic, swarm.join("away") as away:
        for node in (founder, gamer, attic, away):
            node.until_members(4)
        away.stop()
        founder.command("evict", "gamer")
        until_gone(attic, gamer)
        # The founder is no longer there: attic alone, after a restart, has it on disk and passes it on.
        port = attic.link_port
        peers = ("--peer", f"127.0.0.1:{port}", "--peer", f"127.0.0.1:{gamer.link_port}")
        attic.stop()
        founder.stop()
        with (
            Node(swarm.root / "attic", *QUIET, "--port", str(port)) as attic_again,
            Node(swarm.root / "away", *QUIET, *peers) as back,
        ):
            attic_again.until_members(2)
            back.until_said("node gamer .* was evicted")
            until_gone(back, gamer)


def until_pinned(founder: Node, *others: Node) -> None:
    """Wait until the founder has noted on disk whom it has met."""
    path, deadline = founder.data_dir / "nodes.json", time.monotonic() + 20
    while not path.exists() or not all(other.id in path.read_text() for other in others):
        assert time.monotonic() < deadline, "it remembers nobody"


def test_a_decision_made_while_the_founder_is_down_is_told_when_it_starts(swarm: Swarm) -> None:
    founder = swarm.founder
    with swarm.join("gamer") as gamer, swarm.join("attic", "--port", "0") as attic:
        for node in (founder, gamer, attic):
            node.until_members(3)
        ports = [f"127.0.0.1:{node.link_port}" for node in (gamer, attic)]
        until_pinned(founder, gamer, attic)
        founder.stop()
        assert "when this node starts" in founder.command("evict", "gamer")
        with Node(swarm.root / "founder", *QUIET, "--peer", ports[0], "--peer", ports[1]) as again:
            attic.until_said("node gamer .* was evicted")
            until_gone(attic, gamer)
            assert gamer.id not in {n["id"] for n in again.get("/api/swarm")["nodes"]}


def test_who_may_evict_whom(swarm: Swarm) -> None:
    founder = swarm.founder
    with swarm.join("attic") as attic:
        founder.until_members(2)
        attic.until_members(2)
        assert "on the machine that founded the swarm" in refusal(attic, "evict", "founder")
        assert "cannot evict itself" in refusal(founder, "evict", founder.id)
        said = refusal(founder, "evict", "nobody")
        assert "no node is known as 'nobody'" in said
        assert attic.id[:16] in said
    with Node(swarm.root / "twin" / "attic", *QUIET) as stranger:
        assert stranger.url
        assert "never met another one" in refusal(stranger, "evict", "attic")
    with join(swarm.token, swarm.root / "elsewhere" / "attic", *QUIET, *swarm.peer):
        founder.until_said("node attic was known as .*, now another key, .*, says that name")
        assert "may mean several nodes" in refusal(founder, "evict", "attic")
        assert "was known as" in " ".join(founder.command("status").split())


def test_new_nodes_are_announced_once(swarm: Swarm) -> None:
    founder = swarm.founder
    with swarm.join("attic") as attic:
        founder.until_said(f"new node attic .{attic.id[:12]}. joined; it was never seen before")
        [seen] = [n for n in founder.until_members(2)["nodes"] if n["id"] == attic.id]
        assert seen["new"]
        assert seen["first_seen"] > 0
    with Node(swarm.root / "attic", *QUIET, *swarm.peer):
        founder.until_members(2)
    assert founder.log.count("new node attic") == 1


def test_stages_of_an_expelled_node_are_planned_anew(smollm2_path: Path, tmp_path: Path) -> None:
    with Node(tmp_path / "large", *options("large")) as large:
        token = large.token()
        with join(token, tmp_path / "medium", *options("medium")) as medium:
            for node in (large, medium):
                node.until_members(2)
            large.serve(smollm2_path)
            for node in (large, medium):
                node.until_ready(stages=2)
            before = large.text(STORY, max_tokens=16)
            [large_stage, medium_stage] = [node.stage_process() for node in (large, medium)]
            peers = {c.raddr.port for c in large_stage.net_connections() if c.status == "ESTABLISHED"}
            assert peers & {c.laddr.port for c in medium_stage.net_connections()}, "the ring is wired"
            large.command("evict", "medium")
            large.until_ready(stages=1)
            assert large.text(STORY, max_tokens=16) == before
            medium.until_said("this node was evicted")
            medium.until(lambda s: not any(i["state"] == "ready" for i in s["instances"]))
