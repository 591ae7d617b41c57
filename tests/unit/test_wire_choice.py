"""Which type a link gets: the owner's wish, else an end's, else what the ends compute in."""

from __future__ import annotations

import pytest

from swarmd.discovery.records import WireWish
from swarmd.node.cluster.wire_choice import LinkEnd, link_dtype


@pytest.mark.parametrize(
    ("owner", "sender", "receiver", "expected"),
    [
        ("auto", ("cpu", "auto"), ("cpu", "auto"), "f32"),
        ("auto", ("cpu", "auto"), ("mlx-cpu", "auto"), "f32"),
        ("auto", ("cuda", "auto"), ("cpu", "auto"), "bf16"),
        ("auto", ("cpu", "auto"), ("metal", "auto"), "bf16"),
        ("auto", ("cpu", "q8"), ("cpu", "auto"), "q8"),
        ("auto", ("cpu", "auto"), ("cuda", "f32"), "f32"),
        ("auto", ("cpu", "bf16"), ("cpu", "q8"), "q8"),
        ("auto", ("cpu", "f32"), ("cpu", "f16"), "f16"),
        ("f32", ("cuda", "q8"), ("metal", "q8"), "f32"),
        ("q8", ("cpu", "f32"), ("cpu", "f32"), "q8"),
    ],
)
def test_the_choice(
    owner: WireWish, sender: tuple[str, WireWish], receiver: tuple[str, WireWish], expected: str
) -> None:
    assert link_dtype(owner, LinkEnd(*sender), LinkEnd(*receiver)) == expected
