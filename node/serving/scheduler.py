"""Continuous batching over a pipeline: which tokens go into the next step. Pure: no clock, no I/O, no tensors.

As many steps are in flight as there are stages, so that every stage has work; each takes its share of the sequences
that decode, and the rest of its token budget is filled with prefill, so that a long prompt never holds up who is
talking.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal

from swarmd.node.serving.messages import Chunk, Opening, TokenChoice
from swarmd.node.serving.sequences import Phase, Sequence


@dataclass(frozen=True)
class Limits:
    """`step_tokens` is one step's token budget; `growth` is the KV room kept for a sequence's next tokens.

    Raises ValueError unless a step has room for a token of everybody who runs and one more, so that prefill always
    gets on.
    """

    n_stages: int
    kv_tokens: int
    context: int
    step_tokens: int = 128
    growth: int = 32
    max_running: int = 64
    max_waiting: int = 256

    def __post_init__(self) -> None:
        if not 1 <= self.max_running < self.step_tokens or self.growth < 1:
            raise ValueError(f"limits do not fit together: {self}")

    @property
    def room(self) -> int:
        """The most tokens that one sequence can have."""
        return min(self.context, self.kv_tokens)


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
    finish: Literal["stop", "length"] | None = None


class Scheduler:
    """The state of all sequences of one instance in one epoch."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._waiting: deque[Sequence] = deque()
        # In the order of their pipeline ids: the youngest is the last.
        self._running: list[Sequence] = []
        self._by_pipeline: dict[int, Sequence] = {}
        self._in_flight: dict[int, PlannedStep] = {}
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

    def submit(self, sequence: Sequence) -> None:
        """Take a sequence. Raises QueueFull, or ValueError when it could never get a token."""
        room = self._limits.room
        if not 0 < len(sequence.tokens) < room:
            raise ValueError(f"{len(sequence.tokens)} tokens leave no room in a context of {room}")
        if sequence.max_tokens < 1:
            raise ValueError(f"{sequence.max_tokens} tokens were asked for; ask for 1 or more")
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
        # Who is talking takes the KV room that it needs before anybody new is let in: nothing is opened only to be
        # put back in the same step, whose frees come first.
        chunks = self._decode_chunks()
        opened = self._admit()
        chunks += self._prefill_chunks(self._limits.step_tokens - len(chunks))
        if not (chunks or opened or self._to_free):
            return None
        step = PlannedStep(self._next_step, tuple(opened), tuple(chunks), tuple(self._to_free))
        self._to_free.clear()
        self._next_step += 1
        self._in_flight[step.step] = step
        return step

    def on_sampled(self, step: int, choices: tuple[TokenChoice, ...]) -> list[Progress]:
        """A step came back from the last stage.

        Raises ValueError when it is not in flight, or is not answered by one token for each that it asked for.
        """
        planned = self._in_flight.pop(step, None)
        if planned is None:
            raise ValueError(f"step {step} is not in flight")
        asked = sorted((chunk.seq, chunk.start + len(chunk.tokens)) for chunk in planned.chunks if chunk.sample)
        if sorted((choice.seq, choice.position) for choice in choices) != asked:
            raise ValueError(f"step {step} was answered for other positions than it asked for")
        # Who was cancelled or put back meanwhile is not there any more: its sample comes too late.
        present = [choice for choice in choices if choice.seq in self._by_pipeline]
        return [self._take(self._by_pipeline[choice.seq], choice) for choice in present]

    def on_failed(self, step: int) -> list[Sequence]:
        """A stage could not run a step: its sequences are ended, and returned.

        The stages behind that one never saw the step: what it freed is freed again, what it only opened begins anew.
        """
        planned = self._in_flight.pop(step, None)
        if planned is None:
            return []
        failed = [self._by_pipeline[chunk.seq] for chunk in planned.chunks if chunk.seq in self._by_pipeline]
        for sequence in failed:
            self.cancel(sequence)
        for opening in reversed(planned.open):
            if opening.seq in self._by_pipeline:
                self._put_back(self._by_pipeline[opening.seq])
        self._to_free += planned.free
        return failed

    def _admit(self) -> list[Opening]:
        opened = []
        while self._waiting and len(self._running) < self._limits.max_running:
            sequence = self._waiting[0]
            need = min(len(sequence.tokens) + self._limits.growth, self._limits.room)
            if self.kv_tokens_used + need > self._limits.kv_tokens:
                break
            self._waiting.popleft()
            sequence.phase, sequence.kv_reserved, sequence.prefix = Phase.RUNNING, need, len(sequence.tokens)
            sequence.pipeline_id = self._next_pipeline_id
            self._next_pipeline_id += 1
            self._running.append(sequence)
            self._by_pipeline[sequence.pipeline_id] = sequence
            opened.append(Opening(sequence.pipeline_id, sequence.sampling))
        return opened

    def _decode_chunks(self) -> list[Chunk]:
        """The next share of those who decode, oldest first.

        Nobody waits for long: who is served is in flight until `n_stages` steps later, and so many shares cover all.
        """
        decoding = [sequence for sequence in self._running if not sequence.prefilling]
        share = -(-len(decoding) // self._limits.n_stages)
        turn = [sequence for sequence in decoding if sequence.can_decode][:share]
        for sequence in turn:
            self._grow(sequence)
        return [self._send(sequence, 1) for sequence in turn if sequence.phase is Phase.RUNNING]

    def _prefill_chunks(self, budget: int) -> list[Chunk]:
        chunks: list[Chunk] = []
        for sequence in self._running:
            if budget <= 0:
                break
            if sequence.prefilling:
                count = min(budget, sequence.prefix - sequence.sent)
                chunks.append(self._send(sequence, count))
                budget -= count
        return chunks

    def _send(self, sequence: Sequence, count: int) -> Chunk:
        start, sequence.sent = sequence.sent, sequence.sent + count
        tokens = tuple(sequence.tokens[start : sequence.sent])
        return Chunk(sequence.pipeline_id, start, tokens, sequence.sent == len(sequence.tokens))

    def _grow(self, sequence: Sequence) -> None:
        """Make sure that the newest token has KV room, putting the youngest sequences back if it must."""
        while sequence.phase is Phase.RUNNING and len(sequence.tokens) > sequence.kv_reserved:
            free = self._limits.kv_tokens - self.kv_tokens_used
            if free > 0:
                sequence.kv_reserved += min(free, self._limits.growth, self._limits.context - sequence.kv_reserved)
            else:
                self._put_back(self._running[-1])

    def _put_back(self, sequence: Sequence) -> None:
        """Give up a sequence's KV; it will be replayed from its tokens when there is room again."""
        self._release(sequence)
        sequence.phase, sequence.sent = Phase.WAITING, 0
        self._waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        del self._by_pipeline[sequence.pipeline_id]
        self._to_free.append(sequence.pipeline_id)
        sequence.kv_reserved = 0

    def _take(self, sequence: Sequence, choice: TokenChoice) -> Progress:
        if choice.token in sequence.stop_tokens:
            self.cancel(sequence)
            return Progress(sequence.seq, None, "stop")
        sequence.tokens.append(choice.token)
        sequence.generated += 1
        if sequence.generated >= sequence.max_tokens or len(sequence.tokens) >= self._limits.room:
            self.cancel(sequence)
            return Progress(sequence.seq, choice, "length")
        return Progress(sequence.seq, choice)
