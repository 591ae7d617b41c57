"""Ways to start a contender on the cores of this machine, as the scenarios name them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from contenders import swarm, swarmd_has, transformers_server
from llama_cpp import LlamaCpp
from processes import Contender, Needs, Place, Unavailable
from relay import Network, delayed_lan, why_unavailable

Start = Callable[[Needs], AbstractContextManager[Contender]]


@dataclass(frozen=True)
class Link:
    """A network between machines: Mb/s each way, and the delay one way in ms."""

    rate_mbps: float
    delay_ms: float

    def __str__(self) -> str:
        return f"{self.rate_mbps / 1000:g} GbE + {self.delay_ms:g} ms"


@dataclass(frozen=True)
class Lab:
    """Where contenders run: cores, which two nodes share, and the folder of llama.cpp's programs."""

    cores: tuple[int, ...]
    llama_folder: Path | None = None

    @property
    def singles(self) -> tuple[Place, Place]:
        """Two places of one core each. Raises Unavailable on a machine with one core."""
        if len(self.cores) < 2:
            raise Unavailable("two nodes need two cores")
        return Place(self.cores[:1]), Place(self.cores[1:2])

    @property
    def double(self) -> Place:
        """One place with the same two cores."""
        return Place(self.cores[:2], threads=len(self.cores[:2]))

    def swarm(self, places: Sequence[Place], speculate: bool = False, link: Link | None = None) -> Start:
        """A node on each place. Without speculation, where this checkout has it, unless it is asked for."""
        extra = () if speculate else plain_options()

        @contextmanager
        def start(needs: Needs) -> Iterator[Contender]:
            kv_tokens = needs.length * max(2, needs.streams)
            with (
                _network(link, len(places)) as network,
                swarm(needs.name, needs.model, places, kv_tokens, extra, network) as contender,
            ):
                yield _carried(contender, network)

        return start

    def llama(self, flags: Sequence[str] = ()) -> Start:
        """llama-server with two threads."""
        return lambda needs: LlamaCpp(self.llama_folder).single(needs, self.double, flags)

    def rpc(self, flags: Sequence[str] = (), link: Link | None = None) -> Start:
        """Two RPC workers of one core; the head shares the core of the first."""

        @contextmanager
        def start(needs: Needs) -> Iterator[Contender]:
            head, _ = self.singles
            with (
                _network(link, 2) as network,
                LlamaCpp(self.llama_folder).rpc(needs, head, self.singles, flags, network) as contender,
            ):
                yield _carried(contender, network)

        return start

    def rpc_half(self, remote_layers: int, flags: Sequence[str] = ()) -> Start:
        """The head on one core computes its part of the layers itself, an RPC worker on the other has the rest."""
        head, worker = self.singles
        flags = (*flags, "-ngl", str(remote_layers))
        return lambda needs: LlamaCpp(self.llama_folder).rpc(needs, head, [worker], flags)

    def transformers(self, place: Place) -> Start:
        """`transformers` in fp32."""
        return lambda needs: transformers_server(needs.name, needs.model, place)


def plain_options() -> tuple[str, ...]:
    """What turns speculation off: text of random models and prompts tends to repeat itself, which flatters it."""
    return ("--no-speculate",) if swarmd_has("--no-speculate") else ()


@contextmanager
def _network(link: Link | None, count: int) -> Iterator[Network | None]:
    if link is None:
        yield None
        return
    if reason := why_unavailable():
        raise Unavailable(reason)
    with delayed_lan(count, link.delay_ms, link.rate_mbps) as network:
        yield network


def _carried(contender: Contender, network: Network | None) -> Contender:
    contender.pids += network.pids if network else ()
    return contender
