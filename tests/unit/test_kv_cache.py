"""The KV cache keeps its promise: lengths that sum to at most the capacity always fit, and nothing is lost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmd.node.engine.backends.torch_cpu import TorchCpuBackend
from swarmd.node.engine.kv_cache import GROWTH_TOKENS, KvCache, KvExhausted, StepError
from swarmd.node.engine.spec import CacheShape

CAPACITY = 200


def new_cache(capacity: int = CAPACITY) -> KvCache:
    return KvCache(TorchCpuBackend(), 2, CacheShape(1, 2, 2), capacity)


def append(cache: KvCache, lengths: dict[int, int]) -> None:
    """Grow to these lengths, and write each new position's number and sequence into the keys."""
    cache.reserve(lengths)
    for seq, length in lengths.items():
        for layer in cache.layers(seq):
            for position in range(cache.length(seq), length):
                layer.keys[:, position] = torch.tensor([float(seq), float(position)])
                layer.values[:, position] = layer.keys[:, position]
        cache.commit(seq, length)


def assert_intact(cache: KvCache, seq: int) -> None:
    for layer in cache.layers(seq):
        for values in (layer.keys, layer.values):
            expected = [[float(seq), float(position)] for position in range(cache.length(seq))]
            assert values[0, : cache.length(seq)].tolist() == expected


def test_memory_is_taken_in_chunks_and_only_when_needed() -> None:
    cache = new_cache()
    cache.open(1)
    assert cache.allocated == 0
    append(cache, {1: 1})
    assert cache.allocated == GROWTH_TOKENS
    append(cache, {1: GROWTH_TOKENS})
    assert cache.allocated == GROWTH_TOKENS
    append(cache, {1: GROWTH_TOKENS + 1})
    assert cache.allocated == 2 * GROWTH_TOKENS
    assert_intact(cache, 1)
    cache.free(1)
    assert cache.allocated == 0


def test_the_last_token_fits_and_the_one_after_does_not() -> None:
    cache = new_cache()
    for seq in range(4):
        cache.open(seq)
        append(cache, {seq: 49})
    append(cache, dict.fromkeys(range(4), 50))
    with pytest.raises(KvExhausted, match="201 tokens"):
        cache.reserve({2: 51})
    assert [cache.length(seq) for seq in range(4)] == [50] * 4
    for seq in range(4):
        assert_intact(cache, seq)
    cache.truncate(0, 49)
    append(cache, {2: 51})
    assert_intact(cache, 2)


def test_misuse_is_refused() -> None:
    cache = new_cache()
    cache.open(1)
    with pytest.raises(StepError, match="open already"):
        cache.open(1)
    with pytest.raises(StepError, match="not open"):
        cache.length(2)
    with pytest.raises(StepError, match="cannot be cut"):
        cache.truncate(1, 1)
    cache.free(1)
    cache.free(1)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("gggggtf"), st.integers(0, 3), st.integers(0, 70)), max_size=25))
def test_any_history_of_calls(calls: list[tuple[str, int, int]]) -> None:
    cache = new_cache()
    lengths: dict[int, int] = {}
    for what, seq, amount in calls:
        if seq not in lengths:
            cache.open(seq)
            lengths[seq] = 0
        if what == "g":
            wish = {seq: lengths[seq] + amount}
            if sum({**lengths, **wish}.values()) > CAPACITY:
                with pytest.raises(KvExhausted):
                    cache.reserve(wish)
            else:
                append(cache, wish)
                lengths |= wish
        elif what == "t":
            lengths[seq] = min(lengths[seq], amount)
            cache.truncate(seq, lengths[seq])
        else:
            cache.free(seq)
            del lengths[seq]
        assert cache.allocated <= CAPACITY
        for other, length in lengths.items():
            assert cache.length(other) == length
            assert_intact(cache, other)
