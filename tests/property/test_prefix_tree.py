"""The radix tree of prefixes against plain lists."""

from hypothesis import given, settings
from hypothesis import strategies as st

from swarmd.node.serving.prefix_tree import PrefixTree

# Few tokens, so that sequences branch and end at all depths.
TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=12)
ACTIONS = st.lists(st.tuples(st.integers(0, 5), st.one_of(st.none(), TOKENS)), max_size=25)


def shared(one, other):
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    return count


def distinct_prefixes(sequences):
    return len({tuple(tokens[:length]) for tokens in sequences for length in range(1, len(tokens) + 1)})


@settings(max_examples=200, deadline=None)
@given(ACTIONS, TOKENS, st.dictionaries(st.integers(0, 5), st.integers(0, 12)))
def test_it_finds_what_a_look_at_every_sequence_finds(actions, wanted, limits):
    """`None` removes a holder, tokens are what it holds from then on. A shared prefix is stored once, whatever was
    there in between."""
    tree, held = PrefixTree(), {}
    for holder, tokens in actions:
        if tokens is None:
            tree.remove(holder)
            held.pop(holder, None)
        else:
            tree.insert(holder, tokens)
            held[holder] = tokens
        assert len(tree) == len(held)
        assert tree.tokens_stored == distinct_prefixes(held.values())

    def available(holder):
        return min(limits.get(holder, 99), len(held[holder]))

    common = max((shared(tokens, wanted) for tokens in held.values()), default=0)
    found = tree.match(wanted, available)
    if common == 0:
        assert found is None
    else:
        lengths = {holder: min(shared(tokens, wanted), available(holder)) for holder, tokens in held.items()}
        assert found is not None
        assert (found.length, found.common) == (max(lengths.values()), common)
        assert lengths[found.holder] == found.length


@settings(max_examples=100, deadline=None)
@given(st.lists(TOKENS, min_size=1, max_size=8), TOKENS)
def test_what_came_and_went_leaves_no_trace(others, stays):
    """Nodes that were split for others are joined again, so that the tree does not grow with all it has ever held."""
    tree, alone = PrefixTree(), PrefixTree()
    tree.insert(99, stays)
    alone.insert(99, stays)
    for holder, tokens in enumerate(others):
        tree.insert(holder, tokens)
    for holder in range(len(others)):
        tree.remove(holder)
    assert tree.nodes == alone.nodes == 1
