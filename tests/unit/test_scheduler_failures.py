"""Steps that fail: who was in one is tried again alone, so that the guilty one ends and nobody else loses a token."""

import random

import pytest
from support.fake_pipeline import VOCABULARY, FakePipeline, solo_run

from swarmd.node.engine.sampling_params import SamplingParams
from swarmd.node.serving.messages import Sampled, StepFailed, TokenChoice
from swarmd.node.serving.scheduler import Scheduler
from swarmd.node.serving.sequences import Phase, Sequence
from swarmd.node.serving.steps import Limits, PlannedStep
from swarmd.node.serving.suspects import Failure

POISON = VOCABULARY + 1


def limits(**changes):
    """One stage that holds 100 tokens, each in a block of its own, and steps of at most 8."""
    values = {"n_stages": 1, "kv_tokens": 100, "context": 50, "step_tokens": 8, "growth": 4, "max_running": 7}
    values["kv_block"] = 1
    return Limits(**(values | changes))


def sequence(seq, prompt, max_tokens=20):
    return Sequence(seq, list(prompt), SamplingParams(), max_tokens, frozenset())


def planned(scheduler) -> PlannedStep:
    step = scheduler.next_step()
    assert step is not None
    return step


def served(scheduler, step, token=1):
    """Answer a step with this token for everybody who asks."""
    choices = tuple(
        TokenChoice(chunk.seq, chunk.start + len(chunk.tokens), token, -0.5) for chunk in step.chunks if chunk.sample
    )
    return scheduler.on_sampled(step.step, choices)


def shape(step):
    return [(chunk.seq, chunk.start, len(chunk.tokens), chunk.sample) for chunk in step.chunks]


def decoding(scheduler, count):
    """So many sequences of one token that have their first answer and decode next."""
    sequences = [sequence(seq, [seq]) for seq in range(count)]
    for one in sequences:
        scheduler.submit(one)
    while not all(one.generated for one in sequences):
        served(scheduler, planned(scheduler))
    return sequences


def test_all_of_a_failed_step_are_tried_alone_and_only_who_fails_again_ends():
    scheduler = Scheduler(limits())
    innocent, guilty, other = decoding(scheduler, 3)
    step = planned(scheduler)
    assert len(step.chunks) == 3
    assert scheduler.on_failed(step.step) == Failure([])
    first = planned(scheduler)
    assert (shape(first), set(first.free)) == ([(3, 0, len(innocent.tokens), 1)], {0, 1, 2})
    served(scheduler, first, token=9)
    assert innocent.tokens[-1] == 9, "it goes on where it was"
    between = planned(scheduler)
    assert shape(between) == [(3, 2, 1, 1)], "who was cleared decodes again"
    served(scheduler, between)
    second = planned(scheduler)
    assert shape(second)[0][:3] == (4, 0, len(guilty.tokens)), "the next one, alone"
    assert len(second.chunks) == 1
    assert scheduler.on_failed(second.step) == Failure([guilty])
    assert guilty.phase is Phase.DONE
    while not (other.phase is innocent.phase is Phase.DONE):
        served(scheduler, planned(scheduler))
    assert other.generated == innocent.generated == 20
    assert (scheduler.running, scheduler.waiting, scheduler.kv_tokens_used) == (0, 0, 0)


def test_what_a_failed_step_freed_is_freed_again_and_nothing_fails_twice():
    """The stages behind the one that failed never saw the step."""
    scheduler = Scheduler(limits(max_retained=0))
    [gone] = decoding(scheduler, 1)
    scheduler.cancel(gone)
    scheduler.submit(sequence(1, range(3)))
    step = planned(scheduler)
    assert (step.free, shape(step), [opening.seq for opening in step.open]) == ((0,), [(1, 0, 3, 1)], [1])
    assert scheduler.on_failed(step.step) == Failure([])
    following = planned(scheduler)
    assert set(following.free) == {0, 1}
    assert shape(following) == [(2, 0, 3, 1)]
    assert scheduler.on_failed(step.step) == Failure([])


def test_while_suspects_are_tried_others_go_on_decoding_and_nobody_new_begins():
    scheduler = Scheduler(limits(n_stages=2, step_tokens=32))
    sequences = decoding(scheduler, 4)
    first, second = planned(scheduler), planned(scheduler)
    assert (len(first.chunks), len(second.chunks)) == (2, 2)
    served(scheduler, first)
    scheduler.on_failed(second.step)
    late = sequence(9, [7])
    scheduler.submit(late)
    suspects = [one for one in sequences if one.phase is Phase.WAITING]
    assert len(suspects) == 2
    seen = []
    while any(one.phase is Phase.WAITING for one in suspects):
        step = planned(scheduler)
        seen.append(len(step.chunks))
        assert late.phase is Phase.WAITING
        served(scheduler, step)
    assert 2 in seen, "the others were served in between"
    while late.generated == 0:
        served(scheduler, planned(scheduler))


def test_who_is_in_a_step_behind_one_that_failed_is_no_suspect():
    scheduler = Scheduler(limits(n_stages=2))
    culprit, spared = decoding(scheduler, 2)
    first, following = planned(scheduler), planned(scheduler)
    assert scheduler.on_failed(first.step, own=True) == Failure([])
    assert scheduler.on_failed(following.step, own=True) == Failure([])
    again = planned(scheduler)
    assert len(again.chunks) == 1
    assert scheduler.on_failed(again.step, own=True) == Failure([culprit])
    together = planned(scheduler)
    assert scheduler.on_failed(together.step, own=True) == Failure([]), "now it is suspected for the first time"
    assert spared.phase is Phase.WAITING
    assert scheduler.on_failed(planned(scheduler).step, own=True) == Failure([spared])


@pytest.mark.parametrize("count", [1, 3])
def test_a_stage_that_can_compute_nothing_is_sick_and_nobody_is_guilty(count):
    scheduler = Scheduler(limits())
    sequences = decoding(scheduler, count)
    assert scheduler.on_failed(planned(scheduler).step) == Failure([])
    failures = [scheduler.on_failed(planned(scheduler).step) for _ in range(count)]
    assert failures == [*[Failure([])] * (count - 1), Failure([], sick=True)]
    assert all(one.phase is Phase.WAITING for one in sequences)


def test_who_fails_by_its_own_is_guilty_though_nothing_else_was_computed():
    scheduler = Scheduler(limits())
    [only] = decoding(scheduler, 1)
    assert scheduler.on_failed(planned(scheduler).step, own=True) == Failure([])
    assert scheduler.on_failed(planned(scheduler).step, own=True) == Failure([only])


def test_a_failure_of_the_stage_counts_once_another_was_computed():
    scheduler = Scheduler(limits())
    heavy, light = decoding(scheduler, 2)
    scheduler.on_failed(planned(scheduler).step)
    assert scheduler.on_failed(planned(scheduler).step) == Failure([]), "it may be the stage"
    served(scheduler, planned(scheduler))
    assert light.generated == 2
    step = planned(scheduler)
    while heavy.phase is Phase.WAITING:
        served(scheduler, step)
        step = planned(scheduler)
    assert scheduler.on_failed(step.step) == Failure([heavy]), "it is not"


def test_a_suspect_that_is_cancelled_is_forgotten():
    scheduler = Scheduler(limits())
    first, second = decoding(scheduler, 2)
    scheduler.on_failed(planned(scheduler).step)
    scheduler.cancel(first)
    served(scheduler, planned(scheduler))
    assert second.generated == 2
    scheduler.submit(sequence(5, [5]))
    assert len(planned(scheduler).chunks) == 2, "all as usual"


def test_what_was_retained_of_a_step_that_failed_is_not_used_by_anybody():
    scheduler = Scheduler(limits(n_stages=2, step_tokens=32))
    one = sequence(0, range(20))
    scheduler.submit(one)
    steps = [planned(scheduler), planned(scheduler)]
    scheduler.cancel(one)
    assert scheduler.kv_tokens_retained == 20
    assert scheduler.on_failed(steps[1].step) == Failure([])
    assert scheduler.kv_tokens_retained == 0
    scheduler.submit(sequence(1, range(20)))
    step = planned(scheduler)
    assert (step.free, step.open[0].source) == ((0,), -1)


def test_nobody_begins_with_the_prompt_of_a_step_that_may_fail_for_another():
    """Else each takes from the one before what fails with it, and so on for ever."""
    scheduler = Scheduler(limits(n_stages=2, step_tokens=32))
    alike = [sequence(seq, [*range(16), 20 + seq]) for seq in range(3)]
    scheduler.submit(alike[0])
    first = planned(scheduler)
    scheduler.submit(alike[1])
    second = planned(scheduler)
    assert second.open[0].source == first.chunks[0].seq
    scheduler.submit(alike[2])
    scheduler.on_failed(first.step)
    third = planned(scheduler)
    assert (third.open, third.chunks) == ((), ()), "it only frees; the second step is waited for"
    scheduler.on_failed(second.step)
    served(scheduler, third)
    assert planned(scheduler).open[0].source == -1


class Run:
    """A scheduler and its pipeline, where steps with POISON fail; whatever can move next moves in any order."""

    def __init__(self, seed: int, sick_from: int | None = None) -> None:
        self.rng = random.Random(seed)
        stages = self.rng.choice((1, 2, 3))
        self.limits = Limits(
            n_stages=stages, kv_tokens=400, context=60, step_tokens=self.rng.choice((8, 24)), growth=4,
            max_running=7, kv_block=self.rng.choice((1, 4)), max_retained=self.rng.choice((0, 4)),
        )  # fmt: skip
        self.scheduler = Scheduler(self.limits)
        self.pipeline = FakePipeline(self.limits)
        self.pipeline.poison = POISON
        self.got: dict[int, list[int]] = {}
        self.ended: set[int] = set()
        self.done: set[int] = set()
        self.sick = False

    def step(self) -> bool:
        """Something happens; False when nothing can."""
        moves = [index for index, queue in enumerate(self.pipeline.queues) if queue]
        choices = [*moves, *([-1] if self.pipeline.answers else [])]
        if self.rng.random() < 0.5 or not choices:
            step = self.scheduler.next_step()
            if step is not None:
                self.pipeline.begin(step)
                return True
        if not choices:
            return False
        move = self.rng.choice(choices)
        if move >= 0:
            self.pipeline.advance(move)
        else:
            self.take(self.pipeline.answers.popleft())
        return True

    def take(self, message: Sampled | StepFailed) -> None:
        if isinstance(message, StepFailed):
            failure = self.scheduler.on_failed(message.step, own=not self.pipeline.sick)
            self.ended |= {one.seq for one in failure.ended}
            self.sick |= failure.sick
            return
        for progress in self.scheduler.on_sampled(message.step, message.choices):
            if progress.choice is not None:
                self.got.setdefault(progress.seq, []).append(progress.choice.token)
            if progress.finish:
                self.done.add(progress.seq)


@pytest.mark.parametrize("seed", range(100))
def test_under_any_interleaving_the_guilty_end_and_the_innocent_get_every_token(seed):
    """Poison in the middle of prompts that share their beginnings, among others that are served at the same time."""
    run = Run(seed)
    prompts = {}
    for seq in range(10):
        prompt = [seq % 3] * 17 + [run.rng.randrange(VOCABULARY) for _ in range(run.rng.randrange(1, 8))]
        if run.rng.random() < 0.3:
            prompt[run.rng.randrange(len(prompt))] = POISON
        prompts[seq] = prompt
    poisoned = {seq for seq, prompt in prompts.items() if POISON in prompt}
    waiting = list(prompts)
    for _ in range(20_000):
        if waiting and run.rng.random() < 0.1:
            seq = waiting.pop(0)
            run.scheduler.submit(sequence(seq, prompts[seq], max_tokens=12))
        if not run.step() and not waiting:
            break
    else:
        raise AssertionError("no end in sight")
    innocent = prompts.keys() - poisoned
    assert run.ended == poisoned
    assert run.done == innocent
    assert {seq: run.got[seq] for seq in innocent} == {
        seq: solo_run(prompts[seq], run.limits.n_stages, 12) for seq in innocent
    }
    assert not poisoned & run.got.keys()
    assert (run.scheduler.running, run.scheduler.kv_tokens_used) == (0, 0)


@pytest.mark.parametrize("seed", range(20))
def test_under_any_interleaving_a_stage_that_stops_computing_is_found_sick_before_anybody_ends(seed):
    run = Run(seed)
    for seq in range(6):
        run.scheduler.submit(sequence(seq, [seq, 1, 2], max_tokens=20))
    for _ in range(run.rng.randrange(60)):
        run.step()
    run.pipeline.sick = True
    if len(run.done) == 6:
        return
    for _ in range(5000):
        run.step()
        if run.sick:
            break
    assert run.sick
    assert not run.ended
