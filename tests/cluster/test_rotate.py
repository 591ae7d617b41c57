"""`swarmd rotate` among real daemons: streams go on, the old token is worthless, a crash locks nobody out."""

from __future__ import annotations

import datetime as dt
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from support.quiet_swarm import QUIET, Swarm, refusal
from support.swarm import Node, join
from support.three_nodes import STORY, options

from swarmd.transport.identity import load_credentials
from swarmd.transport.rotation import accept_offer, announce, certify
from swarmd.transport.rotation_file import RotationFile, load_rotation, save_rotation
from swarmd.transport.token import JoinToken

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    with Node(tmp_path / "founder", *QUIET) as founder:
        yield Swarm(tmp_path, founder)


def swarm_of(data_dir: Path) -> str:
    credentials = load_credentials(data_dir)
    assert credentials is not None
    return credentials.swarm_tag


def until_phase(data_dir: Path, phase: str | None, seconds: float = 30) -> None:
    """Wait until the rotation on disk is in a phase; None: until it is over."""
    deadline = time.monotonic() + seconds
    while (found := load_rotation(data_dir)) is None or found.phase != phase:
        if found is None and phase is None:
            return
        assert time.monotonic() < deadline, f"{data_dir} is not {phase}: {found}"


def test_the_token_is_replaced_and_the_old_one_is_worthless(swarm: Swarm) -> None:
    founder, old = swarm.founder, swarm.token
    with swarm.join("attic") as attic, swarm.join("away") as away, swarm.join("gamer") as gamer:
        for node in (founder, attic, away, gamer):
            node.until_members(4)
        ids = [node.id for node in (founder, attic, away, gamer)]
        away.stop()
        founder.command("evict", "gamer")
        attic.until_said("node gamer .* was evicted")
        said = founder.command("rotate")
        assert "2 node(s) have new certificates" in said
        assert f"have to join again with the new token:\n  away ({away.id[:12]})" in said
        assert "gamer" not in said
        new = founder.token()
        assert new != old
        until_phase(attic.data_dir, None)
        assert swarm_of(founder.data_dir) == swarm_of(attic.data_dir) == JoinToken.parse(new).swarm_tag
        # The links stayed up, and new ones come about.
        assert "is suspect" not in attic.log
        assert not any(node.id == found["id"] for node in (away, gamer) for found in alive(attic))
        attic.stop()
        with Node(attic.data_dir, *QUIET, *swarm.peer) as attic_again:
            attic_again.until_members(2)
            assert [founder.id, attic_again.id] == ids[:2]
            gamer.stop()
            for name in ("thief", "gamer", "away"):
                late = swarm.join(name) if name == "thief" else Node(swarm.root / name, *QUIET, *swarm.peer)
                with late:
                    late.until_said(r"no link to 127.0.0.1 port \d+: .*another swarm")
            with join(new, away.data_dir, *QUIET, *swarm.peer) as back:
                back.until_members(3)
                assert back.id == away.id
        secrets = [old, new, *(JoinToken.parse(token).secret.hex() for token in (old, new))]
        for node in (founder, attic, away, gamer):
            assert not any(secret in node.log for secret in secrets)


def alive(node: Node) -> list[dict[str, object]]:
    return [found for found in node.get("/api/swarm")["nodes"] if found["state"] == "alive"]


def test_only_a_running_founder_rotates(swarm: Swarm) -> None:
    founder = swarm.founder
    with swarm.join("attic") as attic:
        attic.until_members(2)
        assert "on the machine that founded the swarm" in refusal(attic, "rotate")
    founder.stop()
    assert "no node runs" in refusal(founder, "rotate")
    assert load_rotation(founder.data_dir) is None


def test_a_founder_killed_in_the_middle_finishes_when_it_is_back(swarm: Swarm) -> None:
    founder = swarm.founder
    with swarm.join("attic") as attic:
        founder.until_members(2)
        attic.until_members(2)
        command = [sys.executable, "-m", "swarmd.node.cli.app", "--data-dir", str(founder.data_dir), "rotate"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as rotating:
            until_phase(founder.data_dir, "switched")
            founder.kill()
            rotating.send_signal(signal.SIGINT)
            rotating.wait(20)
        peer = ("--peer", f"127.0.0.1:{attic.link_port}")
        with Node(founder.data_dir, *QUIET, *peer) as again:
            again.until_members(2)
            attic.until_members(2)
            until_phase(founder.data_dir, None)
            until_phase(attic.data_dir, None)
            assert swarm_of(founder.data_dir) == swarm_of(attic.data_dir) != JoinToken.parse(swarm.token).swarm_tag
            assert again.token() != swarm.token


def test_a_member_that_dies_once_it_is_prepared_comes_in_with_what_it_holds(swarm: Swarm) -> None:
    founder, old, new = swarm.founder, JoinToken.parse(swarm.token), JoinToken.generate()
    with swarm.join("attic") as attic:
        founder.until_members(2)
        attic.stop()
    own = load_credentials(attic.data_dir)
    assert own is not None
    der = x509.load_pem_x509_certificate(own.certificate_pem).public_bytes(Encoding.DER)
    certificate = certify(der, new, dt.datetime.now(dt.UTC))
    save_rotation(attic.data_dir, accept_offer(own, None, announce(old, new, 1), certificate, 1))
    save_rotation(founder.data_dir, RotationFile("asked", 1, token=str(new)))
    founder.until_said("only the new join token counts from now on")
    with Node(attic.data_dir, *QUIET, *swarm.peer) as again:
        again.until_members(2)
        again.until_said("the swarm has a new join token")
        until_phase(attic.data_dir, None)
        again.until_members(2)
        assert swarm_of(attic.data_dir) == swarm_of(founder.data_dir) == new.swarm_tag


def test_a_rotation_that_was_asked_for_begins_at_the_next_start(swarm: Swarm) -> None:
    swarm.founder.stop()
    new = JoinToken.generate()
    save_rotation(swarm.founder.data_dir, RotationFile("asked", 1, token=str(new)))
    with Node(swarm.founder.data_dir, *QUIET) as again:
        again.until_said("the swarm has a new join token")
        until_phase(again.data_dir, None)
        assert again.token() == str(new)


def test_a_stream_goes_on_and_stages_of_both_times_work_together(smollm2_path: Path, tmp_path: Path) -> None:
    with Node(tmp_path / "large", *options("large")) as large:
        token = large.token()
        with join(token, tmp_path / "medium", *options("medium")) as medium:
            for node in (large, medium):
                node.until_members(2)
            large.serve(smollm2_path)
            for node in (large, medium):
                node.until_ready(stages=2)
            before = large.text(STORY, max_tokens=24)
            epoch = large.until_ready(stages=2)["epoch"]
            with large.stream(STORY, max_tokens=24) as stream:
                stream.read(4)
                large.command("rotate")
                assert stream.finish().text == before
            until_phase(medium.data_dir, None)
            assert large.text(STORY, max_tokens=24) == before
            assert large.until_ready(stages=2)["epoch"] == epoch, "nothing was planned anew"
            # A stage process of before the change, and one of after it, find each other.
            medium.stage_process().kill()
            large.until(lambda s: any(i["state"] == "ready" and i["epoch"] > epoch for i in s["instances"]))
            assert large.text(STORY, max_tokens=24) == before
