"""Run as a script, with TRITON_INTERPRET=1 or on a GPU: products of the Triton kernel in every canonical form."""

from __future__ import annotations

import sys

import numpy as np
import torch
from support.gguf_blocks import weight_blocks

from swarmd.node.engine.backends.torch_packed import PackedPart, packed
from swarmd.node.engine.backends.triton_product import product
from swarmd.node.engine.gguf_blocks import QUANTIZED_FORMS, from_gguf
from swarmd.node.engine.quantized import QuantizedWeight, Scales, f32_to_bf16, pack

ROWS, COLUMNS = 40, 256
U = 2.0**-24


def forms() -> dict[str, QuantizedWeight]:
    """One weight of each GGUF type, and of each that other tools make."""
    made: dict[str, QuantizedWeight] = {}
    for kind in QUANTIZED_FORMS:
        weight = from_gguf("w", kind, weight_blocks(kind, ROWS, COLUMNS, 0.1), (ROWS, COLUMNS))
        assert isinstance(weight, QuantizedWeight)
        made[kind.name] = weight
    random = np.random.default_rng(0)
    for bits, group, scales in ((2, 64, "bf16"), (3, 32, "f16"), (4, 128, "f32"), (6, 64, "bf16"), (8, 64, "f16")):
        numbers = [random.standard_normal((ROWS, COLUMNS // group)).astype(np.float32) / (1 << bits) for _ in range(2)]
        kept = {"f32": np.asarray, "f16": lambda x: x.astype(np.float16), "bf16": f32_to_bf16}[scales]
        codes = random.integers(0, 1 << bits, (ROWS, COLUMNS), dtype=np.uint8)
        scale, bias = (Scales(kept(number)) for number in numbers)
        made[f"{bits} bits in groups of {group}, {scales}"] = QuantizedWeight(
            bits, group, pack(codes, bits), scale, bias
        )
    return made


def check(name: str, weight: QuantizedWeight, device: torch.device) -> None:
    """With 1 and with 13 rows, in fp32 and, on a GPU, in bf16: the interpreter multiplies the bits of bf16 as integers.

    Raises AssertionError.
    """
    part = packed([weight], device).parts[0]
    assert isinstance(part, PackedPart)
    values = weight.dequantize().astype(np.float64)
    for rows in (1, 13):
        x = torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(rows))
        for kind, unit in ((torch.float32, U), (torch.bfloat16, 2.0**-8))[: 1 if device.type == "cpu" else 2]:
            given = x.to(kind)
            found = product(given.to(device), part).double().cpu().numpy()
            exact = given.double().numpy()
            # Each weight is rounded twice to fp32, and in bf16 once more; sums of so many terms.
            sizes = np.abs(exact) @ np.abs(values).T
            bound = (COLUMNS + 8) * U * sizes + unit * sizes + 1e-30
            scale = np.abs(weight.scale.expand()).max() * 255 + np.abs(weight.expanded_bias()).max()
            bound += 4 * U * scale * np.abs(exact).sum(-1, keepdims=True)
            assert (np.abs(found - exact @ values.T) <= bound).all(), (name, rows, kind)
    print(f"{name} ok")


def main() -> None:
    """All of them."""
    device = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cpu")
    for name, weight in forms().items():
        check(name, weight, device)


if __name__ == "__main__":
    main()
