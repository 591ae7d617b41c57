"""Seeded schedules: what befalls a virtual swarm, and what must be true when all is quiet again.

`python -m support.virtual_swarm.schedule --schedules 1000 --nodes 200` runs them one after the other and tells the sum.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

from support.virtual_swarm.clock import VirtualLoop, virtual
from support.virtual_swarm.faults import FAULTS, Faults
from support.virtual_swarm.invariants import Invariants
from support.virtual_swarm.requests import client
from support.virtual_swarm.world import World

from swarmd.node.cluster import admission, instances, launcher
from swarmd.node.serving import gateway

FAULT_SECONDS = 30.0
QUIET_SECONDS = 75.0
# At rest is a swarm in which nothing has changed for so long; it must come to that in so many times as long.
WATCHED_SECONDS = 10.0
MOST_WATCHES = 12


@dataclass
class Result:
    """What one schedule came to, or the sum of several; `seconds` are of this machine's time."""

    wrong: list[str] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter[str])
    faults: Counter[str] = field(default_factory=Counter[str])
    counts: Counter[str] = field(default_factory=Counter[str])
    highest_epoch: int = 0
    seconds: float = 0.0

    def add(self, other: Result) -> None:
        """Count another one in."""
        self.outcomes += other.outcomes
        self.faults += other.faults
        self.counts += other.counts
        self.highest_epoch = max(self.highest_epoch, other.highest_epoch)
        self.seconds += other.seconds


def run(seed: int, n_nodes: int) -> Result:
    """Run one schedule."""
    began = time.perf_counter()
    loop, result = VirtualLoop(), Result()
    loop.set_exception_handler(lambda _, what: result.wrong.append(f"{what['message']}: {what.get('exception')!r}"))
    with _quietly(), virtual(loop, seed, instances, launcher, gateway):
        try:
            loop.run_until_complete(_Schedule(loop, random.Random(seed), n_nodes, result).run())
        except Exception as error:
            result.wrong.append(f"{type(error).__name__}: {error}")
        finally:
            loop.set_exception_handler(lambda _, what: None)
            for task in asyncio.all_tasks(loop):
                task.cancel()
            with contextlib.suppress(Exception):
                loop.run_until_complete(asyncio.sleep(0.1))
            loop.close()
    result.counts["moments"] = loop.moments
    result.seconds = time.perf_counter() - began
    return result


@contextmanager
def _quietly() -> Iterator[None]:
    """Without a log, and without looking for garbage among millions of things that are in use."""
    disabled, collects = logging.root.manager.disable, gc.isenabled()
    logging.disable(logging.CRITICAL)
    gc.disable()
    try:
        yield
    finally:
        logging.disable(disabled)
        if collects:
            gc.enable()


class _Schedule:
    def __init__(self, loop: VirtualLoop, rng: random.Random, n_nodes: int, result: Result) -> None:
        self.loop, self.rng, self.result = loop, rng, result
        self.world = World(loop, rng, n_nodes, rng.randint(1, 3))
        self.faults = Faults(self.world, rng)
        self.result.events = self.faults.events

    async def run(self) -> None:
        """Trouble, rest, and a look at what has come of it."""
        world = self.world
        with (
            patch.object(
                launcher, "_read_model", lambda path, name, sha256, size: (world.summary(name), world.costs(name))
            ),
            patch.object(admission, "_costs", lambda path: world.costs(path.name)),
        ):
            world.begin()
            await asyncio.sleep(self.rng.uniform(3.0, 15.0))
            await self._trouble()
            self.faults.settle()
            await asyncio.sleep(QUIET_SECONDS)
            await self._check()
        self._count()
        world.forget()

    async def _trouble(self) -> None:
        """Requests and faults at random times; a partition and lost messages are always among them."""
        world, rng, start = self.world, self.rng, self.loop.time()
        for _ in range(rng.randint(10, 40)):
            one = client(rng, rng.choice(world.ids), rng.choice(world.models))
            self.loop.call_at(start + rng.uniform(0, FAULT_SECONDS), world.ask, one)
        kinds = ["part", "loss", *(rng.choice(FAULTS) for _ in range(rng.randint(1, 10)))]
        rng.shuffle(kinds)
        for at, kind in zip(sorted(rng.uniform(0, FAULT_SECONDS) for _ in kinds), kinds, strict=True):
            await asyncio.sleep(max(0.0, start + at - self.loop.time()))
            self.faults.strike(kind)
        await asyncio.sleep(max(0.0, start + FAULT_SECONDS - self.loop.time()))

    async def _check(self) -> None:
        wrong, look = self.result.wrong, Invariants(self.world)
        now, before = look.claims(), None
        for _ in range(MOST_WATCHES):
            before = now
            await asyncio.sleep(WATCHED_SECONDS)
            now = look.claims()
            if now == before:
                break
        else:
            wrong.append(f"still no rest: {before} became {now}")
        look.check()
        wrong += look.wrong
        self.result.highest_epoch = look.highest_epoch
        await asyncio.gather(*(one.over.wait() for one in self.world.clients))  # each has a time limit
        for one in self.world.clients:
            if one.outcome in ("hung", "starved"):
                wrong.append(f"a request at {one.entry[:6]} for {one.model} {one.outcome} at {one.started - 1000:.1f}")
        wrong += [f"{type(error).__name__}: {error}" for error in self.world.errors]

    def _count(self) -> None:
        result, network = self.result, self.world.network
        result.outcomes.update(one.outcome for one in self.world.clients)
        result.faults = self.faults.count
        result.counts["messages lost"] = network.lost_messages
        result.counts["records published"] = self.world.board.count
        result.counts["links made again"] = network.links_made


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="make simulate ARGS=...", description="Seeded faults in virtual swarms.")
    parser.add_argument("--schedules", type=int, default=100)
    parser.add_argument("--nodes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1, help="of the first schedule; the others follow")
    parser.add_argument("--events", action="store_true", help="tell what befell the swarms where something was wrong")
    options = parser.parse_args(arguments)
    total, wrong = Result(), 0
    seeds = range(options.seed, options.seed + options.schedules)
    for done, seed in enumerate(seeds, start=1):
        result = run(seed, options.nodes)
        total.add(result)
        if result.wrong:
            wrong += 1
            told = (*result.wrong[:8], *(result.events if options.events else ()))
            print(f"seed {seed}:", *told, sep="\n  ", flush=True)
        if done % 25 == 0 or seed == seeds[-1]:
            _tell(options.nodes, options.seed, done, wrong, total)
    return 1 if wrong else 0


def _tell(nodes: int, seed: int, done: int, wrong: int, total: Result) -> None:
    print(f"{done} schedules of {nodes} nodes from seed {seed}, {total.seconds:.0f} s: {wrong} with something wrong")
    for what, counts in (("requests", total.outcomes), ("faults", total.faults), ("events", total.counts)):
        print(f"  {what}: {', '.join(f'{count:,} {name}' for name, count in counts.most_common())}")
    print(f"  highest epoch: {total.highest_epoch}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
