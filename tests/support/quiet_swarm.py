"""A founder and members that serve nothing and know each other by address: for tests of who belongs to a swarm."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from support.swarm import Node, join

QUIET = ("--model", "none", "--no-mdns")


class Swarm:
    """A founder, and members that know where it is."""

    def __init__(self, root: Path, founder: Node) -> None:
        self.root = root
        self.founder = founder
        self.token = founder.token()
        self.peer = ("--peer", f"127.0.0.1:{founder.link_port}")

    def join(self, name: str, *more: str) -> Node:
        """A member of this name."""
        return join(self.token, self.root / name, *QUIET, *self.peer, *more)


def refusal(node: Node, *arguments: str) -> str:
    """What a command that fails says."""
    with pytest.raises(subprocess.CalledProcessError) as caught:
        node.command(*arguments)
    return caught.value.stderr


def until_gone(here: Node, other: Node) -> None:
    """Wait until a node no longer counts on another."""
    here.until(lambda s: all(n["state"] == "gone" for n in s["nodes"] if n["id"] == other.id), seconds=10)
