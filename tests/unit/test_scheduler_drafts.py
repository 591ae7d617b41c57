"""Drafts in the scheduler: how many are sent, what comes of right and wrong ones, where they have to stop."""

import pytest

from swarmd.node.engine.sampling_params import SamplingParams
from swarmd.node.serving.messages import Chunk, TokenChoice
from swarmd.node.serving.scheduler import Scheduler
from swarmd.node.serving.sequences import Sequence
from swarmd.node.serving.steps import Limits


class Scripted:
    """Proposes the same tokens at all times, as many as are allowed, and notes what it is asked and told."""

    def __init__(self, *guesses: int) -> None:
        self.guesses = guesses
        self.limits: list[int] = []
        self.outcomes: list[tuple[int, int, int]] = []
        self.forgotten: list[int] = []

    def propose(self, seq, tokens, limit):
        self.limits.append(limit)
        return list(self.guesses)

    def observe(self, seq, proposed, accepted):
        self.outcomes.append((seq, proposed, accepted))

    def forget(self, seq):
        self.forgotten.append(seq)


def scheduler_with(drafter, count=1, *, max_tokens=50, stop=(), prompt=2, **changes):
    """A scheduler whose sequences have their prompt behind them and one token, 100, to send."""
    values = {"kv_tokens": 320, "context": 100, "max_running": 8, "kv_block": 1, "growth": 4} | changes
    scheduler = Scheduler(Limits(1, **values), drafter)
    sequences = [
        Sequence(seq, [seq, *range(1, prompt)], SamplingParams(), max_tokens, frozenset(stop)) for seq in range(count)
    ]
    for one in sequences:
        scheduler.submit(one)
    while any(not one.generated for one in sequences):
        step = planned(scheduler)
        asking = [chunk for chunk in step.chunks if chunk.sample]
        reply(scheduler, step, *([100] for _ in asking))
    return scheduler, sequences


def planned(scheduler):
    step = scheduler.next_step()
    assert step is not None
    return step


def reply(scheduler, step, *drawn):
    """Answer a step with so many tokens for each of its chunks that asks for some."""
    choices = []
    for chunk, tokens in zip([chunk for chunk in step.chunks if chunk.sample], drawn, strict=True):
        first = chunk.start + len(chunk.tokens) - chunk.sample + 1
        choices += [TokenChoice(chunk.seq, first + index, token, 0.0) for index, token in enumerate(tokens)]
    return scheduler.on_sampled(step.step, tuple(choices))


def test_drafts_follow_the_newest_token_and_every_position_is_sampled():
    scheduler, _ = scheduler_with(Scripted(7, 8, 9))
    assert planned(scheduler).chunks == (Chunk(0, 2, (100, 7, 8, 9), 4),)


def test_right_drafts_are_kept_and_the_next_chunk_overwrites_the_wrong_ones():
    drafter = Scripted(7, 8, 9)
    scheduler, (one,) = scheduler_with(drafter)
    progress = reply(scheduler, planned(scheduler), [7, 8, 55])
    assert [item.choice.token for item in progress if item.choice] == [7, 8, 55]
    assert one.tokens == [0, 1, 100, 7, 8, 55]
    assert drafter.outcomes == [(0, 3, 2)]
    assert planned(scheduler).chunks == (Chunk(0, 5, (55, 7, 8, 9), 4),), "8 is cached, 9 is replaced"


def test_when_all_drafts_are_right_there_is_one_token_more():
    drafter = Scripted(7, 8)
    scheduler, (one,) = scheduler_with(drafter)
    reply(scheduler, planned(scheduler), [7, 8, 55])
    assert (one.tokens[3:], drafter.outcomes) == ([7, 8, 55], [(0, 2, 2)])
    assert planned(scheduler).chunks[0].start == 5


def test_when_the_first_draft_is_wrong_it_is_as_if_there_had_been_none():
    drafter = Scripted(7, 8)
    scheduler, (one,) = scheduler_with(drafter)
    reply(scheduler, planned(scheduler), [55])
    assert (one.tokens[3:], drafter.outcomes) == ([55], [(0, 2, 0)])
    assert planned(scheduler).chunks[0].start == 3


def test_a_stop_token_among_right_drafts_ends_the_sequence_there():
    drafter = Scripted(7, 42, 9)
    scheduler, (one,) = scheduler_with(drafter, stop=[42])
    progress = reply(scheduler, planned(scheduler), [7, 42, 9, 10])
    assert [(item.choice and item.choice.token, item.finish) for item in progress] == [(7, None), (None, "stop")]
    assert one.tokens == [0, 1, 100, 7]
    assert drafter.forgotten == [0]


def test_nothing_is_drafted_past_what_was_asked_for():
    drafter = Scripted(7, 8, 9, 10, 11)
    scheduler, (one,) = scheduler_with(drafter, max_tokens=4)
    step = planned(scheduler)
    assert (drafter.limits, step.chunks[0].tokens) == ([2], (100, 7, 8))
    progress = reply(scheduler, step, [7, 8, 9])
    assert [item.finish for item in progress] == [None, None, "length"]
    assert one.generated == 4


def test_the_last_token_is_not_drafted_for():
    drafter = Scripted(7)
    scheduler, _ = scheduler_with(drafter, max_tokens=2)
    assert (planned(scheduler).chunks[0].sample, drafter.limits) == (1, [])


def test_drafts_keep_within_the_context():
    drafter = Scripted(*range(20))
    scheduler, _ = scheduler_with(drafter, context=10, prompt=6)
    step = planned(scheduler)
    assert (drafter.limits, len(step.chunks[0].tokens)) == ([2], 3)
    assert [item.finish for item in reply(scheduler, step, [0, 1, 2])] == [None, None, "length"]


def test_the_rows_for_drafts_are_shared_evenly_and_what_one_leaves_the_others_get():
    drafter = Scripted(7, 8)
    scheduler, _ = scheduler_with(drafter, 4, draft_rows=16)
    step = planned(scheduler)
    assert drafter.limits == [3, 4, 4, 6]
    assert [chunk.sample for chunk in step.chunks] == [3] * 4


def test_many_who_decode_leave_no_rows_for_drafts():
    drafter = Scripted(7)
    scheduler, _ = scheduler_with(drafter, 4, draft_rows=4)
    assert ([chunk.sample for chunk in planned(scheduler).chunks], drafter.limits) == ([1] * 4, [])


def test_nobody_is_put_back_for_drafts():
    drafter = Scripted(*range(12))
    scheduler, sequences = scheduler_with(drafter, 2, kv_tokens=16, context=16, draft_rows=30)
    step = planned(scheduler)
    assert [len(chunk.tokens) for chunk in step.chunks] == [8, 4], "of 16 tokens, 10 and 6"
    assert scheduler.kv_tokens_used == 16
    assert (step.free, scheduler.running) == ((), len(sequences))


def test_what_is_asked_beforehand_is_for_those_who_decode_next():
    drafter = Scripted()
    scheduler, sequences = scheduler_with(drafter, 3, max_tokens=9)
    asks = scheduler.to_decode()
    assert [(ask.seq, ask.limit) for ask in asks] == [(0, 7), (1, 7), (2, 7)]
    assert [ask.tokens for ask in asks] == [one.tokens for one in sequences]
    planned(scheduler)
    assert scheduler.to_decode() == [], "the pipeline is full"


@pytest.mark.parametrize(
    "drawn",
    [[], [7, 8, 9, 10, 11], [8, 9], [7, 9, 9]],
    ids=["none", "more than asked", "goes on after a wrong draft", "and in the middle"],
)
def test_answers_that_do_not_fit_the_drafts_are_refused(drawn):
    scheduler, _ = scheduler_with(Scripted(7, 8, 9))
    with pytest.raises(ValueError, match="other positions"):
        reply(scheduler, planned(scheduler), drawn)


def test_the_drafter_is_told_when_a_sequence_is_cancelled_whether_it_ran_or_waited():
    drafter = Scripted(7)
    scheduler, (one,) = scheduler_with(drafter, max_running=1)
    waiting = Sequence(5, [1], SamplingParams(), 5, frozenset())
    scheduler.submit(waiting)
    for gone in (one, waiting, one):
        scheduler.cancel(gone)
    assert drafter.forgotten == [0, 5]
