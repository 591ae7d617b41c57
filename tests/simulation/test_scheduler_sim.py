"""The scheduler against a pipeline that checks every step, under every interleaving of what can happen."""

import random

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.clocked_pipeline import Stream, stream
from support.fake_drafter import SeerDrafter
from support.fake_pipeline import VOCABULARY, FakePipeline

from swarmd.node.serving.messages import Sampled, StepFailed, StepTimes
from swarmd.node.serving.scheduler import Scheduler
from swarmd.node.serving.sequences import Phase
from swarmd.node.serving.steps import Limits, QueueFull

# Prompts that share their beginnings: system prompts, as it were.
SHARED = [[random.Random(seed).randrange(VOCABULARY) for _ in range(60)] for seed in range(2)]


@st.composite
def some_limits(draw):
    step_tokens = draw(st.integers(2, 40))
    block = draw(st.sampled_from((1, 4, 16)))
    return Limits(
        n_stages=draw(st.integers(1, 4)),
        kv_tokens=draw(st.integers(block, 160)),
        context=draw(st.integers(4, 80)),
        step_tokens=step_tokens,
        growth=draw(st.integers(1, 6)),
        max_running=draw(st.integers(1, min(12, step_tokens - 1))),
        max_waiting=draw(st.integers(1, 6)),
        draft_rows=draw(st.integers(1, 16)),
        max_retained=draw(st.sampled_from((0, 1, 3, 64))),
        kv_block=block,
    )


class Interleavings(RuleBasedStateMachine):
    """Clients come and go, stages run and fail, and answers arrive, in any order."""

    @initialize(
        limits=some_limits(),
        seed=st.integers(0, 1000),
        right=st.sampled_from((None, 0.0, 0.7, 1.0)),
        link_us=st.sampled_from((0, 50, 900)),
    )
    def start(self, limits, seed, right, link_us):
        self.limits = limits
        self.drafter = None if right is None else SeerDrafter(limits.n_stages, random.Random(seed), right)
        self.scheduler = Scheduler(limits, self.drafter)
        self.pipeline = FakePipeline(limits)
        self.pipeline.times = StepTimes(100 * limits.n_stages, 100, 0)
        self.round_trip_us = 100 * limits.n_stages + link_us
        self.streams: list[Stream] = []
        self.failed_itself: set[int] = set()

    @rule(
        shared=st.sampled_from(SHARED),
        common=st.integers(0, 60),
        tail=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=12),
        max_tokens=st.integers(1, 30),
        stop=st.frozensets(st.integers(0, VOCABULARY - 1), max_size=3),
    )
    def submit(self, shared, common, tail, max_tokens, stop):
        self.ask(shared[:common] + tail, max_tokens, stop)

    @rule(shared=st.sampled_from(SHARED), common=st.integers(16, 60), count=st.integers(2, 5))
    def submit_several_at_once(self, shared, common, count):
        for index in range(count):
            self.ask([*shared[:common], index], 5, frozenset())

    @precondition(lambda self: self.streams)
    @rule(data=st.data(), tail=st.lists(st.integers(0, VOCABULARY - 1), max_size=5), max_tokens=st.integers(1, 20))
    def go_on_from_an_answer(self, data, tail, max_tokens):
        """The next turn of a conversation, or the same request again."""
        before = data.draw(st.sampled_from(self.streams))
        self.ask(list(before.sequence.tokens) + tail, max_tokens, frozenset())

    def ask(self, prompt, max_tokens, stop):
        if self.limits.room < 2:
            return
        prompt = prompt[: self.limits.room - 1]
        new = stream(len(self.streams), prompt, max_tokens, stop, self.limits)
        waiting = self.scheduler.waiting
        try:
            self.scheduler.submit(new.sequence)
        except QueueFull:
            assert waiting >= self.limits.max_waiting
        else:
            assert waiting < self.limits.max_waiting
            self.streams.append(new)

    @precondition(lambda self: self.streams)
    @rule(data=st.data())
    def cancel(self, data):
        chosen = data.draw(st.sampled_from(self.streams))
        self.scheduler.cancel(chosen.sequence)
        chosen.dropped |= chosen.finish is None

    @rule(seed=st.integers(0, 1 << 20), moves=st.sampled_from((1, 5, 30, 150)))
    def work(self, seed, moves):
        """Whatever can move next moves in any order: a stage, the answers, or the scheduler."""
        rng = random.Random(seed)
        for choice in rng.choices(range(6), k=moves):
            if choice < self.limits.n_stages:
                if self.pipeline.queues[choice]:
                    self.pipeline.advance(choice)
            elif choice == 5:
                self.answer()
            else:
                self.plan()

    def plan(self):
        asked = {ask.seq: ask.limit for ask in self.scheduler.to_decode()}
        step = self.scheduler.next_step()
        if step is None:
            return False
        assert sum(len(chunk.tokens) for chunk in step.chunks) <= self.limits.step_tokens
        assert not {opening.seq for opening in step.open} & set(step.free)
        by_pipeline = {one.sequence.pipeline_id: one.sequence.seq for one in self.streams}
        for chunk in step.chunks:
            if chunk.sample > 1:
                assert chunk.sample - 1 <= asked[by_pipeline[chunk.seq]], "who gets drafts was named before"
        self.pipeline.begin(step)
        assert self.pipeline.in_flight <= self.scheduler.depth <= 2 * self.limits.n_stages + 2
        return True

    def answer(self):
        if self.pipeline.answers:
            self.take(self.pipeline.answers.popleft())

    def take(self, message: Sampled | StepFailed) -> None:
        if isinstance(message, StepFailed):
            failure = self.scheduler.on_failed(message.step)
            assert len(failure.ended) <= 1, "who was in a step with others is tried alone"
            for sequence in failure.ended:
                assert message.step in self.failed_itself, "nobody ends for another's failure"
                self.streams[sequence.seq].dropped = True
        else:
            for progress in self.scheduler.on_sampled(message.step, message.choices, message.times, self.round_trip_us):
                self.streams[progress.seq].take(progress)

    @invariant()
    def nothing_is_over_its_limit(self):
        used, retained = self.scheduler.kv_tokens_used, self.scheduler.kv_tokens_retained
        assert min(used, retained) >= 0
        assert used + retained <= self.limits.kv_tokens
        assert self.scheduler.running <= self.limits.max_running
        assert self.scheduler.waiting <= self.limits.max_waiting + self.limits.max_running

    @invariant()
    def every_stream_is_right_so_far(self):
        for one in self.streams:
            one.check()

    def teardown(self):
        if hasattr(self, "scheduler"):
            self.drain()
            for one in self.streams:
                one.check()
                assert one.dropped or one.finish is not None, "everybody who was not cancelled came to an end"
                assert one.sequence.phase is Phase.DONE
            assert (self.scheduler.running, self.scheduler.waiting, self.scheduler.kv_tokens_used) == (0, 0, 0)
            assert self.drafter is None or not self.drafter.known, "the drafter was told of every end"
            for stage in self.pipeline.stages:
                lengths = {seq: len(values) for seq, values in stage.kv.items()}
                assert len(lengths) <= self.limits.max_retained
                assert sum(map(self.limits.in_blocks, lengths.values())) == self.scheduler.kv_tokens_retained
                assert stage.kv.keys() == self.pipeline.stages[0].kv.keys(), "all stages keep the same, and no more"

    def drain(self) -> None:
        left = 100 + sum(len(one.sequence.tokens) + 60 for one in self.streams) * 20
        while True:
            if self.plan():
                left -= 1
                assert left > 0, "no end in sight: somebody starves"
            elif self.pipeline.in_flight:
                self.pipeline.flush()
                self.answer()
            else:
                return


class InterleavingsWithFailures(Interleavings):
    """The same, with steps that a stage cannot run: who fails alone ends, everybody else is as right as before."""

    @rule(last=st.booleans(), opened=st.booleans())
    def fail_a_stage(self, last, opened):
        """The last or the first stage that has something to do."""
        while self.plan():
            pass
        working = [index for index, queue in enumerate(self.pipeline.queues) if queue]
        if working:
            index = working[-1 if last else 0]
            self.failed_itself.add(self.pipeline.queues[index][0].step.step)
            self.pipeline.fail(index, opened=opened)


for machine in (Interleavings, InterleavingsWithFailures):
    machine.TestCase.settings = settings(
        max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
TestInterleavings = Interleavings.TestCase
TestInterleavingsWithFailures = InterleavingsWithFailures.TestCase
