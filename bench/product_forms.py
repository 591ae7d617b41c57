"""Time the kernels' product of each quantized form, relative to Q4_0: `python bench/product_forms.py [--size N]`.

A random matrix [N, N] times 1 row and 64 rows, one thread, the forms in turns; the best of many rounds counts, since
others have the cores as well. No model around it: `bench/step_speed.py` has that.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support.native_kernels import FORMS, Form, weight_of

from swarmd.node.engine.cpu import bindings
from swarmd.node.engine.cpu.matrices import NativeMatrix, linear

ROWS = (1, 64)
ROUNDS = 40
MEASURED: dict[str, Form] = {
    **{name: FORMS[name] for name in ("Q4_0", "Q4_K", "Q6_K", "MXFP4")},
    "MLX 4-bit g64": Form(4, 64, "bf16", "bf16"),
    "Q4_1": Form(4, bias="f16"),
    "Q8_0": Form(8),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    size = parser.parse_args().size
    rng = np.random.default_rng(1)
    matrices = {name: NativeMatrix([weight_of(rng, form, size, size)]) for name, form in MEASURED.items()}
    best: dict[tuple[str, int], float] = {}
    for rows in ROWS:
        x = rng.normal(0, 1, (rows, size)).astype(np.float32)
        for _ in range(ROUNDS):
            for name, matrix in matrices.items():
                began = time.perf_counter()
                linear(matrix, x)
                seconds = time.perf_counter() - began
                best[name, rows] = min(seconds, best.get((name, rows), seconds))
    print(f"[{size}, {size}], {bindings.isa()}, 1 thread, best of {ROUNDS}, load {os.getloadavg()[0]:.1f}\n")
    print("| form | MB | " + " | ".join(f"{rows} rows, ms | of Q4_0" for rows in ROWS) + " |")
    print("| --- | --- |" + " --- |" * 2 * len(ROWS))
    for name, matrix in matrices.items():
        figures = (f"{best[name, rows] * 1e3:.2f} | {best[name, rows] / best['Q4_0', rows]:.2f}" for rows in ROWS)
        print(f"| {name} | {matrix.nbytes / 1e6:.1f} | " + " | ".join(figures) + " |")


if __name__ == "__main__":
    main()
