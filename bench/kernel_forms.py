"""Time one product of 4096 x 4096 weights in every kind of form, on one thread, with 1 row of activations and with 64.

python bench/kernel_forms.py [FORM ...] [--isa NAME] [--turns N]

All forms in turns, so that whatever else the machine does weighs on all alike; the best turn of each counts.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from figures import markdown_table
from support.native_kernels import FORMS, Form, weight_of

from swarmd.node.engine.cpu.bindings import isa, load, select
from swarmd.node.engine.cpu.matrices import NativeMatrix, aligned

SIZE = 4096
ROWS = (1, 64)
BASE = "Q4_0"
MEASURED = {
    BASE: FORMS[BASE],
    "Q4_1": Form(4, bias="f16"),
    "Q8_0": Form(8),
    "Q4_K": FORMS["Q4_K"],
    "Q6_K": FORMS["Q6_K"],
    "MLX, 4 bits, groups of 64": FORMS["MLX 4 bits"],
    "MXFP4": FORMS["MXFP4"],
}


class Products:
    """A matrix and all that its products need."""

    def __init__(self, form: Form, pool: int) -> None:
        rng = np.random.default_rng(0)
        self._matrix, self._pool = NativeMatrix([weight_of(rng, form, SIZE, SIZE)]), pool
        self.nbytes = self._matrix.nbytes
        self._x, self._y = (
            rng.normal(0, 1, (max(ROWS), SIZE)).astype(np.float32),
            np.empty((max(ROWS), SIZE), np.float32),
        )
        self._workspace = aligned(load().swarmd_linear_workspace(ctypes.byref(self._matrix.struct), max(ROWS)))

    def seconds(self, rows: int) -> float:
        """Of one product."""
        struct, out = ctypes.byref(self._matrix.struct), self._y.ctypes.data
        arguments = (self._pool, struct, self._x.ctypes.data, rows, out, self._workspace.ctypes.data)
        began = time.perf_counter()
        load().swarmd_linear(*arguments)
        return time.perf_counter() - began


def best_seconds(forms: dict[str, Products], rows: int, turns: int) -> dict[str, float]:
    """Of each form, the best of `turns`, each of which has some products in a row."""
    in_a_row = max(1, 16 // rows)
    best = dict.fromkeys(forms, float("inf"))
    for _ in range(turns):
        for name, product in forms.items():
            best[name] = min(best[name], *(product.seconds(rows) for _ in range(in_a_row + 1)))
    return best


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("forms", nargs="*", help=f"of {', '.join(MEASURED)}; by default all")
    parser.add_argument("--isa", help="another code path than the best one")
    parser.add_argument("--turns", type=int, default=30)
    asked = parser.parse_args()
    if asked.isa and not select(asked.isa):
        parser.error(f"this machine or build has no {asked.isa}")
    if unknown := set(asked.forms) - set(MEASURED):
        parser.error(f"no form {', '.join(unknown)}")
    pool = load().swarmd_pool_new(1)
    names = [BASE, *(name for name in MEASURED if name != BASE and (not asked.forms or name in asked.forms))]
    forms = {name: Products(MEASURED[name], pool) for name in names}
    single, many = (best_seconds(forms, rows, asked.turns) for rows in ROWS)
    load().swarmd_pool_free(pool)
    print(f"{isa()}, load {os.getloadavg()[0]:.1f}, best of {asked.turns} turns\n")
    head = ["form", "bytes", *(text for rows in ROWS for text in (f"{rows} rows", f"as {BASE}")), "GB/s, 1 row"]
    cells = [
        [
            *(name, f"{product.nbytes / 1e6:.1f} MB"),
            *(f"{single[name] * 1e6:.0f} us", f"{single[name] / single[BASE]:.2f} x"),
            *(f"{many[name] * 1e3:.2f} ms", f"{many[name] / many[BASE]:.2f} x"),
            f"{product.nbytes / single[name] / 1e9:.1f}",
        ]
        for name, product in forms.items()
    ]
    print(markdown_table(head, cells))


if __name__ == "__main__":
    main()
