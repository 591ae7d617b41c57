"""Continuous batching over a pipeline: which tokens go into the next step. Pure: no clock, no I/O, no tensors.

So many steps are in flight that every stage has work (`depth`); each takes its share of the sequences that decode,
with drafts where they pay, and then a chunk of prefill, of a size that does not hold up who is talking. A prompt begins
with what somebody before it has computed of it; answers that go on after a loss come before new prompts.
"""

from __future__ import annotations

from collections import deque

from swarmd.node.serving.chunking import chunk_tokens
from swarmd.node.serving.drafting import Ask, Drafter
from swarmd.node.serving.in_flight import StepsInFlight
from swarmd.node.serving.kv_room import KvRoom
from swarmd.node.serving.messages import Chunk, Opening, StepTimes
from swarmd.node.serving.sequences import Phase, Sequence, accept, may_open, queue_up
from swarmd.node.serving.steps import Choices, Limits, PlannedStep, Progress, QueueFull, answered
from swarmd.node.serving.suspects import Failure, Suspects, Verdict

UNMEASURED = StepTimes()


class Scheduler:
    """The state of all sequences of one instance in one epoch."""

    def __init__(self, limits: Limits, drafter: Drafter | None = None) -> None:
        self.prefix_tokens_reused = 0
        self._limits = limits
        self._drafter = drafter
        self._kv = KvRoom(limits)
        self._in_flight = StepsInFlight(limits.n_stages)
        self._waiting: deque[Sequence] = deque()
        # In the order of their pipeline ids: the youngest is the last.
        self._running: list[Sequence] = []
        self._by_pipeline: dict[int, Sequence] = {}
        # Of those who run: whose prompt is on its way, how many are past that, and who of these has a token to send,
        # longest waiting first. The others await a sample.
        self._prefilling: Sequence | None = None
        self._decoding = 0
        self._ready: deque[Sequence] = deque()
        # Those of steps that failed, who run alone until it is known whose fault it was; and whether they did last.
        self._suspects = Suspects()
        self._tried_alone = False
        self._next_pipeline_id = 0

    @property
    def running(self) -> int:
        """Sequences that have begun."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences that have not begun, or were put back."""
        return len(self._waiting)

    @property
    def kv_tokens_used(self) -> int:
        """KV room, in tokens, reserved for those who run."""
        return self._kv.used

    @property
    def kv_tokens_retained(self) -> int:
        """KV room, in tokens, that those who have ended take until somebody needs it."""
        return self._kv.retained_tokens

    @property
    def depth(self) -> int:
        """How many steps may be in flight at present."""
        return self._in_flight.depth

    def submit(self, sequence: Sequence) -> None:
        """Take a sequence. Raises QueueFull, or ValueError when it could never get a token."""
        self._limits.require_room(len(sequence.tokens), sequence.max_tokens)
        if len(self._waiting) >= self._limits.max_waiting:
            raise QueueFull
        queue_up(self._waiting, sequence)

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence; what the stages have cached of it is retained, or freed by the next step."""
        if sequence.phase is Phase.WAITING and sequence in self._waiting:
            self._waiting.remove(sequence)
        elif sequence.phase is Phase.RUNNING:
            self._stop_running(sequence)
            self._kv.end(sequence)
        self._finish(sequence)

    def to_decode(self) -> list[Ask]:
        """Whom the next step asks the drafter about, and for how many drafts at most; for drafts made beforehand."""
        if self._in_flight.full:
            return []
        turn = [self._ready[index] for index in range(self._share())]
        left = self._draft_rows(len(turn))
        return [Ask(one.seq, one.tokens, min(left, self._draft_limit(one))) for one in turn]

    def next_step(self) -> PlannedStep | None:
        """The next step, or None when the pipeline is full or nothing is ready."""
        if self._in_flight.full:
            return None
        if (alone := self._try_alone()) is not None:
            return alone
        # Who is talking takes the KV room that it needs before anybody new is let in: nothing is opened only to be
        # put back in the same step.
        chunks = self._decode_chunks()
        opened = self._prefill(chunks) if self._prefilling or self._waiting else []
        return self._in_flight.begin(opened, chunks, self._kv.take_freed()) if chunks or self._kv.has_freed else None

    def on_sampled(
        self, step: int, choices: Choices, times: StepTimes = UNMEASURED, round_trip_us: float = 0.0
    ) -> list[Progress]:
        """A step came back from the last stage, `round_trip_us` after it was planned.

        Raises ValueError when it is not in flight, or the choices are not those that it asked for (see `answered`).
        """
        planned = self._in_flight.returned(step, times, round_trip_us)
        if planned.chunks:
            self._suspects.answered()
        progress: list[Progress] = []
        for chunk, got in answered(planned, choices):
            # Who was cancelled or put back meanwhile is not there any more: its sample comes too late.
            if (sequence := self._by_pipeline.get(chunk.seq)) is not None:
                self._take(sequence, chunk, got, progress)
        return progress

    def on_failed(self, step: int, *, own: bool = False) -> Failure:
        """A stage could not run a step: its sequences begin anew, each alone, and who fails alone is ended.

        `own`: it failed by what was asked of it, not by the state of the stage. The stages behind that one never saw
        the step, so what it freed is freed again. Steps that were in flight behind it may fail only because they build
        on it: that makes nobody a suspect.
        """
        found = self._in_flight.failed(step)
        if found is None:
            return Failure([])
        planned, tainted = found
        hit = [self._by_pipeline[chunk.seq] for chunk in planned.chunks if chunk.seq in self._by_pipeline]
        for chunk in planned.chunks:
            if chunk.seq not in self._by_pipeline:
                self._kv.discard(chunk.seq)
        hit.sort(key=lambda one: one.pipeline_id)
        alone = len(planned.chunks) == 1 and bool(hit)
        verdict = self._suspects.verdict(hit, alone=alone, own=own) if not tainted else Verdict.LATER
        for sequence in reversed(hit):
            if verdict is Verdict.GUILTY:
                self._release(sequence)
                self._finish(sequence)
            else:
                self._put_back(sequence)
        self._kv.free_again(planned.free)
        return Failure(hit if verdict is Verdict.GUILTY else [], verdict is Verdict.SICK)

    def _try_alone(self) -> PlannedStep | None:
        """A step for nothing but the suspect whose turn it is; every other step is for all who are none."""
        suspect = self._suspects.current
        self._tried_alone = suspect is not None and not (self._tried_alone and self._ready)
        if suspect is None or not self._tried_alone:
            return None
        chunks: list[Chunk] = []
        if suspect.phase is Phase.WAITING and self._prefilling is None and self._waiting[0] is not suspect:
            self._waiting.remove(suspect)
            self._waiting.appendleft(suspect)
        if self._prefilling is suspect or (suspect.phase is Phase.WAITING and self._prefilling is None):
            opened = self._prefill(chunks, alone=True)
            if chunks:
                return self._in_flight.begin(opened, chunks, self._kv.take_freed())
        return None

    def _share(self) -> int:
        return min(len(self._ready), self._in_flight.share(self._decoding))

    def _decode_chunks(self) -> list[Chunk]:
        turn = [self._ready.popleft() for _ in range(self._share())]
        for sequence in turn:
            if sequence.phase is Phase.RUNNING:
                self._grow(sequence)
        turn = [sequence for sequence in turn if sequence.phase is Phase.RUNNING]
        left = self._draft_rows(len(turn))
        chunks: list[Chunk] = []
        for index, sequence in enumerate(turn):
            drafts = self._drafts(sequence, -(-left // (len(turn) - index))) if left else []
            left -= len(drafts)
            start = sequence.sent
            tokens = (*sequence.tokens[start:], *drafts)
            sequence.sent, sequence.cached = len(sequence.tokens), start + len(tokens)
            chunks.append(Chunk(sequence.pipeline_id, start, tokens, len(tokens)))
        return chunks

    def _draft_rows(self, decoding: int) -> int:
        return self._limits.draft_rows_beside(decoding) if self._drafter is not None else 0

    def _draft_limit(self, sequence: Sequence) -> int:
        """How many drafts, if all were right, would not lead past the end of the sequence."""
        return self._limits.left_to(len(sequence.tokens), sequence.max_tokens - sequence.generated) - 1

    def _drafts(self, sequence: Sequence, most: int) -> list[int]:
        limit = min(most, self._draft_limit(sequence))
        if self._drafter is None or limit <= 0:
            return []
        limit = min(limit, self._kv.reserve(sequence, len(sequence.tokens) + limit) - len(sequence.tokens))
        return self._drafter.propose(sequence.seq, sequence.tokens, limit)[:limit] if limit > 0 else []

    def _prefill(self, chunks: list[Chunk], *, alone: bool = False) -> list[Opening]:
        """Add a step's prefill to its chunks, in the order in which the prompts wait; returns what it opens.

        Nobody new is let in while there are suspects, but the one whose turn it is, `alone`.
        """
        first = self._prefilling or self._waiting[0]
        if self._suspects and not alone and (first in self._suspects or self._prefilling is None):
            return []
        most = self._limits.step_tokens - sum(len(chunk.tokens) for chunk in chunks)
        budget = chunk_tokens(
            len(first.tokens), self._limits.n_stages, most, self._in_flight.pace, decoding=self._decoding > 0
        )
        opened: list[Opening] = []
        sent_before: dict[int, int] = {}
        while budget > 0:
            if (sequence := self._prefilling) is None:
                # Of a suspect the first step begins; nobody else may be in it.
                done = chunks if alone else self._suspects
                if done or (opening := self._begin(opened, sent_before)) is None:
                    break
                opened.append(opening)
                continue
            start = sent_before[sequence.pipeline_id] = sequence.sent
            end = sequence.sent = sequence.cached = min(start + budget, sequence.prefix)
            budget -= end - start
            whole = end == sequence.prefix
            chunks.append(Chunk(sequence.pipeline_id, start, tuple(sequence.tokens[start:end]), int(whole)))
            if whole:
                self._prefilling = None
                self._decoding += 1
        return opened

    def _begin(self, opened: list[Opening], sent_before: dict[int, int]) -> Opening | None:
        """Let in who has waited longest, if there is room for it, and no prompt in doubt that it could begin with."""
        full = self._in_flight.doubtful or len(self._running) >= self._limits.max_running
        if full or not may_open(self._waiting, opened):
            return None
        sequence = self._waiting[0]
        need = min(len(sequence.tokens) + self._limits.growth, self._limits.room)
        if not self._kv.fits(need) or (fork := self._kv.find(sequence.tokens, sent_before)) is None:
            return None
        self._waiting.popleft()
        self.prefix_tokens_reused += fork.length
        sequence.phase, sequence.prefix = Phase.RUNNING, len(sequence.tokens)
        sequence.sent = sequence.cached = fork.length
        sequence.pipeline_id = self._next_pipeline_id
        self._next_pipeline_id += 1
        self._running.append(sequence)
        self._by_pipeline[sequence.pipeline_id] = self._prefilling = sequence
        self._kv.begin(sequence, fork, need)
        return Opening(sequence.pipeline_id, sequence.sampling, fork.source, fork.length)

    def _grow(self, sequence: Sequence) -> None:
        """Make sure that the newest token has KV room, putting the youngest sequences back if it must."""
        need = len(sequence.tokens)
        while sequence.phase is Phase.RUNNING and self._kv.reserve(sequence, need) < need:
            self._put_back(self._running[-1])

    def _put_back(self, sequence: Sequence) -> None:
        """Give up a sequence's KV; it will be replayed from its tokens when there is room again."""
        self._release(sequence)
        sequence.phase, sequence.sent = Phase.WAITING, 0
        self._waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        self._stop_running(sequence)
        self._kv.drop(sequence)

    def _stop_running(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        del self._by_pipeline[sequence.pipeline_id]
        if sequence is self._prefilling:
            self._prefilling = None
        else:
            self._decoding -= 1
            if sequence in self._ready:
                self._ready.remove(sequence)

    def _finish(self, sequence: Sequence) -> None:
        if sequence.phase is not Phase.DONE and self._drafter is not None:
            self._drafter.forget(sequence.seq)
        self._suspects.clear(sequence)
        sequence.phase = Phase.DONE

    def _take(self, sequence: Sequence, chunk: Chunk, got: Choices, progress: list[Progress]) -> None:
        """Choices of a sequence's chunk came: as long as they are its drafts, these are in the caches already."""
        self._suspects.clear(sequence)
        if chunk.sample > 1 and self._drafter is not None:
            self._drafter.observe(sequence.seq, chunk.sample - 1, len(got) - 1)
        right = chunk.start + len(chunk.tokens) - chunk.sample + len(got)
        came, ended = accept(sequence, got, self._limits.room)
        progress += came
        if not ended:
            sequence.sent = min(right, len(sequence.tokens) - 1)  # the newest token is always still to be sent
            self._ready.append(sequence)
            return
        sequence.sent = min(right, len(sequence.tokens))
        self.cancel(sequence)
