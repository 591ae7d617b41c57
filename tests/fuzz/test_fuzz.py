"""A fast subset of `make fuzz`: every target, with the inputs that once broke it, and the engine itself.

A whole run is described in docs/fuzzing.md.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random

import msgspec
import pytest
from fuzz.engine import SEEDS, Examiner, Inputs, Target, Violation, kept
from fuzz.mutate import mutate
from fuzz.supervisor import supervise
from fuzz.targets import TARGETS
from fuzz.trees import Sampler, to_msgpack

from swarmd.node.cluster.messages import DAEMON_MESSAGES

if sys.platform != "linux":
    pytest.skip("the bounds on time and memory are Linux'", allow_module_level=True)


@pytest.fixture(params=sorted(TARGETS))
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    made = TARGETS[request.param]()
    yield made
    made.close()


def test_what_once_broke_a_target_no_longer_does(target: Target) -> None:
    target.seeds()
    with Examiner(target, limit_address_space=False) as examiner:
        for data in kept(target.name).values():
            examiner.examine(data)


def test_every_kept_input_belongs_to_a_target() -> None:
    assert {folder.name for folder in SEEDS.iterdir()} <= {name.replace(" ", "-") for name in TARGETS}


@pytest.mark.slow
def test_a_short_run_of_all_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    results = list(supervise(6_000, 0, 7, [], tmp_path))
    assert [result.target for result in results] == list(TARGETS)
    assert [failure for result in results for failure in result.failures] == []
    assert all(result.inputs >= 20 and result.outcomes > 1 for result in results)


def test_the_same_seed_gives_the_same_inputs() -> None:
    def some(seed: int) -> list[bytes]:
        return list(islice(Inputs(TARGETS["messages"](), seed), 200))

    assert some(1) == some(1) != some(2)


def test_mutations_differ_and_repeat() -> None:
    data = bytes(range(200))
    made = [mutate(Random(number), data, b"other") for number in range(300)]
    assert made == [mutate(Random(number), data, b"other") for number in range(300)]
    assert len(set(made)) > 250


def test_sampled_messages_are_those_that_a_peer_may_send() -> None:
    random, sampler = Random(3), Sampler()
    vocabulary = TARGETS["messages"]
    for kind in DAEMON_MESSAGES * 5:
        assert isinstance(msgspec.msgpack.decode(to_msgpack(sampler.message(random, kind)), type=kind), kind)
    assert vocabulary().make(Random(1), [b"\x80"])


class _Bad(Target):
    """A parser with every fault that is looked for."""

    name = "bad"
    errors = (ValueError,)

    def run(self, data: bytes) -> str:
        if data == b"slow":
            while True:
                time.process_time()
        if data == b"large":
            return str(len(bytearray(8 << 20)))
        if data == b"crash":
            raise KeyError("x")
        raise ValueError("refused")


@pytest.mark.parametrize(
    ("data", "says"), [(b"slow", "more than"), (b"large", "the bound is"), (b"crash", "KeyError"), (b"other", None)]
)
def test_the_examiner_finds(monkeypatch: pytest.MonkeyPatch, data: bytes, says: str | None) -> None:
    monkeypatch.setattr("fuzz.engine.CPU_SECONDS", 0.2)
    with Examiner(_Bad(), limit_address_space=False) as examiner:
        if says is None:
            assert examiner.examine(data) == "ValueError: refused"
            return
        with pytest.raises(Violation, match=says):
            examiner.examine(data)
