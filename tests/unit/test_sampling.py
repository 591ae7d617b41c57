"""Sampling: each filter against its definition written plainly, the draw's distribution, and its repeatability."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmd.node.engine.sampling import Choice, draw, filtered, penalized, uniform
from swarmd.node.engine.sampling import choose as choose_with_summary
from swarmd.node.engine.sampling_params import SamplingParams
from swarmd.node.engine.stage_compute import Logits, summarize

GREEDY = SamplingParams(temperature=0)


def row(*logits: float) -> Logits:
    return np.array(logits, np.float32)


def random_row(seed: int, size: int) -> Logits:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def choose(logits: Logits, params: SamplingParams, history: list[int], position: int) -> Choice:
    return choose_with_summary(logits, summarize(logits), params, lambda: history, position)


def reference(logits: list[float], params: SamplingParams) -> list[float]:
    """Temperature, top-k, top-p, min-p by their definitions, on Python floats."""
    peak = max(logits)
    weights = [math.exp((logit - peak) / params.temperature) for logit in logits]
    order = sorted(range(len(logits)), key=lambda i: (-weights[i], i))
    if params.top_k:
        order = order[: params.top_k]
    total = sum(weights[i] for i in order)
    if params.top_p < 1:
        kept, reached = [], 0.0
        for i in order:
            if kept and reached >= params.top_p:
                break
            kept.append(i)
            reached += weights[i] / total
        order = kept
    order = [i for i in order if weights[i] >= params.min_p * weights[order[0]]]
    total = sum(weights[i] for i in order)
    return [weights[i] / total if i in order else 0.0 for i in range(len(logits))]


# Multiples of 1/8 and odd thresholds: no probability stands so near a filter's edge that rounding decides.
logit_lists = st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=1, max_size=30)


@settings(max_examples=200, deadline=None)
@given(
    logits=logit_lists,
    temperature=st.sampled_from((0.31, 0.7, 1.0, 1.9)),
    top_k=st.integers(0, 8),
    top_p=st.sampled_from((1.0, 0.913, 0.517, 0.0101)),
    min_p=st.sampled_from((0.0, 0.0517, 0.313, 0.991)),
)
def test_filters_against_their_definitions(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    got = filtered(row(*logits), params)
    assert got == pytest.approx(reference(logits, params), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("spread", [0.0, 0.2, 6.0])
@pytest.mark.parametrize("params", [SamplingParams(top_p=0.917), SamplingParams(top_k=50, top_p=0.913)])
def test_filters_of_a_large_vocabulary(spread: float, params: SamplingParams) -> None:
    # Nuclei of nearly all tokens (flat) and of few (peaked), with many ties.
    logits = (random_row(6, 3000) * np.float32(spread * 8)).round() / np.float32(8)
    expected = reference(logits.tolist(), params)
    assert filtered(logits, params) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_penalties_by_hand() -> None:
    logits = row(2.0, -2.0, 1.0, 0.5, 3.0)
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5, prompt_tokens=2)
    # Prompt: 0 and 1. Generated: 1 once, 2 twice.
    assert penalized(logits, params, lambda: [0, 1, 1, 2, 2]).tolist() == [1.0, -4.0 - 0.75, 0.5 - 1.25, 0.5, 3.0]
    assert logits.tolist() == [2.0, -2.0, 1.0, 0.5, 3.0], "the model's logits are left alone"


def test_presence_and_frequency_leave_the_prompt_alone() -> None:
    logits = row(1.0, 2.0)
    params = SamplingParams(presence_penalty=1, frequency_penalty=1, prompt_tokens=3)
    assert penalized(logits, params, lambda: [0, 1, 1]).tolist() == logits.tolist()


def test_greedy_takes_the_lowest_of_equals_and_obeys_bias_and_penalties() -> None:
    logits = row(1.0, 5.0, 5.0, 4.5)
    assert choose(logits, GREEDY, [], 0).token == 1
    biased = SamplingParams(temperature=0, logit_bias={3: 1.0})
    assert choose(logits, biased, [], 0).token == 3
    banned = SamplingParams(temperature=0, logit_bias={1: -100.0})
    assert choose(logits, banned, [], 0).token == 2
    repetitive = SamplingParams(temperature=0, repetition_penalty=1.2)
    assert choose(logits, repetitive, [1, 2], 2).token == 3


def test_logprobs_are_the_models_own() -> None:
    logits = row(0.0, math.log(2), math.log(5))
    params = SamplingParams(temperature=0, logit_bias={0: 50.0}, top_logprobs=2)
    choice = choose(logits, params, [], 0)
    assert choice.token == 0
    assert choice.logprob == pytest.approx(math.log(1 / 8))
    assert [token for token, _ in choice.top] == [2, 1]
    assert [value for _, value in choice.top] == pytest.approx([math.log(5 / 8), math.log(2 / 8)])


def test_top_logprobs_of_a_small_vocabulary() -> None:
    assert len(choose(row(1.0, 2.0), SamplingParams(top_logprobs=20), [], 0).top) == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        choose(row(0.0, bad), GREEDY, [], 0)


def test_a_tiny_temperature_is_greedy_and_finite() -> None:
    params = SamplingParams(temperature=1e-6)
    assert choose(row(1.0, 30.0, 29.99), params, [], 7).token == 1


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, seed=11),
        SamplingParams(temperature=0.7, seed=12, top_p=0.9),
        SamplingParams(temperature=1.3, seed=13, top_k=7, min_p=0.02),
    ],
)
def test_the_draws_follow_the_distribution(params: SamplingParams) -> None:
    """Chi-square over 4000 positions; the bound is the 99.99 % point, and the seeds are fixed."""
    logits = random_row(5, 12) * np.float32(1.5)
    n = 4000
    expected = np.array(reference(logits.tolist(), params)) * n
    counts = np.bincount([choose(logits, params, [], position).token for position in range(n)], minlength=12)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    degrees = possible.sum() - 1
    # Wilson and Hilferty's approximation of the chi-square quantile, z = 3.719 for 99.99 %.
    bound = degrees * (1 - 2 / (9 * degrees) + 3.719 * math.sqrt(2 / (9 * degrees))) ** 3
    assert statistic < bound


def test_the_same_seed_and_position_give_the_same_token_and_others_differ() -> None:
    logits = np.zeros(1000, np.float32)

    def tokens(seed: int) -> list[int]:
        return [choose(logits, SamplingParams(seed=seed), [], position).token for position in range(50)]

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)
    assert len(set(tokens(1))) > 40


@given(seed=st.integers(-(1 << 63), 1 << 64), position=st.integers(0, 1 << 40))
def test_uniform_numbers_are_in_range_for_any_seed(seed: int, position: int) -> None:
    assert 0 <= uniform(seed, position) < 1


def test_uniform_numbers_never_change() -> None:
    """They are part of what a seed promises: another version must give the same tokens."""
    # BLAKE2b, 8 bytes of digest, key-less, person "swarmd-sample", over two little-endian u64; upper 53 bits.
    assert [uniform(0, 0), uniform(42, 7)] == [0.5365151800493487, 0.1260647121924633]


def test_draw_at_the_edges() -> None:
    probabilities = np.array([0.0, 0.25, 0.0, 0.75, 0.0])
    assert draw(probabilities, 0.0) == 1
    assert draw(probabilities, 0.2499999) == 1
    assert draw(probabilities, 0.25) == 3
    assert draw(probabilities, 1 - 2**-53) == 3


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(temperature=0.7, top_k=2), SamplingParams(top_p=0.5)])
def test_only_allowed_tokens_are_chosen_with_the_models_own_log_probability(params: SamplingParams) -> None:
    logits = random_row(3, 40)
    allowed = np.zeros(32, np.bool_)  # fewer ids than logits: models pad their vocabularies
    likeliest, other = np.argsort(-logits[:32])[[20, 30]]
    allowed[[likeliest, other]] = True
    for position in range(50):
        choice = choose_with_summary(logits, summarize(logits), params, list, position, allowed)
        assert choice.token in (likeliest, other)
        assert choice.logprob == pytest.approx(float(logits[choice.token]) - math.log(np.exp(logits).sum()), abs=1e-5)
        assert params is not GREEDY or choice.token == likeliest
