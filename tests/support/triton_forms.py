"""Run as a script, with TRITON_INTERPRET=1 or on a GPU (`... cuda:0`): the Triton kernels' products in every canonical
form, with one matrix and with chosen experts, and the values that they write, against float64.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from support.weight_forms import FORMS

from swarmd.node.engine.backends.torch_packed import PackedPart, packed
from swarmd.node.engine.backends.triton_product import chosen_product, product, values
from swarmd.node.engine.quantized import QuantizedWeight, Weight

ROWS, COLUMNS = 36, 256  # neither rows nor, with 3 experts, their outputs are multiples of a program's
EXPERTS, CHOSEN = 3, (2, 0, 1, 1, 0, 2)
U = 2.0**-24


def kinds(device: torch.device) -> list[tuple[torch.dtype, float]]:
    """In fp32 and, on a GPU, in bf16: the interpreter multiplies the bits of bf16 as integers."""
    return [(torch.float32, U), (torch.bfloat16, 2.0**-8)][: 1 if device.type == "cpu" else 2]


def error_bound(weight: Weight, exact: np.ndarray, unit: float) -> np.ndarray:
    """[rows of x, outputs]: a weight is rounded twice to fp32, and in bf16 once more; then sums of COLUMNS terms."""
    sizes = np.abs(exact) @ np.abs(weight.dequantize().astype(np.float64)).T
    bound = ((COLUMNS + 8) * U + (unit if unit > U else 0)) * sizes + 1e-30
    if isinstance(weight, QuantizedWeight):
        largest = np.abs(weight.scale.expand()).max() * 255 + np.abs(weight.expanded_bias()).max()
        bound += 4 * U * largest * np.abs(exact).sum(-1, keepdims=True)
    return bound


def check_product(weight: Weight, device: torch.device) -> None:
    """With 1 and with 13 rows. Raises AssertionError, as all below."""
    part = packed([weight], device).parts[0]
    for rows in (1, 13):
        x = torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(rows))
        for kind, unit in kinds(device):
            given = x.to(kind)
            found = product(given.to(device), part).double().cpu().numpy()
            exact = given.double().numpy()
            expected = exact @ weight.dequantize().astype(np.float64).T
            assert (np.abs(found - expected) <= error_bound(weight, exact, unit)).all(), (rows, kind)


def check_chosen(weight: Weight, device: torch.device) -> None:
    """Rows with two experts each, then each product's row with one, as an MLP has them."""
    part = packed([weight], device).parts[0]
    matrices = weight.dequantize().astype(np.float64).reshape(EXPERTS, -1, COLUMNS)
    for rows in (3, 6):
        x = torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(rows))
        for kind, unit in kinds(device):
            given = x.to(kind)
            chosen = torch.tensor(CHOSEN, device=device)
            found = chosen_product(given.to(device), part, chosen, EXPERTS).double().cpu().numpy()
            exact = np.repeat(given.double().numpy(), 6 // rows, axis=0)
            bounds = error_bound(weight, exact, unit).reshape(6, -1)
            for i, expert in enumerate(CHOSEN):
                bound = bounds[i].reshape(EXPERTS, -1)[expert]
                assert (np.abs(found[i] - matrices[expert] @ exact[i]) <= bound).all(), (rows, kind, i)


def check_values(weight: Weight, device: torch.device) -> None:
    """Rows from the middle: what `dequantize` gives, up to how the compiler rounds a product and a sum together."""
    part = packed([weight], device).parts[0]
    if isinstance(part, PackedPart):
        found = values(part, 5, 31, torch.float32).cpu().numpy()
        expected = weight.dequantize()[5:31]
        largest = np.abs(weight.scale.expand()).max() * 255 if isinstance(weight, QuantizedWeight) else 0
        assert np.abs(found - expected).max() <= 4 * U * largest, "values"


def main() -> None:
    """All of them."""
    device = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cpu")
    for name, make in FORMS.items():
        weight = make(ROWS, COLUMNS, np.random.default_rng(0))
        check_product(weight, device)
        check_chosen(weight, device)
        check_values(weight, device)
        print(f"{name} ok")


if __name__ == "__main__":
    main()
