"""What goes into the next step, case by case. The simulation beside it checks the same under every interleaving."""

import pytest
from support.fake_pipeline import FakePipeline, solo_run

from swarmd.node.engine.sampling_params import MAX_SCHEMA, NO_TOKEN, NOT_YET, SamplingParams
from swarmd.node.serving.messages import Chunk, Sampled, TokenChoice
from swarmd.node.serving.scheduler import Scheduler
from swarmd.node.serving.sequences import Phase, Sequence
from swarmd.node.serving.steps import Limits, PlannedStep, QueueFull


def limits(**changes):
    """One stage that holds 100 tokens, each in a block of its own, and steps of at most 8."""
    values = {"n_stages": 1, "kv_tokens": 100, "context": 50, "step_tokens": 8, "growth": 4, "max_running": 7}
    values["kv_block"] = 1
    return Limits(**(values | changes))


def sequence(prompt, max_tokens=20, stop=(), seq=0):
    return Sequence(seq, list(prompt), SamplingParams(), max_tokens, frozenset(stop))


def planned(scheduler) -> PlannedStep:
    step = scheduler.next_step()
    assert step is not None
    return step


def answer(scheduler, step, tokens):
    """Answer a step with one token for each of its chunks that asks for one."""
    asking = [chunk for chunk in step.chunks if chunk.sample]
    pairs = zip(asking, tokens, strict=True)
    choices = tuple(TokenChoice(chunk.seq, chunk.start + len(chunk.tokens), token, -0.5) for chunk, token in pairs)
    return scheduler.on_sampled(step.step, choices)


def served(scheduler, step, token=1):
    return answer(scheduler, step, [token] * sum(chunk.sample > 0 for chunk in step.chunks))


def shape(step):
    return [(chunk.seq, chunk.start, len(chunk.tokens), chunk.sample) for chunk in step.chunks]


def test_a_prompt_is_opened_prefilled_sampled_and_continued():
    scheduler = Scheduler(limits())
    one = sequence([10, 11, 12])
    scheduler.submit(one)
    first = planned(scheduler)
    assert [opening.seq for opening in first.open] == [0]
    assert first.chunks == (Chunk(0, 0, (10, 11, 12), 1),)
    [progress] = answer(scheduler, first, [77])
    assert progress.choice is not None
    assert (progress.seq, progress.choice.token, progress.finish) == (0, 77, None)
    assert planned(scheduler).chunks == (Chunk(0, 3, (77,), 1),)


def test_a_prompt_longer_than_a_step_goes_in_chunks_and_only_the_last_asks_for_a_token():
    scheduler = Scheduler(limits())
    scheduler.submit(sequence(range(20)))
    shapes = []
    for _ in range(3):
        step = planned(scheduler)
        shapes += shape(step)
        served(scheduler, step)
    assert shapes == [(0, 0, 8, 0), (0, 8, 8, 0), (0, 16, 4, 1)]


def test_consecutive_chunks_of_one_prompt_are_in_flight_together_one_per_stage():
    scheduler = Scheduler(limits(n_stages=3))
    scheduler.submit(sequence(range(30)))
    steps = [planned(scheduler) for _ in range(3)]
    assert [shape(step) for step in steps] == [[(0, 0, 8, 0)], [(0, 8, 8, 0)], [(0, 16, 8, 0)]]
    assert scheduler.next_step() is None, "as many steps in flight as there are stages, and no more"
    served(scheduler, steps[0])
    assert shape(planned(scheduler)) == [(0, 24, 6, 1)]


def test_nothing_is_planned_while_the_only_sequence_awaits_its_token():
    scheduler = Scheduler(limits(n_stages=2))
    scheduler.submit(sequence([1, 2]))
    planned(scheduler)
    assert scheduler.next_step() is None


def decoding(n, **changes):
    """A scheduler with `n` sequences that have one token each and are ready for the next."""
    scheduler = Scheduler(limits(**changes))
    sequences = [sequence([index], seq=index) for index in range(n)]
    for one in sequences:
        scheduler.submit(one)
    while step := scheduler.next_step():
        served(scheduler, step)
        if all(one.generated for one in sequences):
            break
    return scheduler, sequences


def test_two_stages_work_on_two_halves_of_the_decoding_sequences():
    scheduler, _ = decoding(6, n_stages=2)
    halves = [planned(scheduler), planned(scheduler)]
    assert [len(step.chunks) for step in halves] == [3, 3]
    assert {chunk.seq for step in halves for chunk in step.chunks} == set(range(6))


def test_decoding_goes_first_and_prefill_takes_what_is_left_of_the_step():
    scheduler, _ = decoding(3)
    scheduler.submit(sequence(range(30), seq=9))
    step = planned(scheduler)
    assert [len(chunk.tokens) for chunk in step.chunks] == [1, 1, 1, 5]
    assert [chunk.sample for chunk in step.chunks] == [1, 1, 1, 0]


def test_sequences_are_prefilled_in_the_order_in_which_they_came():
    scheduler, _ = decoding(2)
    for index, length in enumerate((3, 4, 5)):
        scheduler.submit(sequence(range(length), seq=10 + index))
    first = planned(scheduler)
    assert shape(first)[2:] == [(2, 0, 3, 1), (3, 0, 3, 0)]
    served(scheduler, first)
    assert (3, 3, 1, 1) in shape(planned(scheduler))


def test_answers_that_go_on_come_before_new_prompts_and_after_who_was_put_back():
    """As they are after a loss: all come at once, and of those some had been talking."""

    def after_a_loss(seq: int, generated: int) -> Sequence:
        return Sequence(seq, list(range(6 + generated)), SamplingParams(prompt_tokens=6), 20, frozenset())

    scheduler = Scheduler(limits(max_running=1, step_tokens=32))
    begun = after_a_loss(0, 0)
    scheduler.submit(begun)
    first = planned(scheduler)
    for seq, generated in ((1, 0), (2, 3), (3, 0), (4, 1)):
        scheduler.submit(after_a_loss(seq, generated))
    scheduler.on_failed(first.step)
    order = []
    while scheduler.waiting:
        step = planned(scheduler)
        running = scheduler._running[0]
        order.append(running.seq)
        served(scheduler, step)
        scheduler.cancel(running)
    assert order == [0, 2, 4, 1, 3]


def test_nobody_is_let_in_before_there_is_kv_room_for_its_prompt_and_some_more():
    scheduler = Scheduler(limits(kv_tokens=30))
    scheduler.submit(sequence(range(15), seq=0))
    scheduler.submit(sequence(range(8), seq=1))
    step = planned(scheduler)
    assert (scheduler.running, scheduler.waiting, scheduler.kv_tokens_used) == (1, 1, 19)
    served(scheduler, step)
    scheduler.submit(sequence(range(2), seq=2))
    assert planned(scheduler).open == (), "who came later does not overtake"


def test_no_more_run_than_may():
    scheduler = Scheduler(limits(max_running=2))
    for index in range(3):
        scheduler.submit(sequence([index], seq=index))
    assert len(planned(scheduler).open) == 2
    assert (scheduler.running, scheduler.waiting) == (2, 1)


def test_who_needs_kv_room_gets_it_from_the_youngest_who_then_replays_everything():
    scheduler = Scheduler(limits(kv_tokens=16))
    old, young = sequence([1, 2, 3, 4], seq=0), sequence([5, 6, 7, 8], seq=1)
    scheduler.submit(old)
    scheduler.submit(young)
    for _ in range(5):
        step = planned(scheduler)
        served(scheduler, step, token=9)
    assert scheduler.kv_tokens_used == 16
    step = planned(scheduler)
    assert step.free == (1,), "the youngest gives up its KV in the very step that needs it"
    assert [chunk.seq for chunk in step.chunks] == [0]
    assert (young.phase, young.generated) == (Phase.WAITING, 5)
    scheduler.cancel(old)
    served(scheduler, step, token=9)
    again = planned(scheduler)
    assert (again.free, [opening.seq for opening in again.open]) == ((0,), [2])
    assert again.chunks[0].tokens == (5, 6, 7, 8, 9, 9, 9, 9)


def test_who_needs_room_takes_it_before_anybody_new_is_let_in():
    """Else a newcomer would be let in only to be put back by the same step."""
    scheduler = Scheduler(limits(kv_tokens=16))
    old = sequence([1, 2, 3, 4], seq=0)
    scheduler.submit(old)
    for _ in range(5):
        served(scheduler, planned(scheduler))
    # `old` needs more room now, and the newcomer would just fit into what is left.
    scheduler.submit(sequence([5, 6, 7, 8], seq=1))
    step = planned(scheduler)
    assert (step.open, [chunk.seq for chunk in step.chunks]) == ((), [0])


def test_a_sequence_alone_may_fill_the_kv_cache_without_ever_being_put_back():
    scheduler = Scheduler(limits(kv_tokens=21, context=50, growth=16))
    scheduler.submit(sequence([1, 2, 3], max_tokens=100))
    steps = []
    while step := scheduler.next_step():
        steps.append(step)
        served(scheduler, step)
    assert sum(len(step.open) for step in steps) == 1
    assert steps[-1].chunks[-1].start == 19, "20 tokens cached, and the 21st sampled from them"


def test_a_late_sample_of_who_was_put_back_is_not_taken_for_the_new_run():
    scheduler = Scheduler(limits(n_stages=2, kv_tokens=16))
    old, young = sequence([1, 2, 3, 4], seq=0), sequence([5, 6, 7, 8], seq=1)
    scheduler.submit(old)
    scheduler.submit(young)
    served(scheduler, planned(scheduler))
    for _ in range(3):
        steps = [planned(scheduler), planned(scheduler)]
        for step in steps:
            served(scheduler, step)
    for one in (old, young):
        assert one.generated == 4
    one_step, other_step = planned(scheduler), planned(scheduler)
    assert {chunk.seq for step in (one_step, other_step) for chunk in step.chunks} == {0, 1}
    first_of = {step.chunks[0].seq: step for step in (one_step, other_step)}
    served(scheduler, first_of[0])
    step = planned(scheduler)
    assert step.free == (1,)
    assert served(scheduler, first_of[1]) == [], "its sample comes too late"
    assert young.tokens == [5, 6, 7, 8, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("changes", "max_tokens", "expected"),
    [({}, 3, 3), ({"context": 6}, 50, 2), ({"kv_tokens": 7}, 50, 3)],
    ids=["max_tokens", "context", "kv cache"],
)
def test_a_sequence_ends_at_its_length(changes, max_tokens, expected):
    scheduler = Scheduler(limits(**changes))
    scheduler.submit(sequence([1, 2, 3, 4], max_tokens=max_tokens))
    progress = []
    while step := scheduler.next_step():
        progress += served(scheduler, step)
    assert [item.finish for item in progress] == [None] * (expected - 1) + ["length"]
    assert (scheduler.running, scheduler.kv_tokens_used) == (0, 0)


def test_a_stop_token_ends_a_sequence_and_is_not_shown():
    scheduler = Scheduler(limits())
    scheduler.submit(sequence([1, 2], stop=[42]))
    answer(scheduler, planned(scheduler), [41])
    [progress] = answer(scheduler, planned(scheduler), [42])
    assert (progress.choice, progress.finish) == (None, "stop")
    assert planned(scheduler) == PlannedStep(2, (), (), (0,)), "the stages are told, though there is nothing else to do"
    assert scheduler.next_step() is None


def test_who_gets_no_token_ends_and_the_others_go_on():
    scheduler = Scheduler(limits())
    for seq in (0, 1):
        scheduler.submit(sequence([1, 2, 3], seq=seq))
    unfit, other = answer(scheduler, planned(scheduler), [NO_TOKEN, 5])
    assert (unfit.seq, unfit.choice, unfit.finish) == (0, None, "unfit")
    assert (other.seq, other.finish) == (1, None)
    assert [chunk.tokens for chunk in planned(scheduler).chunks] == [(5,)]


def test_who_is_to_wait_sends_its_last_token_again():
    scheduler = Scheduler(limits())
    scheduler.submit(sequence([1, 2, 3]))
    assert answer(scheduler, planned(scheduler), [NOT_YET]) == []
    assert shape(step := planned(scheduler)) == [(0, 2, 1, 1)]
    assert answer(scheduler, step, [NOT_YET]) == []
    step = planned(scheduler)
    assert step.chunks == (Chunk(0, 2, (3,), 1),)
    [progress] = answer(scheduler, step, [7])
    assert progress.choice is not None
    assert progress.choice.token == 7
    assert planned(scheduler).chunks == (Chunk(0, 3, (7,), 1),)


def test_schemas_that_are_too_large_together_open_in_different_steps():
    def asks(seq, schema):
        return Sequence(seq, [seq, 2], SamplingParams(json_schema=schema), 20, frozenset())

    half = '"' + "\u00e9" * (MAX_SCHEMA // 4 - 1) + '"'
    scheduler = Scheduler(limits(kv_tokens=1000, n_stages=3, step_tokens=32))
    for seq, schema in enumerate([half, "", half, "{}", half]):
        scheduler.submit(asks(seq, schema))
    assert [len(planned(scheduler).open) for _ in range(2)] == [3, 2]


def test_cancelling_who_waits_leaves_no_trace():
    scheduler = Scheduler(limits())
    one = sequence([1, 2])
    scheduler.submit(one)
    scheduler.cancel(one)
    assert (scheduler.waiting, scheduler.next_step(), one.phase) == (0, None, Phase.DONE)


def test_cancelling_who_runs_frees_it_once_and_drops_its_sample():
    scheduler = Scheduler(limits(n_stages=2))
    one = sequence([1, 2])
    scheduler.submit(one)
    step = planned(scheduler)
    scheduler.cancel(one)
    scheduler.cancel(one)
    assert scheduler.kv_tokens_used == 0
    assert planned(scheduler).free == (0,)
    assert answer(scheduler, step, [5]) == []


def test_the_waiting_line_is_bounded():
    scheduler = Scheduler(limits(max_waiting=2))
    scheduler.submit(sequence([1]))
    scheduler.submit(sequence([2]))
    with pytest.raises(QueueFull):
        scheduler.submit(sequence([3]))


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "words"),
    [([], 5, "0 tokens leave no room"), (range(50), 5, "50 tokens leave no room"), ([1], 0, "0 tokens were asked for")],
)
def test_what_could_never_get_a_token_is_refused(prompt, max_tokens, words):
    scheduler = Scheduler(limits())
    with pytest.raises(ValueError, match=words):
        scheduler.submit(sequence(prompt, max_tokens))
    assert scheduler.next_step() is None


@pytest.mark.parametrize("changes", [{"max_running": 8}, {"max_running": 0}, {"growth": 0}, {"step_tokens": 513}])
def test_limits_under_which_somebody_would_starve_are_refused(changes):
    with pytest.raises(ValueError, match="do not fit together"):
        limits(**changes)


def test_answers_to_steps_that_are_not_in_flight_are_refused():
    scheduler = Scheduler(limits())
    with pytest.raises(ValueError, match="step 7 is not in flight"):
        scheduler.on_sampled(7, ())


@pytest.mark.parametrize(
    "choices",
    [(), (TokenChoice(0, 3, 1, 0.0),), (TokenChoice(5, 2, 1, 0.0),), (TokenChoice(0, 2, 1, 0.0),) * 2],
    ids=["none", "another position", "another sequence", "twice"],
)
def test_answers_must_be_for_what_was_asked(choices):
    scheduler = Scheduler(limits())
    scheduler.submit(sequence([1, 2]))
    step = planned(scheduler)
    with pytest.raises(ValueError, match="other positions"):
        scheduler.on_sampled(step.step, choices)


@pytest.mark.parametrize("n_stages", [1, 2, 3, 4])
def test_eight_streams_at_once_equal_their_solo_runs(n_stages):
    scheduler_limits = limits(n_stages=n_stages, kv_tokens=90, step_tokens=16, max_running=8, max_retained=0)
    scheduler = Scheduler(scheduler_limits)
    pipeline = FakePipeline(scheduler_limits)
    sequences = [sequence(range(3 * index + 1), max_tokens=12, seq=index) for index in range(8)]
    for one in sequences:
        scheduler.submit(one)
    got: dict[int, list[int]] = {index: [] for index in range(8)}
    while step := scheduler.next_step():
        while step is not None:
            pipeline.begin(step)
            step = scheduler.next_step()
        pipeline.flush()
        while pipeline.answers:
            sampled = pipeline.answers.popleft()
            assert isinstance(sampled, Sampled)
            for progress in scheduler.on_sampled(sampled.step, sampled.choices):
                assert progress.choice is not None
                got[progress.seq].append(progress.choice.token)
    for index in range(8):
        assert got[index] == solo_run(list(range(3 * index + 1)), n_stages, 12)
    assert all(stage.kv == {} for stage in pipeline.stages)
    assert max(stage.most_cached for stage in pipeline.stages) > 45, "the cache was in fact contended for"
