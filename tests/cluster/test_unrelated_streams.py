"""Whoever talks to one model notices nothing of what befalls the nodes of another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.fault_cases import talk
from support.stream_load import compare
from support.unrelated import TOKENS, disturbances

# Generous: the machines that run this are busy, and share their cores. What a quiet one needs is in docs/benchmarks.md.
LONGEST_GAP = 3.0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_losses_of_another_model_are_not_felt(
    smollm2_path: Path, tmp_path: Path, expected: Callable[..., Any], note_gaps: Any
) -> None:
    for question in talk(TOKENS):
        expected(question)
    seen = 0
    for what, outcomes in disturbances(tmp_path, smollm2_path):
        note_gaps(f"elsewhere: {what}", outcomes)
        assert compare(outcomes, expected) == [], what
        assert max(outcome.gap for outcome in outcomes) < LONGEST_GAP, what
        seen += 1
    assert seen == 4
