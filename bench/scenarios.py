"""What the lab measures: who against whom, under which loads, and what has to come out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from figures import Bar
from measure import Load, interference, many_streams, single_stream
from processes import Place
from starts import Lab, Link, Start, plain_options
from synthetic_model import synthetic_model
from workloads import BenchModel, default_model

NODE, TWO_NODES, SPECULATING = "one node", "two nodes", "two nodes, speculating"
RPC, RPC_SMALL, RPC_TINY, RPC_HALF = "RPC", "RPC -ub 128", "RPC -ub 64", "head + 1 RPC worker"
LLAMA, LLAMA_FLASH, LLAMA_SMALL = "llama-server", "llama-server -fa on", "llama-server -ub 128"
TRANSFORMERS = "transformers"
SMALL_BATCH, TINY_BATCH, FLASH = ("-ub", "128", "-fa", "on"), ("-ub", "64", "-fa", "off"), ("-fa", "on")
QUOTA = 0.5
# What homes and offices have.
LINKS = (Link(1000, 0.6), Link(2500, 0.4), Link(10_000, 0.1))

MODELS: dict[str, Callable[[], BenchModel]] = {
    "SmolLM2-135M Q4_1": lambda: BenchModel.open("smollm2", default_model()),
    "synthetic 1B Q4_0": lambda: BenchModel.open("synthetic-1b", synthetic_model()),
}
SMOLLM2, SYNTHETIC = MODELS
STANDARD = (single_stream(), many_streams())


@dataclass(frozen=True)
class Comparison:
    """The subject's figures over the best of the baselines', metric by metric, and the bars for these ratios."""

    title: str
    subject: str
    baselines: tuple[str, ...]
    bars: tuple[Bar, ...] = ()


@dataclass(frozen=True)
class Scenario:
    """One table: every contender under every load. `model` is a key of MODELS."""

    name: str
    title: str
    model: str
    contenders: dict[str, Start]
    loads: tuple[Load, ...] = STANDARD
    comparisons: tuple[Comparison, ...] = ()
    notes: tuple[str, ...] = ()
    repeats: int = 3


def two_nodes(lab: Lab) -> Iterator[Scenario]:
    """Two single-core nodes against llama.cpp RPC with two single-core workers."""
    bars = (
        Bar("decode, 1 stream", 2.0),
        Bar("TTFT, 1 stream", 0.25),
        Bar("whole run, 8 streams", 4.0),
        Bar("p99 TTFT, 8 streams", 0.25),
    )
    contenders = {TWO_NODES: lab.swarm(lab.singles)}
    if plain_options():
        contenders[SPECULATING] = lab.swarm(lab.singles, speculate=True)
    yield Scenario(
        "two-nodes",
        "Two single-core nodes against llama.cpp RPC on the same two cores",
        SMOLLM2,
        contenders | _rpc(lab, layers=30),
        comparisons=(_over_rpc(bars), _over_half()),
    )


def one_node(lab: Lab) -> Iterator[Scenario]:
    """One node with two threads against llama-server with two, and transformers."""
    bars = (Bar("decode, 1 stream", 1.8), Bar("TTFT, 1 stream", 1 / 2.5), Bar("whole run, 8 streams", 2.5))
    yield Scenario(
        "one-node",
        "One node with two threads against llama-server -t 2 and transformers",
        SMOLLM2,
        {
            NODE: lab.swarm([lab.double]),
            LLAMA: lab.llama(),
            LLAMA_FLASH: lab.llama(FLASH),
            LLAMA_SMALL: lab.llama(SMALL_BATCH[:2]),
            TRANSFORMERS: lab.transformers(lab.double),
        },
        comparisons=(
            Comparison("one node / best llama-server", NODE, (LLAMA, LLAMA_FLASH, LLAMA_SMALL), bars),
            Comparison("one node / transformers", NODE, (TRANSFORMERS,)),
        ),
    )


def synthetic_1b(lab: Lab) -> Iterator[Scenario]:
    """A model whose weights come from memory and not from caches, on two single-core nodes."""
    bars = (Bar("decode, 1 stream", 2.0), Bar("TTFT, 1 stream", 0.5), Bar("whole run, 8 streams", 3.0))
    yield Scenario(
        "synthetic-1b",
        "A random model of a billion parameters on two single-core nodes",
        SYNTHETIC,
        {TWO_NODES: lab.swarm(lab.singles)} | _rpc(lab, layers=16),
        comparisons=(_over_rpc(bars), _over_half()),
        repeats=2,
    )


def nodes(lab: Lab) -> Iterator[Scenario]:
    """What a second machine of the same size brings, beside a well-known implementation on one core."""
    first, second = lab.singles
    yield Scenario(
        "nodes",
        "One single-core node, two of them, and transformers on one core",
        SMOLLM2,
        {
            NODE: lab.swarm([first]),
            TWO_NODES: lab.swarm([first, second]),
            TRANSFORMERS: lab.transformers(first),
        },
        comparisons=(
            Comparison("two nodes / one node", TWO_NODES, (NODE,), (Bar("whole run, 8 streams", 1.7),)),
            Comparison("one node / transformers", NODE, (TRANSFORMERS,)),
        ),
    )


def quotas(lab: Lab) -> Iterator[Scenario]:
    """What a third machine brings: nodes that may use half a core each, so that three of them fit on two cores."""
    place = Place(lab.cores[:2], quota=QUOTA)
    names = {count: f"{count} node{'s' * (count > 1)} on quotas" for count in (1, 2, 3)}
    yield Scenario(
        "quotas",
        f"One, two and three nodes that may use {QUOTA:.0%} of a core each",
        SMOLLM2,
        {name: lab.swarm([place] * count) for count, name in names.items()},
        comparisons=(
            Comparison("two / one", names[2], (names[1],)),
            Comparison("three / one", names[3], (names[1],), (Bar("whole run, 8 streams", 2.4),)),
        ),
        notes=("The load generator takes its CPU time from the half core that three quotas leave.",),
    )


def scaling(lab: Lab) -> Iterator[Scenario]:
    """Both ways of adding machines: `nodes` and `quotas`."""
    yield from nodes(lab)
    yield from quotas(lab)


def links(lab: Lab) -> Iterator[Scenario]:
    """Two nodes on networks like those of homes and offices, one table each."""
    for link in LINKS:
        yield Scenario(
            f"link-{link.rate_mbps / 1000:g}gbe",
            f"Two single-core nodes on {link} (one way)",
            SMOLLM2,
            {TWO_NODES: lab.swarm(lab.singles, link=link)} | _rpc_variants(lab, link),
            comparisons=(_over_rpc(),),
            notes=("The relays that hold packets back run on the same cores.",),
            repeats=2,
        )


def long_prompt(lab: Lab) -> Iterator[Scenario]:
    """A prompt of 4096 tokens."""
    yield Scenario(
        "long-prompt",
        "A prompt of 4096 tokens, 128 new ones",
        SMOLLM2,
        _everybody(lab),
        (single_stream(4096),),
        (_over_rpc(), _over_llama()),
        repeats=2,
    )


def interfered(lab: Lab) -> Iterator[Scenario]:
    """Streams that talk while a long prompt arrives."""
    yield Scenario(
        "interference",
        "Four streams decode, then a prompt of 2048 tokens arrives",
        SMOLLM2,
        _everybody(lab),
        (interference(),),
        (_over_rpc(), _over_llama()),
    )


def growth(lab: Lab) -> Iterator[Scenario]:
    """How cost grows with context and with streams; with nodes, see `scaling`."""
    contenders = {NODE: lab.swarm(lab.singles[:1]), TWO_NODES: lab.swarm(lab.singles)}
    compare = (Comparison("two nodes / one node", TWO_NODES, (NODE,)),)
    contexts = tuple(single_stream(prompt, 64, f"prompt of {prompt}") for prompt in (128, 512, 1024, 2048, 4096))
    yield Scenario("growth-context", "How cost grows with context", SMOLLM2, contenders, contexts, compare)
    streams = tuple(many_streams(count) for count in (1, 2, 4, 8, 16))
    yield Scenario("growth-streams", "How cost grows with streams", SMOLLM2, contenders, streams, compare)


def _rpc(lab: Lab, layers: int) -> dict[str, Start]:
    half = lab.rpc_half(layers // 2, SMALL_BATCH)
    return _rpc_variants(lab) | {RPC_HALF: half}


def _rpc_variants(lab: Lab, link: Link | None = None) -> dict[str, Start]:
    variants = {RPC: (), RPC_SMALL: SMALL_BATCH, RPC_TINY: TINY_BATCH}
    return {name: lab.rpc(flags, link) for name, flags in variants.items()}


def _everybody(lab: Lab) -> dict[str, Start]:
    return {
        TWO_NODES: lab.swarm(lab.singles),
        **_rpc_variants(lab),
        NODE: lab.swarm([lab.double]),
        LLAMA: lab.llama(),
        LLAMA_FLASH: lab.llama(FLASH),
    }


def _over_rpc(bars: tuple[Bar, ...] = ()) -> Comparison:
    return Comparison("two nodes / best RPC", TWO_NODES, (RPC, RPC_SMALL, RPC_TINY), bars)


def _over_half() -> Comparison:
    return Comparison(f"two nodes / {RPC_HALF}", TWO_NODES, (RPC_HALF,))


def _over_llama() -> Comparison:
    return Comparison("one node / best llama-server", NODE, (LLAMA, LLAMA_FLASH))


SCENARIOS: dict[str, Callable[[Lab], Iterator[Scenario]]] = {
    "two-nodes": two_nodes,
    "one-node": one_node,
    "synthetic-1b": synthetic_1b,
    "nodes": nodes,
    "quotas": quotas,
    "scaling": scaling,
    "links": links,
    "long-prompt": long_prompt,
    "interference": interfered,
    "growth": growth,
}
