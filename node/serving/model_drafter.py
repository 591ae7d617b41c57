"""Guessing with a small model of the same vocabulary, which runs whole in the first stage's process."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from swarmd.node.engine.sampling_params import SamplingParams
from swarmd.node.serving.draft_policy import DraftPolicy
from swarmd.node.serving.messages import Chunk
from swarmd.node.serving.step_cost import StepCost

log = logging.getLogger("swarmd.drafts")

TOKENS_PER_CALL = 256
KV_BLOCK = 16
"""Tokens in which an engine counts its KV room, see `StageEngine.load`."""

_ASSUMED = 0.6
_GREEDY = SamplingParams(temperature=0)
_TIME_WEIGHT = 0.1
_FEW_ROWS = 2


class Drawn(Protocol):
    """A token that the engine drew."""

    @property
    def token(self) -> int: ...  # noqa: D102


class DraftResult(Protocol):
    """What a step gives: here one sample at most, as one sequence at a time is guessed for."""

    @property
    def samples(self) -> Sequence[Drawn]: ...  # noqa: D102


class DraftEngine(Protocol):
    """What is needed of an engine that holds a whole model; see `StageEngine`."""

    kv_tokens: int

    def open(self, seq: int, sampling: SamplingParams) -> None: ...  # noqa: D102
    def free(self, seq: int) -> None: ...  # noqa: D102
    def step(self, chunks: Sequence[Chunk], hidden: None, dtype: Literal["f32"]) -> DraftResult: ...  # noqa: D102


@dataclass
class _Held:
    """What the engine has cached of one sequence; of that, the first `agreed` tokens are known to be the sequence's."""

    tokens: list[int] = field(default_factory=list)
    agreed: int = 0


class ModelDrafter:
    """A `Drafter` whose guesses are a draft model's greedy continuation. Blocking, and not thread-safe.

    `max_len` is the longest sequence that the draft model can take. Its KV cache holds what fits; the sequences that
    were guessed for least recently make room. `clock` gives seconds.
    """

    def __init__(self, engine: DraftEngine, max_len: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._engine = engine
        self._room = min(max_len, engine.kv_tokens // KV_BLOCK * KV_BLOCK)
        self._clock = clock
        self._policy = DraftPolicy((_ASSUMED,))
        self._held: OrderedDict[int, _Held] = OrderedDict()
        self._token_us = 0.0
        self._broken = False

    def price(self, cost: StepCost) -> None:
        """See `PricedDrafter`. A guess costs its making, too. From any thread."""
        making = self._token_us / cost.step_us if cost.step_us > 0 else 0.0
        self._policy.row_cost = cost.row_cost + making

    def propose(self, seq: int, tokens: Sequence[int], limit: int) -> list[int]:
        """See `Drafter`. A long text that the draft model has not read is read TOKENS_PER_CALL a call, without
        guesses until it is through.
        """
        limit = min(limit, self._room - len(tokens))
        if limit <= 0 or self._broken:
            return []
        count = self._policy.length(seq, len(tokens), 0, limit)
        if count == 0:
            return []
        try:
            return self._guess(seq, tokens, count)
        except (RuntimeError, ValueError, MemoryError):
            # Nobody's answer depends on guesses; what broke once would break at every step.
            log.exception("the draft model failed; no more is guessed with it")
            self._broken = True
            return []

    def observe(self, seq: int, proposed: int, accepted: int) -> None:
        """See `Drafter`."""
        self._policy.observe(seq, proposed, accepted)

    def forget(self, seq: int) -> None:
        """See `Drafter`."""
        self._policy.forget(seq)
        if self._held.pop(seq, None) is not None:
            self._engine.free(seq)

    def _guess(self, seq: int, tokens: Sequence[int], count: int) -> list[int]:
        held = self._rewound(seq, tokens)
        missing = list(tokens[len(held.tokens) :])
        if len(missing) > TOKENS_PER_CALL:
            self._append(seq, held, missing[:TOKENS_PER_CALL], count, sample=False)
            held.agreed = len(held.tokens)
            return []
        guesses = self._append(seq, held, missing, count, sample=True)
        held.agreed = len(held.tokens)
        while len(guesses) < count:
            guesses += self._append(seq, held, guesses[-1:], count - len(guesses), sample=True)
        return guesses

    def _rewound(self, seq: int, tokens: Sequence[int]) -> _Held:
        """The sequence in the engine, without the guesses that were wrong and without the last token, which is to be
        computed again so that something is drawn.
        """
        held = self._held.get(seq)
        if held is None:
            self._engine.open(seq, _GREEDY)
            held = self._held[seq] = _Held()
        self._held.move_to_end(seq)
        most = min(len(held.tokens), len(tokens) - 1)
        agreed = min(held.agreed, most)
        while agreed < most and held.tokens[agreed] == tokens[agreed]:
            agreed += 1
        # The engine lets go of what is wrong when the next step begins before it.
        del held.tokens[agreed:]
        held.agreed = agreed
        return held

    def _append(self, seq: int, held: _Held, tokens: list[int], ahead: int, *, sample: bool) -> list[int]:
        self._make_room(held, len(tokens) + ahead)
        began = self._clock()
        result = self._engine.step([Chunk(seq, len(held.tokens), tuple(tokens), int(sample))], None, "f32")
        if len(tokens) <= _FEW_ROWS:
            token_us = (self._clock() - began) * 1e6
            self._token_us += (_TIME_WEIGHT if self._token_us else 1.0) * (token_us - self._token_us)
        held.tokens += tokens
        return [drawn.token for drawn in result.samples]

    def _make_room(self, growing: _Held, count: int) -> None:
        """Let go of others, least recently used first; the sequence in hand, the last, always has room of its own."""
        used = _whole_blocks(len(growing.tokens) + count)
        used += sum(_whole_blocks(len(held.tokens)) for held in self._held.values() if held is not growing)
        while used > self._engine.kv_tokens:
            seq, held = self._held.popitem(last=False)
            self._engine.free(seq)
            used -= _whole_blocks(len(held.tokens))


def _whole_blocks(tokens: int) -> int:
    return -(-tokens // KV_BLOCK) * KV_BLOCK
