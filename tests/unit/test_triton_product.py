"""The Triton kernel in Triton's interpreter, which needs no GPU: every canonical form against float64.

The interpreter must be asked for before triton is imported, so the checks run in a process of their own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HAS_TRITON = importlib.util.find_spec("triton") is not None
pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not here (the dev extra brings it on Linux x86-64)")


def test_every_form_against_float64_in_the_interpreter() -> None:
    script = Path(__file__).parents[1] / "support" / "triton_forms.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(script.parents[1])}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(" ok") == 18
