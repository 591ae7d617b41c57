"""Three machines (network namespaces on a bridge): the swarm works over a real network, with and without multicast."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.netns import Lan, why_unavailable
from support.swarm import Node, join
from support.three_nodes import STORY, options, split_model, three_nodes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.netns,
    pytest.mark.timeout(240),
    pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable())),
]


@pytest.fixture
def lan() -> Iterator[Lan]:
    with Lan(3) as lan:
        yield lan


def assert_all_answer_like(nodes: list[Node], alone: Any) -> None:
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(lambda node: node.answer(STORY, max_tokens=alone.completion_tokens), nodes))
    assert answers == [alone] * len(nodes)


def test_machines_on_one_network_find_each_other_and_answer_as_one(
    lan: Lan, tmp_path: Path, smollm2_path: Path, solo: Any
) -> None:
    alone = solo(STORY, max_tokens=100)
    assert alone.completion_tokens == 100
    with three_nodes(tmp_path, smollm2_path, lan.names) as nodes:
        assert_all_answer_like(nodes, alone)


@pytest.mark.skipif(shutil.which("nft") is None, reason="dropping multicast needs nftables")
def test_without_multicast_one_named_peer_brings_the_whole_swarm(
    lan: Lan, tmp_path: Path, smollm2_path: Path, solo: Any
) -> None:
    lan.drop_multicast()
    with Node(tmp_path / "large", *options("large"), namespace=lan.names[0]) as first:
        token, peer = first.token(), ("--peer", f"{lan.address(0)}:{first.link_port}")
        # Nobody told this node of anybody: it has looked around for as long as the third takes to start and to join.
        with join(token, tmp_path / "medium", *options("medium"), namespace=lan.names[1]) as alone:
            assert alone.url
            with join(token, tmp_path / "small", *options("small"), *peer, namespace=lan.names[2]) as third:
                third.until_members(2)
                assert names(first) == names(third) == {"large", "small"}
                assert names(alone) == {"medium"}
                alone.stop()
                with join(token, alone.data_dir, *options("medium"), *peer, namespace=lan.names[1]) as second:
                    # The second and third were told of the first only: they know of each other by gossip.
                    split_model([first, second, third], smollm2_path)
                    assert_all_answer_like([first, second, third], solo(STORY, max_tokens=24))


def names(node: Node) -> set[str]:
    return {seen["name"] for seen in node.get("/api/swarm")["nodes"]}
