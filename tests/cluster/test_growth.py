"""What a daemon keeps does not grow with tokens, nor with the restarts of others. All of it: `make soak`."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.growth import Growing, grow

pytestmark = [pytest.mark.slow]


@pytest.mark.timeout(300)
def test_tokens_and_restarts_of_others_leave_memory_files_and_records_as_they_were(tmp_path: Path) -> None:
    grown = grow(tmp_path / "swarm", Growing(tokens=12_000, restarts=10))
    print(grown.table())
    assert grown.faults() == []
