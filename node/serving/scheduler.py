"""Continuous batching over a pipeline: which tokens go into the next step. Pure: no clock, no I/O, no tensors.

As many steps are in flight as there are stages, so that every stage has work; each takes its share of the sequences
that decode, and the rest of its token budget is filled with prefill, so that a long prompt never holds up who is talking.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from swarmd.node.serving.messages import Chunk, Opening, TokenChoice
from swarmd.node.serving.sequences import Phase, Sequence


@dataclass(frozen=True)
class Limits:
    """`step_tokens` is one step's token budget; `growth` is the KV room kept for a sequence's next tokens."""

    n_stages: int
    kv_tokens: int
    context: int
    step_tokens: int = 128
    growth: int = 32
    max_running: int = 64
    max_waiting: int = 256


class QueueFull(Exception):
    """No more sequences are taken at present; try again later."""


@dataclass(frozen=True)
class PlannedStep:
    """What one step does to the stages, in the words of the wire."""

    step: int
    open: tuple[Opening, ...]
    chunks: tuple[Chunk, ...]
    free: tuple[int, ...]


@dataclass(frozen=True)
class Progress:
    """One sequence got a token, or came to its end (`finish` is the reason; a stop token is not shown)."""

    seq: int
    choice: TokenChoice | None
    finish: str | None = None


class Scheduler:
    """The state of all sequences of one instance in one epoch."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._by_pipeline: dict[int, Sequence] = {}
        self._in_flight: dict[int, tuple[Chunk, ...]] = {}
        self._to_free: list[int] = []
        self._next_step = 0
        self._next_pipeline_id = 0

    @property
    def running(self) -> int:
        """Sequences that hold KV."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences that have not begun, or were put back."""
        return len(self._waiting)

    @property
    def kv_tokens_used(self) -> int:
        """KV room reserved, in tokens."""
        return sum(sequence.kv_reserved for sequence in self._running)

    @property
    def idle(self) -> bool:
        """Whether nothing is in flight and nothing is to be done."""
        return not (self._in_flight or self._waiting or self._running or self._to_free)

    def submit(self, sequence: Sequence) -> None:
        """Take a sequence. Raises QueueFull, or ValueError when it could never fit."""
        room = min(self._limits.context, self._limits.kv_tokens)
        if not sequence.tokens or len(sequence.tokens) >= room:
            raise ValueError(f"{len(sequence.tokens)} tokens leave no room in a context of {room}")
        if len(self._waiting) >= self._limits.max_waiting:
            raise QueueFull
        self._waiting.append(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Forget a sequence; the next step frees its KV on every stage."""
        if sequence.phase is Phase.WAITING and sequence in self._waiting:
            self._waiting.remove(sequence)
        elif sequence.phase is Phase.RUNNING:
            self._release(sequence)
        sequence.phase = Phase.DONE

    def next_step(self) -> PlannedStep | None:
        """The next step, or None when the pipeline is full or nothing is ready."""
        if len(self._in_flight) >= self._limits.n_stages:
            return None
        opened = self._admit()
        chunks = [*self._decode_chunks()]
        chunks += self._prefill_chunks(self._limits.step_tokens - len(chunks))
        if not (chunks or opened or self._to_free):
            return None
        step = PlannedStep(self._next_step, tuple(opened), tuple(chunks), tuple(self._to_free))
        self._to_free.clear()
        self._next_step += 1
        self._in_flight[step.step] = step.chunks
        return step

    def on_sampled(self, step: int, choices: tuple[TokenChoice, ...]) -> list[Progress]:
        """A step came back from the last stage."""
        if self._in_flight.pop(step, None) is None:
            raise ValueError(f"step {step} is not in flight")
        progress = []
        for choice in choices:
            sequence = self._by_pipeline.get(choice.seq)
            if sequence is not None:
                progress.append(self._take(sequence, choice))
        return progress

    def on_failed(self, step: int) -> list[Sequence]:
        """A step could not be run: its sequences are ended, and returned."""
        chunks = self._in_flight.pop(step, ())
        failed = [self._by_pipeline[c.seq] for c in chunks if c.seq in self._by_pipeline]
        for sequence in failed:
            self.cancel(sequence)
        return failed

    def _admit(self) -> list[Opening]:
        opened = []
        while self._waiting and len(self._running) < self._limits.max_running:
            sequence = self._waiting[0]
            need = self._reserve_for(sequence)
            if self.kv_tokens_used + need > self._limits.kv_tokens:
                break
            self._waiting.popleft()
            sequence.phase, sequence.kv_reserved = Phase.RUNNING, need
            sequence.pipeline_id = self._next_pipeline_id
            self._next_pipeline_id += 1
            self._running.append(sequence)
            self._by_pipeline[sequence.pipeline_id] = sequence
            opened.append(Opening(sequence.pipeline_id, sequence.sampling))
        return opened

    def _reserve_for(self, sequence: Sequence) -> int:
        return min(len(sequence.tokens) + self._limits.growth, self._limits.context, self._limits.kv_tokens)

    def _decode_chunks(self) -> list[Chunk]:
        decoding = sum(1 for sequence in self._running if not sequence.prefilling)
        share = min(-(-decoding // self._limits.n_stages), self._limits.step_tokens)
        ready = [sequence for sequence in self._running if sequence.can_decode]
        chunks: list[Chunk] = []
        for sequence in ready[:share]:
            if sequence.phase is Phase.RUNNING and self._grow(sequence):
                chunks.append(self._send(sequence, 1))
        self._rotate(ready[:share])
        return [chunk for chunk in chunks if chunk.seq in self._by_pipeline]

    def _rotate(self, served: list[Sequence]) -> None:
        """Who was served goes behind who was not, so that nobody waits for ever."""
        served_ids = {sequence.pipeline_id for sequence in served}
        self._running.sort(key=lambda sequence: sequence.pipeline_id in served_ids)

    def _prefill_chunks(self, budget: int) -> list[Chunk]:
        chunks: list[Chunk] = []
        for sequence in self._running:
            if budget <= 0:
                break
            if sequence.can_prefill:
                count = min(budget, sequence.unsent)
                chunks.append(self._send(sequence, count))
                budget -= count
        return chunks

    def _send(self, sequence: Sequence, count: int) -> Chunk:
        start, sequence.sent = sequence.sent, sequence.sent + count
        sequence.awaiting_sample = sequence.unsent == 0
        tokens = tuple(sequence.tokens[start : sequence.sent])
        return Chunk(sequence.pipeline_id, start, tokens, sequence.awaiting_sample)

    def _grow(self, sequence: Sequence) -> bool:
        """Make sure that the newest token has KV room, putting the youngest sequences back if it must."""
        while len(sequence.tokens) > sequence.kv_reserved:
            step = min(self._limits.growth, self._limits.context - sequence.kv_reserved)
            if self.kv_tokens_used + step <= self._limits.kv_tokens:
                sequence.kv_reserved += step
                continue
            youngest = max(self._running, key=lambda other: other.pipeline_id)
            self._put_back(youngest)
            if youngest is sequence:
                return False
        return True

    def _put_back(self, sequence: Sequence) -> None:
        """Give up a sequence's KV; it will be replayed from its tokens when there is room again."""
        self._release(sequence)
        sequence.phase, sequence.sent, sequence.awaiting_sample = Phase.WAITING, 0, False
        self._waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        del self._by_pipeline[sequence.pipeline_id]
        self._to_free.append(sequence.pipeline_id)
        sequence.kv_reserved = 0

    def _take(self, sequence: Sequence, choice: TokenChoice) -> Progress:
        sequence.awaiting_sample = False
        if choice.token in sequence.stop_tokens:
            self.cancel(sequence)
            return Progress(sequence.seq, None, "stop")
        sequence.tokens.append(choice.token)
        sequence.generated += 1
        full = len(sequence.tokens) >= min(self._limits.context, self._limits.kv_tokens)
        if sequence.generated >= sequence.max_tokens or full:
            self.cancel(sequence)
            return Progress(sequence.seq, choice, "length")
        return Progress(sequence.seq, choice)
