"""Keys and certificates: derived alike everywhere, kept safely, refused with a remedy when damaged."""

import datetime as dt
import hashlib
import os
import stat

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from swarmd.transport import authority
from swarmd.transport.identity import (
    IdentityError,
    issue_credentials,
    load_credentials,
    load_or_create_node_key,
    load_token,
    node_id_of_certificate,
    save_credentials,
    save_token,
)
from swarmd.transport.token import JoinToken

TOKEN = JoinToken(bytes(range(20)))


def test_the_authority_is_the_same_bytes_on_every_node():
    # A known answer: a library or a code change that altered one byte would split existing swarms.
    der = authority.authority_certificate(TOKEN).public_bytes(Encoding.DER)
    assert der == authority.authority_certificate(JoinToken.parse(str(TOKEN))).public_bytes(Encoding.DER)
    assert hashlib.sha256(der).hexdigest() == ("6ea07af63fd8e3c96497c09884811007df0a36f2c42ffad52ce4eaf478b9a689")


def test_the_leaf_names_its_node_and_tolerates_slow_clocks(tmp_path):
    key = load_or_create_node_key(tmp_path)
    credentials = issue_credentials(key, TOKEN)
    leaf = x509.load_pem_x509_certificate(credentials.certificate_pem)
    assert credentials.node_id == node_id_of_certificate(leaf.public_bytes(Encoding.DER))
    assert len(credentials.node_id) == 64
    assert credentials.swarm_tag == TOKEN.swarm_tag
    assert dt.datetime.now(dt.UTC) - leaf.not_valid_before_utc > dt.timedelta(days=6)
    leaf.verify_directly_issued_by(authority.authority_certificate(TOKEN))


def test_the_node_id_survives_restarts_and_new_tokens(tmp_path):
    first = issue_credentials(load_or_create_node_key(tmp_path), TOKEN)
    second = issue_credentials(load_or_create_node_key(tmp_path), JoinToken.generate())
    assert first.node_id == second.node_id
    assert first.authority_pem != second.authority_pem


def test_saved_credentials_come_back_and_secrets_are_private(tmp_path):
    directory = tmp_path / "deep" / "data"
    assert load_credentials(directory) is None
    assert load_token(directory) is None
    credentials = issue_credentials(load_or_create_node_key(directory), TOKEN)
    assert load_credentials(directory) is None
    save_credentials(directory, credentials)
    save_token(directory, TOKEN)
    assert load_credentials(directory) == credentials
    assert load_token(directory) == TOKEN
    for name in ("node.key", "token"):
        assert stat.S_IMODE((directory / name).stat().st_mode) == 0o600
    assert sorted(path.name for path in directory.iterdir()) == ["node.crt", "node.key", "swarm.crt", "token"]


def test_repr_shows_no_key(tmp_path):
    credentials = issue_credentials(load_or_create_node_key(tmp_path), TOKEN)
    assert "PRIVATE" not in repr(credentials)
    assert credentials.key_pem.decode().splitlines()[1] not in repr(credentials)


def test_a_key_open_to_others_is_refused_with_the_remedy(tmp_path):
    load_or_create_node_key(tmp_path)
    (tmp_path / "node.key").chmod(0o644)
    with pytest.raises(IdentityError, match=r"chmod 600 .*node\.key"):
        load_or_create_node_key(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a key", b"\xff\xfe\x00"])
def test_a_damaged_key_is_never_replaced_silently(tmp_path, content):
    path = tmp_path / "node.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(IdentityError, match=r"node\.key is damaged"):
        load_or_create_node_key(tmp_path)
    assert path.read_bytes() == content


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    credentials = issue_credentials(load_or_create_node_key(tmp_path), TOKEN)
    other_swarm = issue_credentials(load_or_create_node_key(tmp_path), JoinToken.generate())
    other_node = issue_credentials(load_or_create_node_key(tmp_path / "other"), TOKEN)
    save_credentials(tmp_path, credentials)
    (tmp_path / "swarm.crt").write_bytes(other_swarm.authority_pem)
    with pytest.raises(IdentityError, match=r"swarmd join TOKEN"):
        load_credentials(tmp_path)
    save_credentials(tmp_path, credentials)
    (tmp_path / "node.crt").write_bytes(other_node.certificate_pem)
    with pytest.raises(IdentityError, match="belongs to another key"):
        load_credentials(tmp_path)
    (tmp_path / "node.crt").write_bytes(b"garbage")
    with pytest.raises(IdentityError, match=r"node\.crt is damaged"):
        load_credentials(tmp_path)
    # A node's certificate in the place of the authority's is no authority.
    (tmp_path / "node.crt").write_bytes(credentials.certificate_pem)
    (tmp_path / "swarm.crt").write_bytes(credentials.certificate_pem)
    with pytest.raises(IdentityError, match="was not issued by"):
        load_credentials(tmp_path)


def test_a_damaged_token_is_refused_without_repeating_it(tmp_path):
    save_token(tmp_path, TOKEN)
    damaged = str(TOKEN)[:-1] + "N"
    (tmp_path / "token").write_text(damaged)
    with pytest.raises(IdentityError, match="token is damaged") as caught:
        load_token(tmp_path)
    assert damaged[8:] not in str(caught.value)


def test_unusable_paths_are_named(tmp_path):
    (tmp_path / "node.key").mkdir()
    with pytest.raises(IdentityError, match=r"cannot read .*node\.key"):
        load_or_create_node_key(tmp_path)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(IdentityError, match=r"cannot (read|write) .*token"):
        save_token(blocked, TOKEN)


def test_the_first_of_two_starts_wins(tmp_path, monkeypatch):
    # The second start looked before the first had written: it must not overwrite the key.
    first = load_or_create_node_key(tmp_path)
    from swarmd.transport import identity

    real, looks = identity.read_file, []

    def blind_once(path, *, private=False):
        looks.append(path)
        return None if len(looks) == 1 else real(path, private=private)

    monkeypatch.setattr(identity, "read_file", blind_once)
    assert load_or_create_node_key(tmp_path).private_bytes_raw() == first.private_bytes_raw()
    assert os.listdir(tmp_path) == ["node.key"]
