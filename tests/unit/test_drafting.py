"""Guessing by looking up the text so far: what it gains on texts that repeat, and what it loses on others."""

import random
from collections.abc import Sequence
from itertools import pairwise

import pytest
from support.step_costs import cost_of

from swarmd.node.serving.draft_policy import PROBE_TOKENS, DraftPolicy
from swarmd.node.serving.drafting import Ask, NgramDrafter, PreparedDrafts
from swarmd.node.serving.step_cost import StepCost


class Run:
    """A text as a sequence generates it, with a drafter that is told what came of every guess."""

    def __init__(self, drafter: NgramDrafter, prompt: Sequence[int], text: Sequence[int], row_cost: float) -> None:
        drafter.price(cost_of(row_cost))
        tokens, self.guesses = list(prompt), []
        steps_time, begin = 0.0, len(tokens)
        while (position := len(tokens) - begin) < len(text):
            guessed = drafter.propose(1, tokens, min(16, len(text) - position - 1))
            right = 0
            while right < len(guessed) and guessed[right] == text[position + right]:
                right += 1
            if guessed:
                drafter.observe(1, len(guessed), right)
            tokens += text[position : position + right + 1]
            self.guesses.append(len(guessed))
            steps_time += 1 + len(guessed) * row_cost
        drafter.forget(1)
        self.speedup = len(text) / steps_time


def noise(count: int, vocabulary: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(vocabulary) for _ in range(count)]


def edited(text: list[int], every: int) -> list[int]:
    """The text with every so-manieth token replaced."""
    return [9999 if index % every == 0 else token for index, token in enumerate(text, 1)]


DOCUMENT = noise(300, 1000, seed=1)


@pytest.mark.parametrize(("row_cost", "least"), [(0.05, 4.0), (0.15, 2.8), (0.4, 1.5)])
def test_a_document_that_is_copied_with_few_changes_goes_much_faster(row_cost, least):
    assert Run(NgramDrafter(), DOCUMENT, edited(DOCUMENT, every=40), row_cost).speedup > least


def test_a_text_that_repeats_itself_needs_no_prompt():
    assert Run(NgramDrafter(), [1], [5, 6, 7, 8, 9] * 40, 0.15).speedup > 3


@pytest.mark.parametrize("row_cost", [0.02, 0.15, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("length", [32, 128, 512])
def test_a_hostile_text_loses_less_than_a_twentieth(row_cost, length):
    """Few different tokens at random: nearly every n-gram stood somewhere before, and went on otherwise."""
    drafter = NgramDrafter()
    guessed = 0
    for seed in range(3):
        run = Run(drafter, noise(400, 6, seed), noise(length, 6, seed + 100), row_cost)
        assert run.speedup > 0.95
        guessed += sum(run.guesses)
    assert row_cost >= 0.6 or guessed > 0, "a text that nothing is guessed for would prove nothing"


def test_a_text_that_turns_hostile_and_back_is_followed():
    """The middle has the n-grams of what stood before, and other continuations; the ends copy the document."""
    copied = edited(DOCUMENT, every=40)
    mixed = copied[:150] + noise(150, 6, seed=2) + copied[150:]
    run = Run(NgramDrafter(), noise(400, 6, seed=3) + DOCUMENT, mixed, 0.15)
    assert run.speedup > 1.5
    pure = Run(NgramDrafter(), DOCUMENT, copied, 0.15)
    assert run.speedup > 450 / (300 / pure.speedup + 150 / 0.9), "each part is as fast as alone, or nearly"


def test_guesses_grow_while_they_are_right():
    run = Run(NgramDrafter(), DOCUMENT, DOCUMENT, 0.15)
    steps = [guessed for guessed in run.guesses if guessed]
    assert steps[0] <= 4
    assert max(steps) == 12
    assert steps.index(12) <= 6


def test_slower_links_make_longer_guesses_worth_it():
    """The same doubtful text: a row costs next to nothing where a step waits for the network."""
    fast, slow = (
        Run(NgramDrafter(), DOCUMENT, edited(DOCUMENT, every=6), row_cost).guesses for row_cost in (0.5, 0.02)
    )
    assert sum(slow) > 2 * sum(fast)


def test_where_guesses_fail_one_is_tried_now_and_then():
    policy = DraftPolicy((0.5,))
    tried = []
    for tokens in range(400):
        count = policy.length(1, tokens, 0, 16)
        if count:
            policy.observe(1, count, 0)
            tried.append((tokens, count))
    late = [(tokens, count) for tokens, count in tried if tokens > 50]
    assert {count for _, count in late} == {1}
    assert {after - before for (before, _), (after, _) in pairwise(late)} == {PROBE_TOKENS}


def test_what_one_sequence_taught_the_next_one_knows():
    drafter = NgramDrafter()
    first = Run(drafter, noise(400, 6, seed=1), noise(200, 6, seed=2), 0.15)
    second = Run(drafter, noise(400, 6, seed=3), noise(200, 6, seed=4), 0.15)
    assert sum(second.guesses[:30]) < sum(first.guesses[:30])


def test_nothing_is_guessed_without_room_or_without_a_repetition():
    drafter = NgramDrafter()
    assert drafter.propose(1, [1, 2, 3, 1, 2], 0) == []
    assert drafter.propose(1, [1, 2, 3, 4, 5], 8) == []
    assert len(drafter.propose(2, [1, 2, 3, 1, 2], 1)) == 1


def test_an_ended_sequence_leaves_nothing_behind():
    drafter, policy = NgramDrafter(), DraftPolicy((0.5,))
    for seq in range(5):
        drafter.propose(seq, [1, 2, 1, 2], 4)
        policy.length(seq, 4, 0, 4)
    assert (len(drafter), len(policy)) == (5, 5)
    for seq in range(5):
        drafter.forget(seq)
        policy.forget(seq)
    drafter.forget(77)
    drafter.observe(77, 3, 1)
    assert (len(drafter), len(policy)) == (0, 0)


class Scripted:
    """A drafter that guesses what it is told to, and notes what it hears."""

    def __init__(self, guesses: dict[int, list[int]]) -> None:
        self.guesses = guesses
        self.heard: list[tuple[str, int]] = []

    def propose(self, seq: int, tokens: Sequence[int], limit: int) -> list[int]:
        return self.guesses.get(seq, [])[:limit]

    def observe(self, seq: int, proposed: int, accepted: int) -> None:
        self.heard.append((f"{accepted} of {proposed}", seq))

    def forget(self, seq: int) -> None:
        self.heard.append(("forget", seq))

    def price(self, cost: StepCost) -> None:
        self.heard.append((f"price {cost.row_cost:.2f}", -1))


@pytest.fixture
def quick() -> Scripted:
    return Scripted({1: [11, 12]})


@pytest.fixture
def slow() -> Scripted:
    return Scripted({1: [91], 2: [92, 93, 94]})


def prepared(quick: Scripted, slow: Scripted, asks: list[Ask]) -> PreparedDrafts:
    drafts = PreparedDrafts(quick, slow)
    left = drafts.prepare(asks)
    drafts.keep(left, drafts.guess(left))
    return drafts


def test_the_slow_drafter_is_asked_only_where_the_quick_one_has_no_guess(quick, slow):
    asks = [Ask(1, [1], 8), Ask(2, [1, 2], 8), Ask(3, [1], 0)]
    drafts = PreparedDrafts(quick, slow)
    assert drafts.prepare(asks) == [asks[1]]
    drafts.keep([asks[1]], drafts.guess([asks[1]]))
    assert drafts.propose(1, [1], 8) == [11, 12]
    assert drafts.propose(2, [1, 2], 2) == [92, 93]


def test_a_guess_is_for_the_tokens_that_it_was_made_for_and_only_once(quick, slow):
    drafts = prepared(quick, slow, [Ask(1, [1], 8), Ask(2, [1], 8)])
    assert drafts.propose(2, [1, 2], 8) == []
    assert drafts.propose(1, [1], 8) == [11, 12]
    assert drafts.propose(1, [1], 8) == []


def test_the_slow_drafter_hears_of_its_own_guesses_when_it_is_its_turn(quick, slow):
    drafts = prepared(quick, slow, [Ask(1, [1], 8), Ask(2, [1], 8)])
    drafts.observe(1, 2, 1)
    drafts.observe(2, 3, 3)
    drafts.forget(2)
    drafts.forget(1)
    assert quick.heard == [("1 of 2", 1), ("forget", 2), ("forget", 1)]
    assert slow.heard == [], "it may be at work on another thread"
    drafts.guess([])
    assert slow.heard == [("3 of 3", 2), ("forget", 2)]


def test_both_hear_what_a_row_costs(quick, slow):
    PreparedDrafts(quick, slow).price(cost_of(0.25))
    assert quick.heard == slow.heard == [("price 0.25", -1)]


def test_what_comes_for_a_sequence_that_ended_meanwhile_is_dropped(quick, slow):
    drafts = PreparedDrafts(quick, slow)
    left = drafts.prepare([Ask(2, [1], 8)])
    guesses = drafts.guess(left)
    drafts.forget(2)
    drafts.keep(left, guesses)
    assert drafts.propose(2, [1], 8) == []
