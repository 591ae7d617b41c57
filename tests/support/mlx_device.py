"""Which of MLX's devices the tests use: SWARMD_TEST_MLX=metal asks for a Mac's GPU."""

from __future__ import annotations

import os
from typing import Literal

MLX_DEVICE: Literal["metal", "mlx-cpu"] = "metal" if os.environ.get("SWARMD_TEST_MLX") == "metal" else "mlx-cpu"
