"""Whatever becomes of the guesses, a sequence never takes much longer than without any."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmd.node.serving.draft_policy import BURST, LENGTHS, REFILL, DraftPolicy, speedup


@given(
    row_cost=st.floats(0.005, 1.5),
    outcomes=st.lists(st.tuples(st.integers(0, 2), st.floats(0, 1)), min_size=1, max_size=150),
    limit=st.integers(0, 20),
)
def test_no_adversary_makes_a_sequence_slower_than_its_budget(row_cost, outcomes, limit):
    """`outcomes`: the kind of each guess, and the part of it that turns out right; chosen as badly as it gets."""
    policy = DraftPolicy((0.3, 0.6, 0.9), row_cost)
    tokens, time = 0, 0.0
    for kind, part in outcomes:
        proposed = policy.length(1, 10 + tokens, kind, limit)
        assert 0 <= proposed <= min(limit, LENGTHS[-1])
        accepted = int(part * proposed)
        policy.observe(1, proposed, accepted)
        tokens += 1 + accepted
        time += 1 + proposed * row_cost
        assert time <= tokens * (1 + REFILL) + BURST + 1e-6


@given(probability=st.floats(0, 0.99), count=st.integers(1, 12), row_cost=st.floats(0.01, 1))
def test_the_gain_is_that_of_the_paper(probability, count, row_cost):
    """Leviathan et al. 2022, theorem 3.8, with the drafts for free and their rows at `row_cost`."""
    expected = (1 - probability ** (count + 1)) / (1 - probability)
    assert speedup(probability, count, row_cost) == pytest.approx(expected / (1 + count * row_cost))
