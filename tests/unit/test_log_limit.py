"""Strangers cannot fill the log."""

from swarmd.transport.log_limit import LogLimit


def test_one_line_per_key_and_interval_with_a_count_of_the_rest():
    limit = LogLimit(interval=10)
    assert limit.admit("a", 0) == 0
    assert [limit.admit("a", t) for t in (1, 5, 9.9)] == [None] * 3
    assert limit.admit("b", 9.9) == 0
    assert limit.admit("a", 10) == 3
    assert limit.admit("a", 20) == 0


def test_its_memory_is_bounded_and_fresh_keys_share_a_line():
    limit = LogLimit(interval=10, capacity=3)
    assert [limit.admit(str(i), 0) for i in range(3)] == [0, 0, 0]
    assert limit.admit("3", 1) == 0
    assert [limit.admit(str(i), 2) for i in range(4, 100)] == [None] * 96
    assert len(limit._keys) == 4
    assert limit.admit("late", 10.5) == 0  # the first three are forgotten by now
    assert len(limit._keys) == 2
