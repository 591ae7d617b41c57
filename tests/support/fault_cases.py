"""The matrix: what befalls a swarm, and what its clients are doing then. For the suite and for bench/recovery.py."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil
from support.fault_lab import FaultLab, Machine
from support.stream_load import Load, Outcome, Question
from support.swarm import Node

Needs = Literal["", "network", "disk"]
Strike = Callable[[FaultLab, Sequence[Node]], AbstractContextManager[None]]

STAGES = 4
CONTEXT = 2048
# Any two of the four that carry can hold the model; the fifth carries nothing.
MEMORY = {"outside": "1MB", "first": "260MB", "second": "240MB", "third": "220MB", "last": "200MB"}
# The heirs of orphans, in this order: first those in the middle of the ring.
HEIRS = ("second", "third", "last", "first", "outside")
DISK = "192m"
# One way; a ring of four stages is then as slow as over a continent.
LONG_LINE_MS = 40
LEAVING_SECONDS = 60
# Nodes that were struck time and again are avoided for ever longer; then it takes minutes until all carry again.
CASES_PER_SWARM = 6


def machines(model: Path, *, disk: bool) -> list[Machine]:
    """The swarm of the matrix: an owner without a stage, and four that carry stages. `disk`: one has its own disk."""
    owners = {"outside": model, "first": model}
    disks = {"third": DISK} if disk else {}
    return [Machine(name, memory, owners.get(name), disks.get(name, "")) for name, memory in MEMORY.items()]


@dataclass(frozen=True)
class Fault:
    """What befalls whom: `victims` are chosen before the clients ask, who do not enter there unless `entered` says so;
    `strike` begins it, and undoes it on leaving."""

    name: str
    victims: Callable[[FaultLab], list[Node]]
    strike: Strike
    needs: Needs = ""
    entered: bool = False


@contextmanager
def _at_once(act: Callable[[], object]) -> Iterator[None]:
    act()
    yield


def _carrier(index: int) -> Callable[[FaultLab], list[Node]]:
    return lambda lab: [lab.carriers()[index]]


def _owner(lab: FaultLab) -> list[Node]:
    return [lab.owner()]


def _first_two(lab: FaultLab) -> list[Node]:
    return lab.carriers()[:2]


def _killed(lab: FaultLab, nodes: Sequence[Node]) -> AbstractContextManager[None]:
    return _at_once(lambda: [lab.kill(node) for node in nodes])


@contextmanager
def _daemon_killed(lab: FaultLab, nodes: Sequence[Node]) -> Iterator[None]:
    """What it leaves behind ends by itself."""
    left = [process for node in nodes for process in lab.kill_daemon(node)]
    yield
    _, alive = psutil.wait_procs(left, timeout=10)
    assert not alive, f"left behind: {alive}"


def _stages_killed(lab: FaultLab, nodes: Sequence[Node]) -> AbstractContextManager[None]:
    return _at_once(lambda: [lab.kill_stages(node) for node in nodes])


@contextmanager
def _leaving(lab: FaultLab, nodes: Sequence[Node]) -> Iterator[None]:
    """Having moved what it carried, it ends by itself."""
    for node in nodes:
        node.process.send_signal(signal.SIGTERM)
    yield
    for node in nodes:
        assert node.process.wait(LEAVING_SECONDS) == 0


def _out_of_memory(lab: FaultLab, nodes: Sequence[Node]) -> AbstractContextManager[None]:
    return _at_once(lambda: [lab.exhaust_memory(node) for node in nodes])


@contextmanager
def _disk_full_when_another_dies(lab: FaultLab, nodes: Sequence[Node]) -> Iterator[None]:
    """Where there is no room for the layers of the dead node, none are put."""
    with lab.full_disk(lab.nodes["third"]):
        for node in nodes:
            lab.kill(node)
        yield


FAULTS = (
    Fault("an owner without a stage is killed", lambda lab: [lab.nodes["outside"]], _killed),
    Fault("an owner in the middle of the ring is killed", _owner, _killed),
    Fault("the driver's node is killed", _carrier(0), _killed),
    Fault("a middle stage's node is killed", _carrier(1), _killed),
    Fault("the last stage's node is killed", _carrier(-1), _killed),
    Fault("a daemon is killed, its stage is not", _carrier(1), _daemon_killed),
    Fault("the driver's process crashes", _carrier(0), _stages_killed, entered=True),
    Fault("a stage process crashes", _carrier(2), _stages_killed, entered=True),
    Fault("the driver's node is paused", _carrier(0), lambda lab, nodes: lab.paused(nodes[0])),
    Fault("a node is paused", _carrier(1), lambda lab, nodes: lab.paused(nodes[0])),
    Fault("a stage process is paused", _carrier(2), lambda lab, nodes: lab.paused_stages(nodes[0]), entered=True),
    Fault("a daemon is paused", _carrier(1), lambda lab, nodes: lab.paused_daemon(nodes[0])),
    Fault("a node is unplugged", _carrier(1), lambda lab, nodes: lab.unplugged(nodes[0]), "network"),
    Fault("the link of two stages is cut", _first_two, lambda lab, nodes: lab.link_cut(*nodes), "network"),
    Fault("the link of two stages is half open", _first_two, lambda lab, nodes: lab.half_open(*nodes), "network"),
    Fault(
        "connections of two stages are reset",
        _first_two,
        lambda lab, nodes: _at_once(lambda: lab.reset(*nodes)),
        "network",
        entered=True,
    ),
    Fault("a node's line becomes long", _carrier(1), lambda lab, nodes: lab.delayed(nodes[0], LONG_LINE_MS), "network"),
    Fault("the driver's node leaves", _carrier(0), _leaving),
    Fault("a node leaves", _carrier(1), _leaving),
    Fault("a stage process gets no more memory", _carrier(1), _out_of_memory, entered=True),
    Fault("a node dies, another's disk is full", _carrier(1), _disk_full_when_another_dies, "disk"),
)

TALE = "Once upon a time there was a lighthouse keeper who wrote down every ship that passed. "
_TOPICS = ("a whale", "the tide", "an old map", "a storm in May", "two gulls", "a lost anchor", "fog", "the last lamp")


SHIPS = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "minLength": 20, "maxLength": 60},
        "ships": {
            "type": "array",
            "items": {"type": "integer", "minimum": 10, "maximum": 99},
            "minItems": 3,
            "maxItems": 4,
        },
    },
    "required": ["title", "ships"],
    "additionalProperties": False,
}
HELD_TO_JSON = {"type": "json_schema", "json_schema": {"name": "ships", "schema": SHIPS}}


def talk(tokens: int = 40) -> list[Question]:
    """Eight short questions, with greedy and seeded draws, penalties, logprobs, stop strings and a JSON schema."""
    ways = (
        {},
        {"temperature": 0.9, "seed": 7},
        {"temperature": 1.1, "seed": 8, "top_p": 0.9, "presence_penalty": 0.8, "frequency_penalty": 0.5},
        {"temperature": 0.9, "seed": 11, "top_logprobs": 3, "response_format": HELD_TO_JSON, "max_tokens": 90},
        {"temperature": 0.8, "seed": 9, "top_k": 40, "repetition_penalty": 1.2},
        {"stop": [" is"]},
        {"temperature": 0.7, "seed": 10, "min_p": 0.05, "stop": ["\n\n", " never"]},
        {"repetition_penalty": 1.3},
    )
    prompts = (f"Tell me a long story about {topic}." for topic in _TOPICS)
    return [Question.of(prompt, **{"max_tokens": tokens, **way}) for prompt, way in zip(prompts, ways, strict=True)]


def long_prompt(number: int, tokens: int = 12) -> Question:
    """A question whose prompt takes a while; no two of different numbers share more than a few tokens."""
    return Question.of(f"{number}. " + TALE * 75 + "What did he write down?", max_tokens=tokens)


@dataclass(frozen=True)
class Phase:
    """What clients are doing when it happens: their questions, and how many tokens some of them have by then."""

    name: str
    questions: Callable[[int], list[Question]]
    talking: int = 0
    talkers: Sequence[int] = field(default=())


PREFILL = Phase("in prefill", lambda number: [long_prompt(number)])
DECODE = Phase("mid-decode", lambda number: talk(40)[:1], 8, (0,))
EIGHT = Phase("8 streams", lambda number: talk(40), 6, range(8))
MIXED = Phase(
    "6 talk, 2 in prefill", lambda number: [*talk(40)[:6], *map(long_prompt, (number, number + 1))], 6, range(6)
)


def run_case(lab: FaultLab, fault: Fault, phase: Phase, number: int, *, silence: float = 60) -> list[Outcome]:
    """What the clients got. The swarm must be whole; afterwards it is not."""
    victims = fault.victims(lab)
    entries = lab.running() if fault.entered else lab.others(*victims)
    with Load(entries, phase.questions(number), silence=silence) as load:
        if phase.talking:
            load.until_talking(phase.talking, clients=list(phase.talkers))
        else:
            entries[0].until_load(lambda load: load["running"] > 0)
        with fault.strike(lab, victims):
            return load.finish()


def restore(lab: FaultLab) -> None:
    """Everybody is back, and carries."""
    lab.revive()
    lab.until_whole(STAGES)


def worst(outcomes: Sequence[Outcome]) -> tuple[float, float]:
    """The longest wait for a first token, and between two of them, in seconds."""
    return max(o.wait for o in outcomes), max(o.gap for o in outcomes)
