"""The scheduler in virtual time: how long who waits, how busy the stages are, and what is computed only once."""

import itertools
import random
from dataclasses import replace

import pytest
from support.clocked_pipeline import ClockedPipeline, Stream, stream
from support.fake_drafter import SeerDrafter
from support.fake_pipeline import VOCABULARY

from swarmd.node.serving.chunking import LEAST_CHUNK, PATIENCE_US
from swarmd.node.serving.steps import Limits

NO_STOP: frozenset[int] = frozenset()


def roomy(n_stages: int, **changes) -> Limits:
    values = {"kv_tokens": 16_000, "context": 4000, "max_running": 16, "max_waiting": 500}
    return Limits(n_stages, **(values | changes))


def gaps(values):
    return [later - earlier for earlier, later in itertools.pairwise(values)]


def prompt_of(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCABULARY) for _ in range(length)]


@pytest.mark.parametrize("n_stages", [1, 2, 3, 4])
def test_a_long_prompt_does_not_stall_who_is_talking(n_stages):
    """Nobody waits for more than one chunk of the prompt per round, and a chunk is short beside what people notice."""
    limits = roomy(n_stages)
    clocked = ClockedPipeline(limits, base=0.004, per_token=0.0005)
    streams = [stream(seq, [seq, 1], 400, NO_STOP, limits) for seq in range(6)]
    for one in streams:
        clocked.submit(one)
    clocked.run(until=0.5)
    long = stream(6, prompt_of(0, 1500), 5, NO_STOP, limits)
    streams.append(long)
    came = clocked.now
    clocked.submit(long)
    clocked.run()
    for one in streams:
        one.check()
        assert one.finish == "length"
    while_read = clocked.token_times[6][0] - came
    assert while_read > 20 * PATIENCE_US / 1e6, "the prompt was long indeed"
    worst = max(max(gaps(clocked.token_times[seq])) for seq in range(6))
    assert worst <= 1.3 * n_stages * PATIENCE_US / 1e6


def test_where_chunks_cannot_be_short_they_are_as_small_as_they_get():
    limits = roomy(2)
    clocked = ClockedPipeline(limits, base=0.004, per_token=0.05)
    talking, long = stream(0, [1, 2], 300, NO_STOP, limits), stream(1, prompt_of(0, 300), 5, NO_STOP, limits)
    clocked.submit(talking)
    clocked.run(until=5.0)
    clocked.submit(long)
    clocked.run()
    chunks = {len(chunk.tokens) for step in clocked.planned for chunk in step.chunks if chunk.start < 270}
    assert chunks <= {1, 2, LEAST_CHUNK, 32}, "the first ones come before anything was measured"
    assert (talking.finish, long.finish) == ("length", "length")


def random_traffic(clocked: ClockedPipeline, rng: random.Random, requests: int, prompts: tuple[int, ...]):
    """Requests of all lengths, many with the same beginning, together or far apart; every fifth is cancelled."""
    streams: list[Stream] = []
    shared = prompt_of(99, max(prompts))
    for index in range(requests):
        prompt = prompt_of(rng.randrange(1 << 30), rng.choice(prompts))
        if rng.random() < 0.4:
            prompt[:-1] = shared[: len(prompt) - 1]
        stop = frozenset(range(rng.choice((0, 0, 2))))
        streams.append(stream(index, prompt, rng.randint(1, 40), stop, clocked.limits))
        clocked.submit(streams[-1])
        clocked.run(until=clocked.now + rng.choice((0.0, 1.0, 20.0)))
        if rng.random() < 0.2:
            dropped = rng.choice(streams)
            clocked.scheduler.cancel(dropped.sequence)
            dropped.dropped |= dropped.finish is None
    clocked.run()
    for one in streams:
        one.check()
        assert one.dropped or one.finish
    return streams


@pytest.mark.parametrize("seed", range(12))
def test_running_streams_get_a_token_every_few_steps_whatever_else_comes_and_goes(seed):
    """Without a shortage of KV, a stream gets its next token within two rounds of the pipeline: it waits less than one
    for its turn, and its step takes another."""
    rng = random.Random(seed)
    limits = roomy(rng.randint(1, 4), max_running=12)
    clocked = ClockedPipeline(limits, per_token=0.05)
    random_traffic(clocked, rng, 60, (1, 2, 5, 40, 200))
    worst = max(gap for steps in clocked.token_steps.values() for gap in gaps(steps))
    assert worst <= 2 * limits.n_stages, "without links there are as many steps in flight as stages"


@pytest.mark.parametrize("seed", range(16))
def test_random_traffic_with_too_little_kv_room_gets_every_answer_right(seed):
    rng = random.Random(seed)
    limits = Limits(
        n_stages=rng.randint(1, 4),
        kv_tokens=rng.randint(60, 160),
        context=50,
        step_tokens=24,
        growth=rng.choice((1, 4, 16)),
        max_running=12,
        max_waiting=500,
        kv_block=rng.choice((1, 16)),
    )
    drafter = SeerDrafter(limits.n_stages, rng, 0.7) if seed % 2 else None
    clocked = ClockedPipeline(limits, per_token=0.05, link=rng.choice((0.0, 2.0)), drafter=drafter)
    streams = random_traffic(clocked, rng, 80, (1, 2, 5, 40))
    begun = max(one.sequence.pipeline_id for one in streams) + 1
    assert len(streams) * 0.8 < begun < len(streams) * 3, "what was put back is not put back over and over"


@pytest.mark.parametrize("seed", range(6))
def test_what_is_retained_never_delays_anybody(seed):
    """The same traffic, of prompts that nobody shares, is served at the very same times without anything retained."""

    def times(max_retained: int) -> tuple[dict[int, list[float]], int]:
        rng = random.Random(seed)
        limits = Limits(
            n_stages=2, kv_tokens=200, context=120, max_running=8, max_waiting=500, max_retained=max_retained
        )
        clocked = ClockedPipeline(limits, base=0.01, per_token=0.001)
        for index in range(60):
            one = stream(index, [VOCABULARY + index, *prompt_of(index, rng.randint(1, 90))], 20, NO_STOP, limits)
            clocked.submit(one)
            clocked.run(until=clocked.now + rng.choice((0.0, 0.05, 0.5)))
        clocked.run()
        return clocked.token_times, clocked.scheduler.kv_tokens_retained

    with_cache, retained = times(64)
    without, nothing = times(0)
    assert (retained > 0, nothing) == (True, 0)
    assert with_cache == without


@pytest.mark.parametrize("n_stages", [2, 3, 4])
def test_every_stage_works_at_the_same_time(n_stages):
    """Decoding many streams, and prefilling one long prompt, keep all stages busy nearly all the time."""
    limits = roomy(n_stages)
    many = [stream(seq, [seq, 1], 80, NO_STOP, limits) for seq in range(2 * n_stages)]
    one_long = [stream(0, prompt_of(0, 1600), 1, NO_STOP, limits)]
    for streams in (many, one_long):
        clocked = ClockedPipeline(limits)
        for one in streams:
            clocked.submit(one)
        clocked.run()
        assert all(one.finish for one in streams)
        assert min(clocked.busy) > 0.8 * clocked.now


@pytest.mark.parametrize("link", [0.0, 0.5, 1.0])
def test_slow_links_are_filled_with_more_steps(link):
    """Also while activations are on their way, every stage has something to do."""
    limits = roomy(2)
    clocked = ClockedPipeline(limits, base=1.0, link=link)
    streams = [stream(seq, [seq, 1], 200, NO_STOP, limits) for seq in range(12)]
    for one in streams:
        clocked.submit(one)
    clocked.run()
    assert clocked.scheduler.depth == 2 + 2 * link
    assert min(clocked.busy) > 0.85 * clocked.now
    assert all(one.finish == "length" for one in streams)


def test_a_prompt_alone_is_cut_so_that_the_second_stage_need_not_wait_for_all_of_it():
    limits = roomy(2)
    whole, first = 512, stream(0, prompt_of(0, 512), 1, NO_STOP, limits)
    clocked = ClockedPipeline(limits, base=0.004, per_token=0.001)
    clocked.submit(first)
    clocked.run()
    one_after_the_other = 2 * clocked.step_seconds(whole)
    assert clocked.token_times[0][0] < 0.6 * one_after_the_other


def test_who_waits_is_let_in_in_order_and_nobody_waits_for_ever_while_others_keep_coming():
    """A large request is not overtaken for ever by small ones that would fit."""
    limits = Limits(n_stages=2, kv_tokens=112, context=90, step_tokens=16, max_running=8, max_waiting=1000)
    clocked = ClockedPipeline(limits)
    streams: list[Stream] = []
    for index in range(300):
        length = 80 if index == 20 else 3
        streams.append(stream(index, [index % VOCABULARY] * length, 5, NO_STOP, limits))
        clocked.submit(streams[-1])
        clocked.run(until=clocked.now + 0.5)
    clocked.run()
    firsts = [clocked.token_times[one.sequence.seq][0] for one in streams]
    assert firsts == sorted(firsts), "first come, first served"


def test_when_kv_is_short_the_oldest_goes_on_and_the_work_is_done_all_the_same():
    limits = Limits(n_stages=3, kv_tokens=60, context=60, step_tokens=16, growth=2, max_running=8, kv_block=1)
    clocked = ClockedPipeline(limits)
    streams = [stream(seq, [seq] * 4, 40, NO_STOP, limits) for seq in range(8)]
    for one in streams:
        clocked.submit(one)
    clocked.run()
    for one in streams:
        one.check()
    ends = [clocked.token_times[one.sequence.seq][-1] for one in streams]
    assert ends == sorted(ends), "who came first is never put back for who came later"
    begun = max(one.sequence.pipeline_id for one in streams) + 1
    assert begun > 8, "some were put back"
    assert begun < 8 * 12, "and not over and over"
    assert max(stage.most_cached for stage in clocked.pipeline.stages) > 50, "the room there is was used"


@pytest.mark.parametrize("n_stages", [1, 2, 3])
def test_a_system_prompt_that_eight_share_is_computed_once_though_they_come_together(n_stages):
    limits = roomy(n_stages)
    system = prompt_of(1, 600)
    streams = [stream(seq, [*system, *prompt_of(seq + 10, 20)], 10, NO_STOP, limits) for seq in range(8)]
    clocked = ClockedPipeline(limits, base=0.004, per_token=0.001)
    for one in streams:
        clocked.submit(one)
    clocked.run()
    for one in streams:
        one.check()
    assert clocked.rows_computed == 600 + 8 * (20 + 9)
    assert clocked.scheduler.prefix_tokens_reused == 7 * 600


def test_every_turn_of_a_conversation_computes_only_what_is_new():
    limits = roomy(2)
    clocked = ClockedPipeline(limits)
    said = prompt_of(3, 100)
    for turn in range(5):
        before, reused = clocked.rows_computed, clocked.scheduler.prefix_tokens_reused
        one = stream(turn, said, 30, NO_STOP, limits)
        clocked.submit(one)
        clocked.run()
        one.check()
        if turn:
            assert clocked.scheduler.prefix_tokens_reused - reused == len(said) - 40 - 1
            assert clocked.rows_computed - before == 41 + 29, "the last token drawn, 40 new ones, and what is drawn now"
        said = [*said, *one.got, *prompt_of(turn, 40)]
    assert clocked.scheduler.kv_tokens_retained <= 100 + 5 * 70 + 16, "earlier turns are not kept beside the last"


@pytest.mark.parametrize("right", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("n_stages", [1, 2, 3])
def test_drafts_change_no_output_and_right_ones_save_steps(n_stages, right):
    limits = roomy(n_stages)
    drafter = SeerDrafter(n_stages, random.Random(5), right)
    outcomes: list[list[int]] = []
    steps: list[int] = []
    for guess in (None, drafter):
        clocked = ClockedPipeline(limits, drafter=guess)
        streams = [stream(seq, prompt_of(seq, 30), 60, NO_STOP, limits) for seq in range(4)]
        for one in streams:
            clocked.submit(one)
        clocked.run()
        outcomes.append([token for one in streams for token in one.got])
        steps.append(len(clocked.planned))
    assert outcomes[0] == outcomes[1]
    assert (drafter.proposed > 0, drafter.accepted > 0) == (True, right > 0)
    assert not drafter.known
    assert steps[1] < 0.6 * steps[0] if right == 1.0 else steps[1] <= steps[0]


@pytest.mark.parametrize("n_stages", [1, 2, 3, 4])
def test_micro_batches_stay_even_when_streams_come_and_go(n_stages):
    """A round after anything has changed, no step decodes two sequences more than another."""
    limits = replace(roomy(n_stages), max_running=40)
    clocked = ClockedPipeline(limits)
    rng = random.Random(7)
    for seq in range(40):
        clocked.submit(stream(seq, [seq, 1], rng.randint(5, 60), NO_STOP, limits))
        clocked.run(until=clocked.now + rng.choice((0.0, 0.0, 3.0)))
    clocked.run()
    sizes = [[chunk.seq for chunk in step.chunks] for step in clocked.planned]
    opened = [bool(step.open) for step in clocked.planned]
    checked = 0
    for at in range(2 * n_stages, len(sizes) - 2 * n_stages):
        before = {seq for size in sizes[at - 2 * n_stages : at] for seq in size}
        now = {seq for size in sizes[at : at + 2 * n_stages] for seq in size}
        if before == now and not any(opened[at - 2 * n_stages : at + 2 * n_stages]):
            lengths = [len(size) for size in sizes[at : at + n_stages]]
            assert max(lengths) - min(lengths) <= 1
            checked += 1
    assert checked > 20
