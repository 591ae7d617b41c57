"""The troubles of a soak: seeded crashes, pauses, leaves and pulled plugs, and what is known of each node meanwhile."""

from __future__ import annotations

import math
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import psutil
from support.fault_lab import FaultLab
from support.swarm import Node

# What befalls a node, how often beside the others, and for how long it is gone (seconds, shortest and longest).
KINDS: dict[str, tuple[int, float, float]] = {
    "node killed": (4, 2, 8),
    "daemon killed": (1, 2, 6),
    "stage process killed": (4, 0, 0),
    "node paused": (3, 1, 7),
    "stage process paused": (2, 1, 5),
    "node left": (3, 2, 6),
    "node unplugged": (2, 2, 7),
}
LOCAL = frozenset({"stage process killed", "stage process paused"})
PAUSE_BETWEEN = (6.0, 14.0)
# Of so many troubles, one takes so many nodes that the rest does not suffice.
DEEP_ONE_IN = 15
# Until a node that was started anew carries again, at the latest.
SETTLE_SECONDS = 8.0
LEAVE_SECONDS = 60.0


@dataclass
class Trouble:
    """What befell a node: from when to when it could not be counted on (`end` is None while that lasts)."""

    node: Node
    kind: str
    begin: float
    due: float = math.inf
    undo: AbstractContextManager[None] = field(default_factory=nullcontext)
    left_behind: Sequence[psutil.Process] = ()
    end: float | None = None

    def touches(self, begin: float, end: float) -> bool:
        """Whether it lasted at some time between the two."""
        return self.begin <= end and (self.end is None or self.end >= begin)


class Troubles:
    """Befalls a lab with troubles, one after the other; `turn` is called often, from one thread.

    The `witness` is never struck but in its stage process, so that there is one daemon that lives long. `enough` nodes
    suffice for the model, whichever these are; deep troubles aside, more than that are always spared.
    """

    def __init__(self, lab: FaultLab, witness: str, enough: int, seed: int) -> None:
        self.done: Counter[str] = Counter()
        self.all: list[Trouble] = []
        self.faults: list[str] = []
        self._lab, self._witness, self._enough = lab, witness, enough
        self._random = random.Random(seed)
        self.started = self._next = time.monotonic()

    def turn(self) -> None:
        """End what is over, and begin what is due."""
        now = time.monotonic()
        for trouble in self._lasting():
            if now >= trouble.due:
                self._end(trouble)
        if now >= self._next:
            self._begin(deep=self._random.randrange(DEEP_ONE_IN) == 0)
            self._next = time.monotonic() + self._random.uniform(*PAUSE_BETWEEN)

    def finish(self) -> None:
        """End all that lasts; everybody runs."""
        for trouble in self._lasting():
            self._end(trouble, at_last=True)

    def of(self, node: Node, begin: float, end: float, *, but: frozenset[str] = LOCAL) -> set[str]:
        """What befell this run of a node in that time, but for some kinds."""
        return {t.kind for t in list(self.all) if t.node is node and t.kind not in but and t.touches(begin, end)}

    def too_few(self, begin: float, end: float) -> bool:
        """Whether at some time between the two those that were there and settled did not suffice."""
        spans = [
            (max(begin, t.begin), min(end, t.end + SETTLE_SECONDS if t.end else end))
            for t in list(self.all)
            if t.kind not in LOCAL and t.touches(begin - SETTLE_SECONDS, end)
        ]
        most = max((sum(a <= start < b for a, b in spans) for start, _ in spans), default=0)
        return len(self._lab.machines) - most < self._enough

    def _lasting(self) -> list[Trouble]:
        return [trouble for trouble in self.all if trouble.end is None]

    def _healthy(self) -> list[Node]:
        """Who can be counted on: nothing befalls them, and what has, is over for a while."""
        settled = time.monotonic() - SETTLE_SECONDS
        struck = {t.node.name for t in self.all if t.kind not in LOCAL and (t.end is None or t.end > settled)}
        return [node for node in self._lab.running() if node.is_up and node.name not in struck]

    def _begin(self, *, deep: bool) -> None:
        healthy = self._healthy()
        fair = [node for node in healthy if node.name != self._witness]
        if deep:
            spare = len(healthy) - self._enough + 1
            for node in self._random.sample(fair, min(spare, len(fair))):
                self._strike("node killed", node)
        else:
            kind = self._draw()
            able = healthy if kind in LOCAL else fair if len(healthy) > self._enough + 1 else []
            if able:
                self._strike(kind, self._random.choice(able))

    def _draw(self) -> str:
        known = [kind for kind in KINDS if kind != "node unplugged" or self._lab.network is not None]
        return self._random.choices(known, [KINDS[kind][0] for kind in known])[0]

    def _strike(self, kind: str, node: Node) -> None:
        """It is noted before it happens: a client may see it at once."""
        trouble = Trouble(node, kind, time.monotonic())
        self.all.append(trouble)
        self.done[kind] += 1
        trouble.undo, trouble.left_behind = self._act(kind, node)
        trouble.undo.__enter__()
        _, shortest, longest = KINDS[kind]
        trouble.due = time.monotonic() + self._random.uniform(shortest, longest)

    def _act(self, kind: str, node: Node) -> tuple[AbstractContextManager[None], Sequence[psutil.Process]]:
        """Do it; how it is undone (entered by the caller), and the processes that should end by themselves."""
        lab = self._lab
        match kind:
            case "node killed":
                lab.kill(node)
            case "daemon killed":
                return nullcontext(), lab.kill_daemon(node)
            case "stage process killed":
                lab.kill_stages(node)
            case "node left":
                left = lab.stages(node)
                node.process.send_signal(signal.SIGTERM)
                return nullcontext(), left
            case "node paused":
                return lab.paused(node), ()
            case "stage process paused":
                return lab.paused_stages(node), ()
            case _:
                return lab.unplugged(node), ()
        return nullcontext(), ()

    def _end(self, trouble: Trouble, *, at_last: bool = False) -> None:
        node = trouble.node
        if trouble.kind == "node left" and node.running:
            left = trouble.begin + LEAVE_SECONDS - time.monotonic()
            if left > 0 and not at_last:
                return
            try:
                node.process.wait(max(0.0, left))
            except subprocess.TimeoutExpired:
                self.faults.append(f"{node.name} was told to leave and did not within {LEAVE_SECONDS:.0f} s")
                self._lab.kill(node)
        trouble.undo.__exit__(None, None, None)
        if trouble.left_behind:
            _, alive = psutil.wait_procs(trouble.left_behind, timeout=10)
            self.faults += [f"stage process {process.pid} of {node.name} was left behind" for process in alive]
        if not node.running:
            self._lab.revive(node.name)
        trouble.end = time.monotonic()
