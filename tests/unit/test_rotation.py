"""A change of the join token on one node: what it accepts, what it keeps, and that it can be killed at any moment."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from msgspec.structs import replace
from support.link_fakes import Recorder, endpoint

from swarmd.transport import rotation
from swarmd.transport.authority import authority_certificate
from swarmd.transport.denial_files import read_denials, save_denial
from swarmd.transport.endpoint import LinkRefused
from swarmd.transport.identity import (
    Credentials,
    IdentityError,
    issue_credentials,
    load_credentials,
    load_or_create_node_key,
    load_token,
    save_credentials,
    save_token,
)
from swarmd.transport.rotation import accept_handover, accept_offer, announce, certify, finish, hand_over
from swarmd.transport.rotation_file import RotationFile, load_rotation, save_rotation
from swarmd.transport.statements import Denials, StatementError, deny, signed
from swarmd.transport.token import JoinToken

OLD, NEW, THIRD = JoinToken(bytes(20)), JoinToken(bytes(range(20))), JoinToken(bytes([7] * 20))
NOW = dt.datetime.now(dt.UTC)


def member(directory: Path) -> Credentials:
    """A node of the old swarm, as its data dir holds it."""
    credentials = issue_credentials(load_or_create_node_key(directory), OLD)
    save_credentials(directory, credentials)
    return credentials


def leaf(credentials: Credentials, token: JoinToken = NEW) -> bytes:
    """A node's certificate under a token's authority."""
    der = x509.load_pem_x509_certificate(credentials.certificate_pem).public_bytes(Encoding.DER)
    return certify(der, token, NOW)


def prepare(directory: Path, token: JoinToken = NEW) -> Credentials:
    own = member(directory)
    save_rotation(directory, accept_offer(own, None, announce(OLD, token, 1), leaf(own, token), 10))
    prepared = load_credentials(directory)
    assert prepared is not None
    return prepared


def switch(directory: Path, members: tuple[str, ...] = ()) -> Credentials:
    own = prepare(directory)
    order = hand_over(OLD, NEW, (own.node_id, *members))
    save_rotation(directory, accept_handover(own, load_rotation(directory), order, 20))
    switched = load_credentials(directory)
    assert switched is not None
    return switched


def test_the_three_steps_of_a_member(tmp_path):
    own = member(tmp_path)
    prepared = prepare(tmp_path)
    assert prepared.node_id == own.node_id
    assert prepared.swarm_tag == OLD.swarm_tag, "it shows the old certificate"
    assert prepared.swarm_tags == {OLD.swarm_tag, NEW.swarm_tag}
    switched = switch(tmp_path, ("b" * 64,))
    assert switched.swarm_tag == NEW.swarm_tag
    assert switched.swarm_tags == {OLD.swarm_tag, NEW.swarm_tag}
    kept = load_rotation(tmp_path)
    assert kept is not None
    assert set(kept.members) == {own.node_id, "b" * 64}
    save_denial(tmp_path, deny(OLD, "c" * 64, "x", 1, 1))
    finish(tmp_path)
    done = load_credentials(tmp_path)
    assert done is not None
    assert (done.node_id, done.swarm_tags) == (own.node_id, {NEW.swarm_tag})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["denials", "node.crt", "node.key", "swarm.crt"]
    assert read_denials(tmp_path, Denials(done.authority_keys())) == [], "what the old authority denied is forgotten"
    finish(tmp_path)  # nothing is left to do


def root_of(token: JoinToken) -> bytes:
    return authority_certificate(token).public_bytes(Encoding.DER)


@pytest.mark.parametrize(
    ("offer", "says"),
    [
        (lambda own, other: (announce(THIRD, NEW, 5), leaf(own)), "signature"),
        (lambda own, other: (replace(announce(THIRD, NEW, 5), swarm=OLD.swarm_tag), leaf(own)), "signature"),
        (lambda own, other: (replace(announce(OLD, NEW, 5), serial=6), leaf(own)), "signature"),
        (lambda own, other: (replace(announce(OLD, NEW, 5), authority=root_of(THIRD)), leaf(own, THIRD)), "signature"),
        (lambda own, other: (announce(OLD, NEW, 5), leaf(own, THIRD)), "do not belong together"),
        (lambda own, other: (announce(OLD, NEW, 5), b"\x30garbage"), "do not belong together"),
        (lambda own, other: (announce(OLD, NEW, 5), leaf(other)), "for another node"),
        (lambda own, other: (announce(OLD, OLD, 5), leaf(own, OLD)), "changes nothing"),
        # A member's own certificate in the place of an authority, which not even the old authority can make one.
        (lambda own, other: (signed(replace(announce(OLD, NEW, 5), authority=leaf(own)), OLD), leaf(own)), "belong"),
    ],
)
def test_offers_that_do_not_hold_change_nothing(tmp_path, offer, says):
    own, other = member(tmp_path), member(tmp_path / "other")
    succession, certificate = offer(own, other)
    with pytest.raises(StatementError, match=says):
        accept_offer(own, None, succession, certificate, 10)


def test_a_later_offer_replaces_an_earlier_one_and_not_the_other_way_round(tmp_path):
    own = member(tmp_path)
    later = accept_offer(own, None, announce(OLD, NEW, 9), leaf(own), 10)
    with pytest.raises(StatementError, match="a later change"):
        accept_offer(own, later, announce(OLD, THIRD, 8), leaf(own, THIRD), 11)
    assert accept_offer(own, later, announce(OLD, THIRD, 10), leaf(own, THIRD), 11).serial == 10
    with pytest.raises(StatementError, match="already"):
        accept_offer(own, replace(later, phase="switched"), announce(OLD, THIRD, 10), leaf(own, THIRD), 11)
    asked = RotationFile("asked", 1, token=str(THIRD))
    with pytest.raises(StatementError, match="already"):
        accept_offer(own, asked, announce(OLD, NEW, 10), leaf(own), 11)


@pytest.mark.parametrize(
    ("order", "says"),
    [
        (hand_over(THIRD, NEW, []), "signature"),
        (replace(hand_over(OLD, NEW, []), members=("a" * 64,)), "signature"),
        (replace(hand_over(OLD, THIRD, []), successor=NEW.swarm_tag), "signature"),
        (hand_over(OLD, THIRD, []), "another authority"),
    ],
)
def test_orders_to_switch_that_do_not_hold_change_nothing(tmp_path, order, says):
    prepared = prepare(tmp_path)
    with pytest.raises(StatementError, match=says):
        accept_handover(prepared, load_rotation(tmp_path), order, 20)


def test_who_was_not_prepared_cannot_switch(tmp_path):
    own = member(tmp_path)
    for present in (None, RotationFile("asked", 1, token=str(NEW))):
        with pytest.raises(StatementError, match="holds no certificate"):
            accept_handover(own, present, hand_over(OLD, NEW, [own.node_id]), 20)


def test_the_node_that_keeps_the_token_keeps_the_new_one_and_others_none(tmp_path):
    for name, token, expected in (("founder", str(NEW), NEW), ("copy", "", None)):
        switch(tmp_path / name)
        save_token(tmp_path / name, OLD)
        present = load_rotation(tmp_path / name)
        assert present is not None
        save_rotation(tmp_path / name, replace(present, token=token))
        finish(tmp_path / name)
        assert load_token(tmp_path / name) == expected


class KilledError(BaseException):
    """SIGKILL, as far as files can tell."""


@pytest.mark.parametrize("step", range(6))
def test_a_node_that_is_killed_in_the_end_phase_comes_back_and_finishes(tmp_path, monkeypatch, step):
    own = switch(tmp_path)
    save_token(tmp_path, OLD)
    present = load_rotation(tmp_path)
    assert present is not None
    save_rotation(tmp_path, replace(present, token=str(NEW)))
    left = [step]

    def dying(name):
        real = getattr(rotation, name)

        def step_or_die(*words, **more):
            if left[0] == 0:
                raise KilledError
            left[0] -= 1
            return real(*words, **more)

        return step_or_die

    with monkeypatch.context() as patch:
        for name in ("write_file", "save_token", "forget_denials", "end_rotation"):
            patch.setattr(rotation, name, dying(name))
        if step < 5:
            with pytest.raises(KilledError):
                finish(tmp_path)
        else:
            finish(tmp_path)
    back = load_credentials(tmp_path)
    assert back is not None
    assert (back.node_id, back.swarm_tag) == (own.node_id, NEW.swarm_tag)
    finish(tmp_path)
    assert load_rotation(tmp_path) is None
    assert load_token(tmp_path) == NEW
    done = load_credentials(tmp_path)
    assert done is not None
    assert done.swarm_tags == {NEW.swarm_tag}


def test_the_file_is_private_shows_no_token_and_a_damaged_one_is_named(tmp_path):
    own = prepare(tmp_path)
    path = tmp_path / "rotation"
    assert path.stat().st_mode & 0o777 == 0o600
    assert str(NEW)[8:] not in repr(RotationFile("asked", 1, token=str(NEW)))
    save_rotation(tmp_path, RotationFile("asked", 1, token=str(NEW)), replace=False)
    assert load_credentials(tmp_path) == own, "one that is under way is not replaced"
    path.write_bytes(b"{")
    with pytest.raises(IdentityError, match="rotation is damaged"):
        load_credentials(tmp_path)
    path.chmod(0o644)
    with pytest.raises(IdentityError, match="chmod 600"):
        load_credentials(tmp_path)


def in_phase(directory: Path, phase: str) -> Credentials:
    match phase:
        case "old":
            return member(directory)
        case "prepared":
            return prepare(directory)
        case "switched":
            return switch(directory)
    switch(directory)
    finish(directory)
    new = load_credentials(directory)
    assert new is not None
    return new


# Who dials whom and gets a link: all but who has only the old certificate with who accepts only the new one.
MEETS = {
    ("old", "old"): True,
    ("old", "prepared"): True,
    ("prepared", "old"): True,
    ("prepared", "prepared"): True,
    ("prepared", "switched"): True,
    ("switched", "prepared"): True,
    ("switched", "switched"): True,
    ("switched", "old"): True,
    ("old", "switched"): True,
    ("switched", "new"): True,
    ("new", "switched"): True,
    ("prepared", "new"): True,
    ("new", "prepared"): True,
    ("new", "new"): True,
    ("old", "new"): False,
    ("new", "old"): False,
}


@pytest.mark.parametrize(("dials", "accepts"), MEETS, ids="-".join)
async def test_who_meets_whom_in_a_rotation(tmp_path, dials, accepts):
    async with (
        endpoint(in_phase(tmp_path / "here", dials), Recorder()) as here,
        endpoint(in_phase(tmp_path / "there", accepts), Recorder()) as there,
    ):
        port = await there.listen("127.0.0.1", 0)
        if MEETS[dials, accepts]:
            link = await here.dial("127.0.0.1", port, expect=there.node_id)
            assert link.peer_id == there.node_id
        else:
            with pytest.raises(LinkRefused, match="another swarm"):
                await here.dial("127.0.0.1", port)


async def test_links_stay_while_credentials_change_and_those_of_before_end_for_all_but_members(tmp_path):
    old = [in_phase(tmp_path / name, "old") for name in ("member", "thief", "this")]
    sides = [Recorder() for _ in old]
    async with (
        endpoint(old[0], sides[0]) as friend,
        endpoint(old[1], sides[1]) as thief,
        endpoint(old[2], sides[2]) as this,
    ):
        kept = await this.dial("127.0.0.1", await friend.listen("127.0.0.1", 0))
        cut = await this.dial("127.0.0.1", await thief.listen("127.0.0.1", 0))
        this.adopt(switch(tmp_path / "this"))
        this.adopt(in_phase(tmp_path / "this", "new"))
        assert set(this.links) == {kept, cut}
        this.keep_only([friend.node_id])
        await cut.wait_closed()
        assert set(this.links) == {kept}
        await sides[1].until(lambda: sides[1].closed)
        assert "new join token" in sides[1].closed[0][1]
