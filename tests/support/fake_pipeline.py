"""A ring of stages without tensors: it checks what the scheduler promises the engine, at every step.

Each stage keeps for every cached token a value made of its input and of all tokens before it, as attention does, and
the next token is a function of the last stage's newest value. So a token lost, doubled or cached out of order on any
stage changes every token that follows.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace

from swarmd.node.serving.messages import Chunk, Sampled, StepFailed, TokenChoice
from swarmd.node.serving.scheduler import PlannedStep

EPOCH = 1
VOCABULARY = 50


class StageFault(AssertionError):
    """What a real engine would refuse: the scheduler has broken its promise, or a stage before failed."""


class FakeStage:
    """One stage's KV: for every open sequence, one value per cached token."""

    def __init__(self, index: int, kv_tokens: int) -> None:
        self.kv: dict[int, list[int]] = {}
        self.most_cached = 0
        self._index = index
        self._kv_tokens = kv_tokens

    def run(self, step: PlannedStep, inputs: list[int]) -> list[int]:
        """Apply a step as a real stage does; one output per token.

        Raises StageFault after the frees and openings, with nothing appended, when the chunks do not fit.
        """
        for seq in step.free:
            self.kv.pop(seq, None)
        for opening in step.open:
            if opening.seq in self.kv:
                raise StageFault(f"sequence {opening.seq} is open already")
            self.kv[opening.seq] = []
        self._check(step.chunks)
        outputs: list[int] = []
        for chunk in step.chunks:
            cached = self.kv[chunk.seq]
            for value in inputs[len(outputs) : len(outputs) + len(chunk.tokens)]:
                before = cached[-1] if cached else 0
                cached.append(zlib.crc32(f"{self._index} {before} {value}".encode()))
            outputs += cached[chunk.start :]
        self.most_cached = max(self.most_cached, self.cached)
        return outputs

    def _check(self, chunks: tuple[Chunk, ...]) -> None:
        if len({chunk.seq for chunk in chunks}) != len(chunks):
            raise StageFault("a sequence stands twice in one step")
        for chunk in chunks:
            length = len(self.kv[chunk.seq]) if chunk.seq in self.kv else None
            if chunk.start != length or not chunk.tokens:
                raise StageFault(f"sequence {chunk.seq} holds {length} tokens; {chunk} does not fit")
        total = self.cached + sum(len(chunk.tokens) for chunk in chunks)
        if total > self._kv_tokens:
            raise StageFault(f"{total} tokens for a KV cache of {self._kv_tokens}")

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
    """Stages joined by ordered links; nothing moves until `advance` says so."""

    def __init__(self, n_stages: int, kv_tokens: int) -> None:
        self.stages = [FakeStage(index, kv_tokens) for index in range(n_stages)]
        self.queues: list[deque[_Frame]] = [deque() for _ in range(n_stages)]
        self.answers: deque[Sampled | StepFailed] = deque()
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
        frame = self.queues[index].popleft()
        if not frame.failed:
            try:
                frame.values = self.stages[index].run(frame.step, frame.values)
            except StageFault:
                if not self._has_failed:
                    raise
                frame.failed = True
        self._hand_on(index, frame)

    def fail(self, index: int) -> None:
        """The same, but the stage applies the frees and openings and then cannot run the chunks."""
        self._has_failed = True
        frame = self.queues[index].popleft()
        if not frame.failed:
            self.stages[index].run(replace(frame.step, chunks=()), [])
            frame.failed = True
        self._hand_on(index, frame)

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
            self.answers.append(Sampled(EPOCH, frame.step.step, tuple(_choices(frame))))


def _choices(frame: _Frame) -> Iterable[TokenChoice]:
    end = 0
    for chunk in frame.step.chunks:
        end += len(chunk.tokens)
        if chunk.sample:
            position = chunk.start + len(chunk.tokens)
            yield TokenChoice(chunk.seq, position, frame.values[end - 1] % VOCABULARY, 0.0)


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
