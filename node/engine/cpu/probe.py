"""Measure our kernels against plain PyTorch: `python -m swarmd.node.engine.cpu.probe` prints JSON. Takes some seconds.

For `swarmd doctor`, as a process of its own: it imports torch. All on one thread, so that whatever else the machine
does weighs on both alike.
"""

from __future__ import annotations

import ctypes
import json
import sys

import numpy as np
import torch

from swarmd.node.engine.backends.torch_cpu import TorchCpuBackend
from swarmd.node.engine.calibrate import best_rate, memory_bandwidth
from swarmd.node.engine.cpu.bindings import GROUP, NativeMissing, isa, load
from swarmd.node.engine.cpu.matrices import NativeMatrix, aligned
from swarmd.node.engine.quantized import QuantizedWeight, Scales, pack

ROWS, COLUMNS, BITS = 32768, 2048, 4
"""The product that is measured, 4-bit with fp16 scales: the output head of a 1B model, larger than most caches."""
PREFILL_ROWS = 64
MEASURE_SECONDS = 0.25


def weight() -> QuantizedWeight:
    """Random codes; what they are makes no difference to speed."""
    rng = np.random.default_rng(0)
    scale = rng.uniform(0.01, 0.02, (ROWS, COLUMNS // GROUP)).astype(np.float16)
    codes = rng.integers(0, 1 << BITS, (ROWS, COLUMNS), dtype=np.uint8)
    return QuantizedWeight(BITS, GROUP, pack(codes, BITS), Scales(scale), None)


def native_seconds(sample: QuantizedWeight, rows: int) -> float:
    """Seconds of one product with `rows` rows of activations. Raises NativeMissing."""
    library, matrix = load(), NativeMatrix([sample])
    x, y = np.ones((rows, COLUMNS), np.float32), np.empty((rows, ROWS), np.float32)
    struct = ctypes.byref(matrix.struct)
    workspace = aligned(library.swarmd_linear_workspace(struct, rows))
    pool = library.swarmd_pool_new(1)
    arguments = (pool, struct, x.ctypes.data, rows, y.ctypes.data, workspace.ctypes.data)
    try:
        return 1 / best_rate(lambda: library.swarmd_linear(*arguments), 1.0, MEASURE_SECONDS)
    finally:
        library.swarmd_pool_free(pool)


def torch_seconds(sample: QuantizedWeight, rows: int) -> float:
    """The same in plain PyTorch, as a node without the kernels computes it."""
    backend = TorchCpuBackend()
    matrix, x = backend.prepare([sample]), torch.ones(rows, COLUMNS)
    return 1 / best_rate(lambda: backend.linear(x, matrix), 1.0, MEASURE_SECONDS)


def measure() -> dict[str, object]:
    """`isa` of the kernels, or the reason why they are `missing`; seconds of a product with 1 row (`decode`) and with
    PREFILL_ROWS (`prefill`) by either way; `weight_bytes` that it reads; `memory_bandwidth` in bytes/s.
    """
    sample = weight()
    found: dict[str, object] = {
        "torch": torch.__version__,
        "weight_bytes": sample.nbytes,
        "memory_bandwidth": memory_bandwidth(),
        "torch_seconds": {"decode": torch_seconds(sample, 1), "prefill": torch_seconds(sample, PREFILL_ROWS)},
    }
    try:
        native = {"decode": native_seconds(sample, 1), "prefill": native_seconds(sample, PREFILL_ROWS)}
    except NativeMissing as error:
        return found | {"missing": str(error)}
    return found | {"isa": isa(), "native_seconds": native}


def main() -> None:
    """Print what `measure` finds."""
    torch.set_num_threads(1)
    json.dump(measure(), sys.stdout)


if __name__ == "__main__":
    main()
