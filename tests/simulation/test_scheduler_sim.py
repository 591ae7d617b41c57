"""The scheduler against a pipeline that checks every step, under every interleaving and in virtual time."""

import heapq
import itertools
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.fake_pipeline import VOCABULARY, FakePipeline, solo_run

from swarmd.node.engine.sampling_params import SamplingParams
from swarmd.node.serving.messages import Sampled, StepFailed
from swarmd.node.serving.scheduler import Limits, Progress, QueueFull, Scheduler
from swarmd.node.serving.sequences import Phase, Sequence


@dataclass
class Stream:
    """What one client asked for and what it has seen."""

    sequence: Sequence
    expected: list[int]
    reason: str
    got: list[int] = field(default_factory=list)
    finish: str | None = None
    dropped: bool = False

    def take(self, progress: Progress) -> None:
        assert not self.dropped, "nothing comes for who was cancelled"
        assert self.finish is None, "nothing comes after the end"
        if progress.choice is not None:
            self.got.append(progress.choice.token)
        self.finish = progress.finish

    def check(self) -> None:
        assert self.got == self.expected[: len(self.got)], "its own tokens, in order, none lost, none twice"
        if self.finish is not None:
            assert (self.got, self.finish) == (self.expected, self.reason)


def stream(seq: int, prompt: list[int], max_tokens: int, stop: frozenset[int], limits: Limits) -> Stream:
    """A request with the answer that a lone run without any cache gives."""
    count = min(max_tokens, min(limits.context, limits.kv_tokens) - len(prompt))
    expected = solo_run(prompt, limits.n_stages, count)
    ends = [index for index, token in enumerate(expected) if token in stop]
    reason = "stop" if ends else "length"
    if ends:
        expected = expected[: ends[0]]
    return Stream(Sequence(seq, list(prompt), SamplingParams(), max_tokens, stop), expected, reason)


@st.composite
def some_limits(draw):
    step_tokens = draw(st.integers(2, 12))
    return Limits(
        n_stages=draw(st.integers(1, 4)),
        kv_tokens=draw(st.integers(4, 60)),
        context=draw(st.integers(4, 40)),
        step_tokens=step_tokens,
        growth=draw(st.integers(1, 6)),
        max_running=draw(st.integers(1, step_tokens - 1)),
        max_waiting=draw(st.integers(1, 6)),
    )


class Interleavings(RuleBasedStateMachine):
    """Clients come and go, stages run and fail, and answers arrive, in any order."""

    @initialize(limits=some_limits())
    def start(self, limits):
        self.limits = limits
        self.scheduler = Scheduler(limits)
        self.pipeline = FakePipeline(limits.n_stages, limits.kv_tokens)
        self.streams: list[Stream] = []

    @rule(
        prompt=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=39),
        max_tokens=st.integers(1, 30),
        stop=st.frozensets(st.integers(0, VOCABULARY - 1), max_size=3),
    )
    def submit(self, prompt, max_tokens, stop):
        if len(prompt) >= min(self.limits.context, self.limits.kv_tokens):
            prompt = prompt[:3]
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

    @rule(choices=st.lists(st.integers(0, 5), min_size=1, max_size=40))
    def work(self, choices):
        """Whatever can move next moves in the order chosen: a stage, the answers, or the scheduler."""
        for choice in choices:
            if choice < self.limits.n_stages:
                if self.pipeline.queues[choice]:
                    self.pipeline.advance(choice)
            elif choice == 5:
                self.answer()
            else:
                self.plan()

    def plan(self):
        step = self.scheduler.next_step()
        if step is not None:
            assert sum(len(chunk.tokens) for chunk in step.chunks) <= self.limits.step_tokens
            assert not {opening.seq for opening in step.open} & set(step.free)
            self.pipeline.begin(step)

    def answer(self):
        if self.pipeline.answers:
            self.take(self.pipeline.answers.popleft())

    def take(self, message: Sampled | StepFailed) -> None:
        if isinstance(message, StepFailed):
            for sequence in self.scheduler.on_failed(message.step):
                self.streams[sequence.seq].dropped = True
        else:
            for progress in self.scheduler.on_sampled(message.step, message.choices):
                self.streams[progress.seq].take(progress)

    @invariant()
    def nothing_is_over_its_limit(self):
        assert self.pipeline.in_flight <= self.limits.n_stages
        assert 0 <= self.scheduler.kv_tokens_used <= self.limits.kv_tokens
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
            assert all(stage.kv == {} for stage in self.pipeline.stages), "no stage keeps anything"

    def drain(self) -> None:
        left = 60 + sum(len(one.sequence.tokens) + 60 for one in self.streams) * 20
        while True:
            step = self.scheduler.next_step()
            if step is not None:
                self.pipeline.begin(step)
                left -= 1
                assert left > 0, "no end in sight: somebody starves"
            elif self.pipeline.in_flight:
                self.pipeline.flush()
                self.take(self.pipeline.answers.popleft())
            else:
                return


class InterleavingsWithFailures(Interleavings):
    """The same, with steps that a stage cannot run: whose step failed ends, everybody else is as right as before."""

    @rule(index=st.integers(0, 3))
    def fail_a_stage(self, index):
        if index < self.limits.n_stages and self.pipeline.queues[index]:
            self.pipeline.fail(index)


for machine in (Interleavings, InterleavingsWithFailures):
    machine.TestCase.settings = settings(
        max_examples=80, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
TestInterleavings = Interleavings.TestCase
TestInterleavingsWithFailures = InterleavingsWithFailures.TestCase


class Clocked:
    """A pipeline in virtual time: a step takes each stage `base` seconds and `per_token` for every token in it."""

    def __init__(self, limits: Limits, *, base: float = 1.0, per_token: float = 0.0) -> None:
        self.limits = limits
        self.scheduler = Scheduler(limits)
        self.pipeline = FakePipeline(limits.n_stages, limits.kv_tokens)
        self.now = 0.0
        self.busy = [0.0] * limits.n_stages
        self.steps = 0
        self.token_times: dict[int, list[float]] = {}
        self.token_steps: dict[int, list[int]] = {}
        self._base = base
        self._per_token = per_token
        self._events: list[tuple[float, int, int]] = []
        self._order = itertools.count()
        self._working = [False] * limits.n_stages

    def step_seconds(self, tokens: int) -> float:
        return self._base + self._per_token * tokens

    def submit(self, one: Stream) -> None:
        self.token_times[one.sequence.seq], self.token_steps[one.sequence.seq] = [], []
        self.scheduler.submit(one.sequence)

    def run(self, streams: list[Stream], *, until: float = float("inf")) -> None:
        """Let time pass until everything is done, or until then."""
        self._go_on()
        while self._events and self._events[0][0] <= until:
            self.now, _, index = heapq.heappop(self._events)
            self._working[index] = False
            self.pipeline.advance(index)
            while self.pipeline.answers:
                self._take(self.pipeline.answers.popleft(), streams)
            self._go_on()

    def _take(self, message: Sampled | StepFailed, streams: list[Stream]) -> None:
        assert isinstance(message, Sampled)
        for progress in self.scheduler.on_sampled(message.step, message.choices):
            streams[progress.seq].take(progress)
            self.token_times[progress.seq].append(self.now)
            self.token_steps[progress.seq].append(self.steps)

    def _go_on(self) -> None:
        while step := self.scheduler.next_step():
            assert not {opening.seq for opening in step.open} & set(step.free)
            self.steps += 1
            self.pipeline.begin(step)
        for index, queue in enumerate(self.pipeline.queues):
            if queue and not self._working[index]:
                seconds = self.step_seconds(sum(len(chunk.tokens) for chunk in queue[0].step.chunks))
                self._working[index] = True
                self.busy[index] += seconds
                heapq.heappush(self._events, (self.now + seconds, next(self._order), index))


def gaps(values):
    return [later - earlier for earlier, later in itertools.pairwise(values)]


@pytest.mark.parametrize("n_stages", [1, 2, 3, 4])
def test_a_long_prompt_does_not_stall_who_is_talking(n_stages):
    """While the prompt is read, a running stream gets a token in every round of full steps. Only when the prompt comes
    does it wait once for the other stages' steps that are queued before the first stage."""
    limits = Limits(n_stages=n_stages, kv_tokens=4000, context=2000, step_tokens=32, max_running=16)
    clocked = Clocked(limits, per_token=0.1)
    streams = [stream(seq, [seq, 1], 60, frozenset(), limits) for seq in range(6)]
    for one in streams:
        clocked.submit(one)
    clocked.run(streams, until=40.0)
    long = stream(6, [index % VOCABULARY for index in range(1500)], 5, frozenset(), limits)
    streams.append(long)
    clocked.submit(long)
    clocked.run(streams)
    for one in streams:
        one.check()
        assert one.finish == "length"
    assert clocked.token_times[6][0] > 100, "the prompt was long indeed"
    round_seconds = n_stages * clocked.step_seconds(limits.step_tokens)
    for seq in range(6):
        second, worst = sorted(gaps(clocked.token_times[seq]))[-2:]
        assert second <= round_seconds + 0.001
        assert worst < 2 * round_seconds


def random_traffic(clocked: Clocked, rng: random.Random, requests: int, prompts: tuple[int, ...]) -> list[Stream]:
    """Requests of all lengths that come together or far apart, of which every fifth is cancelled somewhere."""
    streams: list[Stream] = []
    for index in range(requests):
        prompt = [rng.randrange(VOCABULARY) for _ in range(rng.choice(prompts))]
        stop = frozenset(range(rng.choice((0, 0, 2))))
        streams.append(stream(index, prompt, rng.randint(1, 40), stop, clocked.limits))
        clocked.submit(streams[-1])
        clocked.run(streams, until=clocked.now + rng.choice((0.0, 1.0, 20.0)))
        if rng.random() < 0.2:
            dropped = rng.choice(streams)
            clocked.scheduler.cancel(dropped.sequence)
            dropped.dropped |= dropped.finish is None
    clocked.run(streams)
    for one in streams:
        one.check()
        assert one.dropped or one.finish
    assert all(stage.kv == {} for stage in clocked.pipeline.stages)
    return streams


@pytest.mark.parametrize("seed", range(12))
def test_running_streams_get_a_token_every_few_steps_whatever_else_comes_and_goes(seed):
    """Without a shortage of KV, a stream gets its next token within two rounds of the pipeline: it waits less than one
    for its turn, and its step takes another."""
    rng = random.Random(seed)
    n_stages = rng.randint(1, 4)
    limits = Limits(n_stages=n_stages, kv_tokens=10_000, context=300, step_tokens=24, max_running=12, max_waiting=500)
    clocked = Clocked(limits, per_token=0.05)
    random_traffic(clocked, rng, 60, (1, 2, 5, 40, 200))
    assert max(gap for steps in clocked.token_steps.values() for gap in gaps(steps)) <= 2 * n_stages


@pytest.mark.parametrize("seed", range(12))
def test_random_traffic_with_too_little_kv_room_gets_every_answer_right(seed):
    rng = random.Random(seed)
    limits = Limits(
        n_stages=rng.randint(1, 4),
        kv_tokens=rng.randint(50, 120),
        context=50,
        step_tokens=24,
        growth=rng.choice((1, 4, 16)),
        max_running=12,
        max_waiting=500,
    )
    clocked = Clocked(limits, per_token=0.05)
    streams = random_traffic(clocked, rng, 80, (1, 2, 5, 40))
    begun = max(one.sequence.pipeline_id for one in streams) + 1
    assert len(streams) * 0.8 < begun < len(streams) * 3, "what was put back is not put back over and over"


@pytest.mark.parametrize("n_stages", [2, 3, 4])
def test_every_stage_works_at_the_same_time(n_stages):
    """Decoding many streams, and prefilling one long prompt, keep all stages busy nearly all the time."""
    limits = Limits(n_stages=n_stages, kv_tokens=4000, context=2000, step_tokens=32, max_running=16)
    many = [stream(seq, [seq, 1], 80, frozenset(), limits) for seq in range(2 * n_stages)]
    one_long = [stream(0, [index % VOCABULARY for index in range(1600)], 1, frozenset(), limits)]
    for streams in (many, one_long):
        clocked = Clocked(limits)
        for one in streams:
            clocked.submit(one)
        clocked.run(streams)
        assert all(one.finish for one in streams)
        assert min(clocked.busy) > 0.85 * clocked.now


def test_who_waits_is_let_in_in_order_and_nobody_waits_for_ever_while_others_keep_coming():
    """A large request is not overtaken for ever by small ones that would fit."""
    limits = Limits(n_stages=2, kv_tokens=100, context=90, step_tokens=16, max_running=8, max_waiting=1000)
    clocked = Clocked(limits)
    streams: list[Stream] = []
    for index in range(300):
        length = 80 if index == 20 else 3
        streams.append(stream(index, [index % VOCABULARY] * length, 5, frozenset(), limits))
        clocked.submit(streams[-1])
        clocked.run(streams, until=clocked.now + 0.5)
    clocked.run(streams)
    firsts = [clocked.token_times[one.sequence.seq][0] for one in streams]
    assert firsts == sorted(firsts), "first come, first served"


def test_when_kv_is_short_the_oldest_goes_on_and_the_work_is_done_all_the_same():
    limits = Limits(n_stages=3, kv_tokens=60, context=60, step_tokens=16, growth=2, max_running=8)
    clocked = Clocked(limits)
    streams = [stream(seq, [seq] * 4, 40, frozenset(), limits) for seq in range(8)]
    for one in streams:
        clocked.submit(one)
    clocked.run(streams)
    for one in streams:
        one.check()
    ends = [clocked.token_times[one.sequence.seq][-1] for one in streams]
    assert ends == sorted(ends), "who came first is never put back for who came later"
    begun = max(one.sequence.pipeline_id for one in streams) + 1
    assert begun > 8, "some were put back"
    assert begun < 8 * 12, "and not over and over"
    assert max(stage.most_cached for stage in clocked.pipeline.stages) > 50, "the room there is was used"
