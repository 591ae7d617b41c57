"""Node keys from a seed, so that tests decide whose id is the lowest: that node is the heir of whatever is orphaned."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from swarmd.transport.authority import node_id_of_key
from swarmd.transport.identity import KEY_FILE


def give_identities(data_dirs: Sequence[Path], seed: int) -> None:
    """Write a key into each data dir (made if need be, none may have one yet); the first gets the lowest node id."""
    seeds = (hashlib.sha256(f"swarmd test node {seed} {index}".encode()).digest() for index in range(len(data_dirs)))
    keys = sorted(map(Ed25519PrivateKey.from_private_bytes, seeds), key=lambda key: node_id_of_key(key.public_key()))
    for data_dir, key in zip(data_dirs, keys, strict=True):
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = data_dir / KEY_FILE
        assert not path.exists(), f"{data_dir} has an identity already"
        path.touch(0o600)
        path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
