"""A ring of stages without tensors: it checks what the scheduler promises the engine, at every step.

Each stage keeps for every cached token a value made of its input and of all tokens before it, as attention does, and
the next token is a function of the last stage's newest value. So a token lost, doubled, cached out of order or left
behind by a rejected draft, on any stage, changes every token that follows.
"""

from __future__ import annotations

import contextlib
import zlib
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace

from swarmd.node.serving.messages import Chunk, Opening, Sampled, StepFailed, StepTimes, TokenChoice
from swarmd.node.serving.steps import Limits, PlannedStep

EPOCH = 1
VOCABULARY = 50


class StageFault(AssertionError):
    """What a real engine would refuse: the scheduler has broken its promise, or a stage before failed."""


class FakeStage:
    """One stage's KV: for every open sequence, one value per cached token. A fork copies them."""

    def __init__(self, index: int, limits: Limits) -> None:
        self.kv: dict[int, list[int]] = {}
        self.most_cached = 0
        self._index = index
        self._limits = limits

    def run(self, step: PlannedStep, inputs: list[int]) -> list[int]:
        """Apply a step as a real stage does; one output per token.

        Raises StageFault, with nothing appended, at an opening that is impossible or when the chunks do not fit.
        """
        for opening in step.open:
            self._open(opening)
        for seq in step.free:
            self.kv.pop(seq, None)
        self._check(step.chunks)
        outputs: list[int] = []
        for chunk in step.chunks:
            cached = self.kv[chunk.seq]
            del cached[chunk.start :]
            for value in inputs[len(outputs) : len(outputs) + len(chunk.tokens)]:
                before = cached[-1] if cached else 0
                cached.append(zlib.crc32(f"{self._index} {before} {value}".encode()))
            outputs += cached[chunk.start :]
        self.most_cached = max(self.most_cached, self.cached)
        return outputs

    def _open(self, opening: Opening) -> None:
        if opening.seq in self.kv:
            raise StageFault(f"sequence {opening.seq} is open already")
        source = self.kv.get(opening.source, []) if opening.source >= 0 else []
        if len(source) < opening.length:
            raise StageFault(f"{opening}: the source holds {len(source)} tokens")
        self.kv[opening.seq] = source[: opening.length]

    def _check(self, chunks: tuple[Chunk, ...]) -> None:
        if len({chunk.seq for chunk in chunks}) != len(chunks):
            raise StageFault("a sequence stands twice in one step")
        lengths = {seq: len(values) for seq, values in self.kv.items()}
        for chunk in chunks:
            length = lengths.get(chunk.seq, -1)
            if not 0 <= chunk.start <= length or not chunk.tokens or not 0 <= chunk.sample <= len(chunk.tokens):
                raise StageFault(f"sequence {chunk.seq} holds {length} tokens; {chunk} does not fit")
            lengths[chunk.seq] = chunk.start + len(chunk.tokens)
            if lengths[chunk.seq] > self._limits.context:
                raise StageFault(f"{chunk} goes beyond a context of {self._limits.context}")
        total = sum(self._limits.in_blocks(length) for length in lengths.values())
        if total > self._limits.kv_tokens:
            raise StageFault(f"{total} tokens for a KV cache of {self._limits.kv_tokens}")

    @property
    def cached(self) -> int:
        """Tokens cached now."""
        return sum(len(values) for values in self.kv.values())


@dataclass
class _Frame:
    step: PlannedStep
    values: list[int]
    failed: bool = False


class FakePipeline:
    """Stages joined by ordered links; nothing moves until `advance` says so. Answers carry `times`."""

    def __init__(self, limits: Limits) -> None:
        self.stages = [FakeStage(index, limits) for index in range(limits.n_stages)]
        self.queues: list[deque[_Frame]] = [deque() for _ in range(limits.n_stages)]
        self.answers: deque[Sampled | StepFailed] = deque()
        self.times = StepTimes()
        # Any step with this token fails on the last stage; None: no token does that.
        self.poison: int | None = None
        # Every step fails on the last stage.
        self.sick = False
        self._has_failed = False

    @property
    def in_flight(self) -> int:
        """Steps that were begun and whose answer has not been taken."""
        return sum(map(len, self.queues)) + len(self.answers)

    def begin(self, step: PlannedStep) -> None:
        """Hand a step to the first stage."""
        self.queues[0].append(_Frame(step, [token for chunk in step.chunks for token in chunk.tokens]))

    def advance(self, index: int) -> None:
        """Let one stage run the first step that waits for it.

        Raises StageFault when it cannot, unless `fail` was called before: one failure is the cause of others.
        """
        if index == len(self.stages) - 1 and self._is_hopeless(self.queues[index][0].step):
            self.fail(index)
            return
        frame = self.queues[index].popleft()
        if not frame.failed:
            try:
                frame.values = self.stages[index].run(frame.step, frame.values)
            except StageFault:
                if not self._has_failed:
                    raise
                frame.failed = True
        self._hand_on(index, frame)

    def fail(self, index: int, *, opened: bool = True) -> None:
        """The same, but the stage cannot run the step: it fails at the chunks, or before it has `opened` anything."""
        self._has_failed = True
        frame = self.queues[index].popleft()
        if opened and not frame.failed:
            with contextlib.suppress(StageFault):  # Since one before it failed, it may not even get as far as that.
                self.stages[index].run(replace(frame.step, chunks=()), [])
        frame.failed = True
        self._hand_on(index, frame)

    def _is_hopeless(self, step: PlannedStep) -> bool:
        return bool(step.chunks) and (self.sick or any(self.poison in chunk.tokens for chunk in step.chunks))

    def flush(self) -> None:
        """Let every step run to its answer."""
        for index in range(len(self.stages)):
            while self.queues[index]:
                self.advance(index)

    def _hand_on(self, index: int, frame: _Frame) -> None:
        if index + 1 < len(self.stages):
            self.queues[index + 1].append(frame)
        elif frame.failed:
            self.answers.append(StepFailed(EPOCH, frame.step.step, "a stage failed"))
        else:
            self.answers.append(Sampled(EPOCH, frame.step.step, tuple(_choices(frame)), self.times))


def _choices(frame: _Frame) -> Iterable[TokenChoice]:
    end = 0
    for chunk in frame.step.chunks:
        end += len(chunk.tokens)
        for left in range(chunk.sample, 0, -1):
            drawn = frame.values[end - left] % VOCABULARY
            yield TokenChoice(chunk.seq, chunk.start + len(chunk.tokens) - left + 1, drawn, 0.0)
            if left > 1 and chunk.tokens[1 - left] != drawn:
                break


def solo_run(prompt: list[int], n_stages: int, count: int) -> list[int]:
    """The `count` tokens that follow a prompt when nobody else is served and nothing is cached."""
    states = [0] * n_stages
    tokens = list(prompt)
    for position in range(len(prompt) + count - 1):
        value = tokens[position]
        for index in range(n_stages):
            states[index] = value = zlib.crc32(f"{index} {states[index]} {value}".encode())
        if position + 1 == len(tokens):
            tokens.append(value % VOCABULARY)
    return tokens[len(prompt) :]
