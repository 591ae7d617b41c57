"""Two minutes of what `make soak` does for half an hour: trouble after trouble, and not a token is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.soak import soak

pytestmark = [pytest.mark.slow]


@pytest.mark.timeout(420)
def test_under_constant_load_and_trouble_no_token_is_lost(smollm2_path: Path, tmp_path: Path, expected: Any) -> None:
    report = soak(tmp_path / "swarm", smollm2_path, expected, seconds=120, seed=5)
    print(report.table())
    assert report.faults() == []
