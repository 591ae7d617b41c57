"""Shared prefixes in the scheduler: who begins with whose KV, what is kept, and what gives way."""

from swarmd.node.engine.sampling_params import SamplingParams
from swarmd.node.serving.messages import Opening, TokenChoice
from swarmd.node.serving.scheduler import Scheduler
from swarmd.node.serving.sequences import Sequence
from swarmd.node.serving.steps import Limits

SYSTEM = list(range(200, 240))


def limits(**changes):
    values = {"kv_tokens": 320, "context": 300, "max_running": 8, "growth": 4, "step_tokens": 64}
    return Limits(1, **(values | changes))


def sequence(prompt, max_tokens=2, seq=0):
    return Sequence(seq, list(prompt), SamplingParams(), max_tokens, frozenset())


def planned(scheduler):
    step = scheduler.next_step()
    assert step is not None
    return step


def served(scheduler, step, token=1):
    asking = [chunk for chunk in step.chunks if chunk.sample]
    choices = [TokenChoice(chunk.seq, chunk.start + len(chunk.tokens), token, 0.0) for chunk in asking]
    return scheduler.on_sampled(step.step, tuple(choices))


def run(scheduler, *sequences):
    """Serve these to their ends; the steps that it took."""
    for one in sequences:
        scheduler.submit(one)
    steps = []
    while step := scheduler.next_step():
        steps.append(step)
        served(scheduler, step)
    return steps


def openings(steps):
    return [opening for step in steps for opening in step.open]


def test_a_prompt_begins_with_what_a_finished_one_has_computed_of_it():
    scheduler = Scheduler(limits())
    run(scheduler, sequence([*SYSTEM, 1, 2]))
    step = run(scheduler, sequence([*SYSTEM, 8, 9]))[0]
    assert step.open == (Opening(1, SamplingParams(), 0, 40),)
    assert [(chunk.start, chunk.tokens, chunk.sample) for chunk in step.chunks] == [(40, (8, 9), 1)]
    assert scheduler.prefix_tokens_reused == 40


def test_the_same_prompt_again_computes_its_last_token_to_sample_from():
    scheduler = Scheduler(limits())
    run(scheduler, sequence(SYSTEM))
    step = run(scheduler, sequence(SYSTEM))[0]
    assert step.open[0].length == 39
    assert [chunk.tokens for chunk in step.chunks] == [(239,)]


def test_an_answer_is_a_prefix_too_as_far_as_it_was_sent():
    """The token drawn last was never sent, so nobody has computed it."""
    scheduler = Scheduler(limits())
    one = sequence(SYSTEM, max_tokens=5)
    run(scheduler, one)
    step = run(scheduler, sequence([*one.tokens, 7, 7]))[0]
    assert len(one.tokens) == 45
    assert step.open[0].length == 44


def test_short_prefixes_are_not_worth_a_fork():
    scheduler = Scheduler(limits())
    run(scheduler, sequence([*SYSTEM[:15], 1, 2, 3]))
    steps = run(scheduler, sequence([*SYSTEM[:15], 8, 9]))
    assert openings(steps)[0].source == -1


def test_a_source_of_which_the_fork_takes_nearly_all_goes_in_the_same_step():
    scheduler = Scheduler(limits())
    one = sequence(SYSTEM, max_tokens=8)
    run(scheduler, one)
    scheduler.submit(sequence([*one.tokens, 5]))
    step = planned(scheduler)
    assert (step.open[0].source, step.free) == (0, (0,))
    assert scheduler.kv_tokens_retained == 0


def test_a_source_that_has_more_to_give_stays():
    scheduler = Scheduler(limits())
    run(scheduler, sequence([*SYSTEM, *range(30)]))
    scheduler.submit(sequence([*SYSTEM, 99]))
    step = planned(scheduler)
    assert (step.open[0].source, step.free) == (0, ())
    assert scheduler.kv_tokens_retained == 80, "71 tokens, in blocks"


def test_those_who_come_together_wait_one_step_for_the_prefix_that_they_share():
    scheduler = Scheduler(limits(step_tokens=64))
    for seq in range(3):
        scheduler.submit(sequence([*SYSTEM, seq], seq=seq))
    first = planned(scheduler)
    assert [chunk.seq for chunk in first.chunks] == [0], "there would be room for more in the step"
    served(scheduler, first)
    second = planned(scheduler)
    assert [(opening.source, opening.length) for opening in second.open] == [(0, 40)] * 2
    assert [chunk.tokens for chunk in second.chunks] == [(1,), (1,), (2,)]


def test_who_shares_nothing_does_not_wait():
    scheduler = Scheduler(limits())
    for seq in range(3):
        scheduler.submit(sequence([seq, *range(10)], seq=seq))
    assert len(planned(scheduler).chunks) == 3


def test_a_fork_takes_of_a_running_prompt_what_earlier_steps_have_sent():
    """Two long prompts with the same beginning: the second begins while the first is decoding."""
    scheduler = Scheduler(limits(step_tokens=20))
    first = sequence([*SYSTEM, 1], max_tokens=20)
    scheduler.submit(first)
    for _ in range(3):
        served(scheduler, planned(scheduler))
    scheduler.submit(sequence([*SYSTEM, 2], seq=1))
    step = planned(scheduler)
    assert step.open == (Opening(1, SamplingParams(), 0, 40),)
    assert (step.free, len(step.chunks)) == ((), 2)


def test_who_was_cancelled_in_the_middle_of_its_prompt_leaves_what_was_computed():
    scheduler = Scheduler(limits(step_tokens=20))
    gone = sequence([*SYSTEM, 1])
    scheduler.submit(gone)
    served(scheduler, planned(scheduler))
    scheduler.cancel(gone)
    assert (scheduler.running, scheduler.kv_tokens_used, scheduler.kv_tokens_retained) == (0, 0, 32)
    scheduler.submit(sequence([*SYSTEM, 2]))
    assert planned(scheduler).open[0].length == 20


def test_the_least_recently_used_gives_way():
    scheduler = Scheduler(limits(kv_tokens=160))
    prompts = [[seed, *range(40)] for seed in (50, 51, 52)]
    for prompt in prompts:
        run(scheduler, sequence(prompt))
    assert scheduler.kv_tokens_retained == 144
    scheduler.submit(sequence([*prompts[0][:20], 9]))
    step = planned(scheduler)
    assert (step.open[0].source, step.free) == (0, (1,)), "0 is used just now"


def test_a_source_is_used_even_as_it_gives_way():
    """A step's openings come before its frees."""
    scheduler = Scheduler(limits(kv_tokens=160))
    run(scheduler, sequence([*SYSTEM, *range(30)]))
    scheduler.submit(sequence([*SYSTEM, *range(90, 180)]))
    step = planned(scheduler)
    assert (step.open[0].source, step.open[0].length, step.free) == (0, 40, (0,))
    assert (scheduler.kv_tokens_used, scheduler.kv_tokens_retained) == (144, 0)


def test_no_more_are_kept_than_may_be():
    scheduler = Scheduler(limits(max_retained=2))
    for seed in range(5):
        run(scheduler, sequence([seed, *range(20)]))
    assert scheduler.kv_tokens_retained == 64
    scheduler = Scheduler(limits(max_retained=0))
    steps = run(scheduler, sequence(SYSTEM))
    assert steps[-1].free == (0,)


def test_what_somebody_else_holds_is_not_kept_twice():
    scheduler = Scheduler(limits())
    run(scheduler, sequence([*SYSTEM, 5], max_tokens=20), sequence([*SYSTEM, 6], max_tokens=20, seq=1))
    both = scheduler.kv_tokens_retained
    run(scheduler, sequence([*SYSTEM, 5], max_tokens=10), sequence([*SYSTEM, 6], max_tokens=20, seq=1))
    assert (both, scheduler.kv_tokens_retained) == (128, 128)


def test_room_is_counted_in_whole_blocks():
    """A stage cannot put two sequences into one block, so the last block of each counts whole."""
    scheduler = Scheduler(limits(kv_tokens=100, growth=1))
    for seq in range(7):
        scheduler.submit(sequence([seq, 1, 2], seq=seq))
    assert len(planned(scheduler).open) == 6
    assert scheduler.kv_tokens_used == 96
