"""How a prompt is cut: alone, and while others wait for their next token."""

import pytest

from swarmd.node.serving.chunking import LEAST_CHUNK, PATIENCE_US, StepPace, chunk_tokens


def pace(decode_us=0.0, row_us=0.0):
    """What steps of one row of decode and of 100 rows of prefill that took so long leave behind."""
    known = StepPace()
    if decode_us:
        known.observe(1, 0, decode_us)
    if row_us:
        known.observe(0, 100, 100 * row_us)
    return known


@pytest.mark.parametrize(
    ("prompt", "n_stages", "chunk"),
    [(4000, 1, 256), (10, 1, 256), (512, 2, 64), (4000, 2, 256), (100, 2, LEAST_CHUNK), (512, 4, 32)],
)
def test_a_prompt_alone_makes_four_chunks_for_each_stage(prompt, n_stages, chunk):
    """One stage has nobody to hand on to; a short prompt is not cut to shreds."""
    assert chunk_tokens(prompt, n_stages, 256, StepPace(), decoding=False) == chunk


def test_where_a_step_itself_is_dear_chunks_are_larger():
    """The least of (512/c + 1) * (20 ms + c * 0.1 ms) is at c = 320, here cut to what a step may have."""
    costly = pace(decode_us=20_000, row_us=100)
    assert chunk_tokens(512, 2, 512, costly, decoding=False) == 320
    assert chunk_tokens(512, 2, 256, costly, decoding=False) == 256
    assert chunk_tokens(512, 2, 256, pace(decode_us=500, row_us=1000), decoding=False) == 64


def test_beside_others_a_step_takes_no_longer_than_people_notice():
    fine = pace(decode_us=5_000, row_us=500)
    assert chunk_tokens(4000, 1, 256, fine, decoding=True) == (PATIENCE_US - 5_000) / 500


def test_where_decoding_is_slow_itself_a_step_may_take_twice_as_long():
    assert chunk_tokens(4000, 1, 256, pace(decode_us=100_000, row_us=1000), decoding=True) == 100


def test_a_slow_machine_still_gets_on():
    assert chunk_tokens(4000, 1, 256, pace(decode_us=5_000, row_us=50_000), decoding=True) == LEAST_CHUNK


def test_before_anything_is_measured_chunks_beside_others_are_small():
    assert chunk_tokens(4000, 1, 256, StepPace(), decoding=True) == 32


def test_what_is_left_of_a_step_is_the_most():
    assert chunk_tokens(4000, 2, 3, StepPace(), decoding=True) == 3


def test_the_share_of_those_who_decode_in_a_mixed_step_is_not_the_prompts():
    known = pace(decode_us=10_000)
    known.observe(4, 50, 35_000)
    assert known.row_us == 500


def test_one_step_that_was_held_up_moves_the_average_little():
    known = pace(decode_us=1000)
    known.observe(1, 0, 1_000_000)
    assert known.decode_us <= 1400


def test_steps_that_only_free_or_that_nobody_timed_teach_nothing():
    known = pace(decode_us=1000, row_us=10)
    known.observe(0, 0, 700)
    known.observe(1, 0, 0)
    known.observe(0, 100, 0)
    assert (known.decode_us, known.row_us) == (1000, 10)
