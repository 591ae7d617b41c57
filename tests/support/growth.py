"""Tokens and restarts leave nothing behind: one node serves a tiny model on and on while another comes and goes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from support.fault_lab import FaultLab, Machine
from support.soak_watch import Growth, Sample, sample
from support.tiny_gguf import TinyModel, write_tiny_gguf

CLIENTS, ANSWER_TOKENS = 8, 200
LIVES, COMES = "lives", "comes"
# Until then caches and pools fill up that are kept on purpose.
WARM_SHARE = 0.2
MOST_GROWTH_MB, MOST_MORE_FILES, MOST_MORE_BYTES = 8.0, 8, 500


@dataclass
class Growing:
    """How many tokens and restarts of the other node; then what the living one took, once per restart."""

    tokens: int
    restarts: int
    made: int = 0
    samples: list[Sample] = field(default_factory=list)

    def _warm(self, figure: Callable[[Sample], float]) -> Growth:
        return Growth.of([figure(s) for s in self.samples[int(WARM_SHARE * len(self.samples)) :]])

    @property
    def rss(self) -> Growth:
        """Resident MB of the living daemon."""
        return self._warm(lambda s: s.rss_mb)

    @property
    def files(self) -> Growth:
        """Its open files."""
        return self._warm(lambda s: s.files)

    @property
    def state(self) -> Growth:
        """Bytes of its state's JSON."""
        return self._warm(lambda s: s.state_bytes)

    def faults(self) -> list[str]:
        """What should not have happened: empty when all is well."""
        bounds = {
            "memory in MB": (self.rss, MOST_GROWTH_MB),
            "open files": (self.files, MOST_MORE_FILES),
            "bytes of /api/swarm": (self.state, MOST_MORE_BYTES),
        }
        found = [f"{what} grew: {growth}" for what, (growth, most) in bounds.items() if growth.more > most]
        if (named := max(s.nodes for s in self.samples)) > 2:
            found.append(f"{named} nodes are named where there are 2")
        return found

    def table(self) -> str:
        """Everything as a Markdown table."""
        rows = {
            "tokens, restarts of another node": f"{self.made}, {len(self.samples)}",
            "resident MB, first and last quarter, most": _shown(self.rss, 1),
            "open files": _shown(self.files),
            "bytes of /api/swarm": _shown(self.state),
            "nodes named, most": str(max(s.nodes for s in self.samples)),
        }
        return "\n".join(["| figure | value |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in rows.items())])


def grow(root: Path, growing: Growing, *, say: Callable[[str], object] = print) -> Growing:
    """Serve so many tokens while the other node is restarted, by turns crashing and leaving; returns `growing`."""
    root.mkdir(parents=True, exist_ok=True)
    model = write_tiny_gguf(root / "tiny.gguf", TinyModel(n_layers=4))
    machines = [Machine(LIVES, "300MB", model), Machine(COMES, "200MB")]
    with FaultLab(root, machines, context=512) as lab, ThreadPoolExecutor(CLIENTS) as pool:
        lab.serve(LIVES, model)
        lives = lab.nodes[LIVES]
        name = lives.until_ready()["model"]
        for restart in range(growing.restarts):
            other = lab.nodes[COMES]
            if restart % 2:
                other.stop()
            else:
                lab.kill(other)
            while growing.made < growing.tokens * (restart + 1) / growing.restarts:
                growing.made += sum(pool.map(lambda number: _tokens(lab, name, number), range(CLIENTS)))
            lab.revive(COMES)
            lives.until_members(2)
            growing.samples.append(sample(lives, restart))
            if restart % 10 == 9:
                say(f"{growing.made} tokens, {restart + 1} restarts, {growing.samples[-1].rss_mb:.1f} MB")
    return growing


def _tokens(lab: FaultLab, model: str, number: int) -> int:
    """One answer, sampled so that no two are alike; how many tokens it has."""
    wishes = {"model": model, "temperature": 1, "seed": number, "max_tokens": ANSWER_TOKENS, "logprobs": False}
    return lab.nodes[LIVES].chat("Go on", **wishes)["usage"]["completion_tokens"]


def _shown(growth: Growth, digits: int = 0) -> str:
    return f"{growth.first:.{digits}f}, {growth.last:.{digits}f}, {growth.most:.{digits}f}"
