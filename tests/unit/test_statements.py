"""Denials: only the swarm's authority makes them, the latest of a node counts, and they are bounded in number."""

from __future__ import annotations

import msgspec
import pytest
from msgspec.structs import replace

from swarmd.transport import statements
from swarmd.transport.authority import authority_key
from swarmd.transport.denial_files import changed_at, forget_denials, read_denials, save_denial
from swarmd.transport.statements import MAX_DENIALS, Denial, Denials, StatementError, admit_all, deny
from swarmd.transport.token import JoinToken

TOKEN, OTHER = JoinToken(bytes(range(20))), JoinToken(bytes(20))
A, B = "a" * 64, "b" * 64


def known(*tokens: JoinToken) -> Denials:
    return Denials({token.swarm_tag: authority_key(token).public_key() for token in tokens or (TOKEN,)})


def test_an_eviction_holds_until_a_later_word():
    denials = known()
    assert denials.refused == {}
    out = deny(TOKEN, A, "gamer", 1_764_217_800, serial=5)
    assert denials.admit(out)
    assert denials.refused == {A: "evicted from this swarm on 2025-11-27 at 04:30 UTC"}
    assert not denials.admit(out), "told twice"
    back = deny(TOKEN, A, "gamer", 1, serial=6, evicted=False)
    assert denials.admit(back)
    assert denials.refused == {}
    assert not denials.admit(out), "a replay of what was taken back"
    assert denials.all == (back,)


def test_of_two_made_at_once_the_eviction_counts_in_either_order():
    out, back = deny(TOKEN, A, "x", 1, 5), deny(TOKEN, A, "x", 1, 5, evicted=False)
    for order in ((out, back), (back, out)):
        denials = known()
        admit_all(denials, order)
        assert denials.all == (out,)


def test_serials_grow_even_if_the_clock_was_set_back():
    denials = known()
    denials.admit(deny(TOKEN, A, "x", 1, 1_000))
    assert denials.next_serial(A, 400) == 1_001
    assert denials.next_serial(A, 2_000) == 2_000
    assert denials.next_serial(B, 400) == 400


@pytest.mark.parametrize(
    "change",
    [{"node": B}, {"name": "other"}, {"at": 2}, {"serial": 6}, {"evicted": False}, {"signature": bytes(64)}],
    ids=lambda change: next(iter(change)),
)
def test_no_field_can_be_changed(change):
    with pytest.raises(StatementError, match="signature is not of this swarm's authority"):
        known().admit(replace(deny(TOKEN, A, "x", 1, 5), **change))


def test_another_swarms_authority_is_not_heard():
    with pytest.raises(StatementError, match="another swarm"):
        known().admit(deny(OTHER, A, "x", 1, 5))
    with pytest.raises(StatementError, match="signature"):
        known().admit(replace(deny(OTHER, A, "x", 1, 5), swarm=TOKEN.swarm_tag))


def test_a_signature_of_another_purpose_is_none(monkeypatch):
    """The same key also signs certificates and other statements: each kind has its own domain."""
    monkeypatch.setitem(statements._DOMAINS, Denial, b"swarmd/1 something else")
    foreign = deny(TOKEN, A, "x", 1, 5)
    monkeypatch.undo()
    with pytest.raises(StatementError, match="signature"):
        known().admit(foreign)


def test_the_number_is_bounded_and_says_what_to_do():
    denials = known()
    for number in range(MAX_DENIALS):
        denials.admit(deny(TOKEN, f"{number:064x}", "x", 1, 1))
    with pytest.raises(StatementError, match="swarmd rotate"):
        denials.admit(deny(TOKEN, A, "x", 1, 1))
    assert denials.admit(deny(TOKEN, f"{7:064x}", "x", 1, 2, evicted=False)), "what is known can still change"


def test_a_flood_of_forged_ones_costs_one_check(monkeypatch):
    checks = []
    real = statements.is_signed_by
    monkeypatch.setattr(statements, "is_signed_by", lambda *words: checks.append(words) or real(*words))
    forged = [replace(deny(TOKEN, f"{n:064x}", "x", 1, 1), at=9) for n in range(50)]
    good = deny(TOKEN, A, "x", 1, 1)
    news, error = admit_all(known(), [good, *forged])
    assert news == [good]
    assert isinstance(error, StatementError)
    assert len(checks) == 2


def test_a_new_authority_forgets_what_the_old_one_said():
    denials = known()
    denials.admit(deny(TOKEN, A, "x", 1, 1))
    denials.trust({tag: authority_key(t).public_key() for t in (TOKEN, OTHER) for tag in [t.swarm_tag]})
    denials.admit(deny(OTHER, B, "y", 1, 1))
    assert denials.refused.keys() == {A, B}
    denials.trust({OTHER.swarm_tag: authority_key(OTHER).public_key()})
    assert denials.refused.keys() == {B}


def test_names_and_dates_are_fit_for_a_log():
    assert deny(TOKEN, A, "a\nb" + "c" * 99, 1, 1).name == "ab" + "c" * 62
    assert deny(TOKEN, A, "x", 2**62, 1).reason.endswith("an unknown date")


def test_they_are_kept_and_what_was_damaged_or_is_foreign_is_named(tmp_path, caplog):
    assert changed_at(tmp_path) == 0
    out = deny(TOKEN, A, "gamer", 1, 5)
    save_denial(tmp_path, out)
    assert changed_at(tmp_path) > 0
    denials = known()
    assert read_denials(tmp_path, denials) == [out]
    assert read_denials(tmp_path, denials) == [], "nothing new"
    later = deny(TOKEN, A, "gamer", 2, 6, evicted=False)
    save_denial(tmp_path, later)
    assert read_denials(tmp_path, denials) == [later]
    save_denial(tmp_path, deny(OTHER, B, "x", 1, 1))
    (tmp_path / "denials" / ("c" * 64)).write_bytes(msgspec.msgpack.encode([1, 2]))
    assert read_denials(tmp_path, denials) == []
    assert len([r for r in caplog.records if "does not count" in r.getMessage()]) == 2
    forget_denials(tmp_path, denials)
    assert [path.name for path in (tmp_path / "denials").iterdir()] == [A]
