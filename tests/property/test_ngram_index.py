"""The index of n-grams finds, however it was fed, what a search through the whole text finds."""

from hypothesis import given
from hypothesis import strategies as st

from swarmd.node.serving import ngram_index
from swarmd.node.serving.ngram_index import LONGEST, LONGEST_MATCH, SHORTEST, Match, NgramIndex, continuation

TEXTS = st.lists(st.integers(0, 3) | st.sampled_from([0, 1, 2**32 - 1]), max_size=60)


def searched(tokens):
    """The latest earlier place where the longest of the last 4, 3 or 2 tokens stand, by looking at every place."""
    for n in range(LONGEST, SHORTEST - 1, -1):
        for end in range(len(tokens) - 1, n - 1, -1):
            if n <= len(tokens) and tokens[end - n : end] == tokens[-n:]:
                longest = min(end, LONGEST_MATCH)
                length = next((m for m in range(n, longest) if tokens[end - m - 1] != tokens[-m - 1]), longest)
                return Match(end, length)
    return None


@given(TEXTS, st.lists(st.integers(1, 7), min_size=1))
def test_an_index_that_grows_finds_what_a_search_of_the_whole_finds(text, portions):
    index, length, turn = NgramIndex(), 0, 0
    while length < len(text):
        length = min(len(text), length + portions[turn % len(portions)])
        turn += 1
        assert index.find(text[:length]) == searched(text[:length])


def test_a_long_prompt_is_indexed_over_several_calls(monkeypatch):
    """No call works for longer than it may; found is nothing until the index is complete, and then all."""
    monkeypatch.setattr(ngram_index, "TOKENS_PER_CALL", 10)
    text = [*range(25), 5, 6]
    index = NgramIndex()
    assert [index.find(text) for _ in range(3)] == [None, None, Match(7, 2)]


@given(TEXTS.filter(bool), st.data(), st.integers(0, 30))
def test_a_continuation_that_runs_past_the_end_goes_on_periodically(text, data, count):
    end = data.draw(st.integers(0, len(text) - 1))
    grown = list(text)
    for _ in range(count):
        grown.append(grown[len(grown) - (len(text) - end)])
    assert continuation(text, end, count) == grown[len(text) :]
