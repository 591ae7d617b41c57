"""Run as a script, with TRITON_INTERPRET=1 or on a GPU (`... cuda:0`): the Triton kernels' attention over ragged
sequences in a shuffled paged cache, against float64.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import torch

from swarmd.node.engine.backends import torch_paged, triton_attention
from swarmd.node.engine.block_table import BLOCK

LENGTHS = (1, 16, 37, 150, 90)
"""One token, a full block, and more than a program reads at once."""


@dataclass(frozen=True)
class Case:
    heads: int = 4
    kv_heads: int = 2
    key_dim: int = 32
    value_dim: int = 32
    softcap: float | None = None
    window: int | None = None
    sinks: bool = False
    latent: bool = False


CASES = {
    "grouped": Case(),
    "one key head, odd dims": Case(heads=6, kv_heads=1, key_dim=24, value_dim=24),
    "more heads in a group than a program takes": Case(heads=20, kv_heads=1),
    "window": Case(window=21),
    "soft cap": Case(softcap=3.0),
    "sinks": Case(sinks=True),
    "window, soft cap and sinks": Case(window=40, softcap=5.0, sinks=True),
    "latent": Case(heads=4, kv_heads=1, key_dim=8, value_dim=40, latent=True),
}


def exact(case: Case, given: dict[str, np.ndarray], row: int, tokens: np.ndarray, scale: float) -> np.ndarray:
    """float64 [heads, value_dim]; `tokens`: where in the flat pools the sequence's tokens are."""
    keys, values = given["keys"][tokens], given["values"][tokens]
    out = []
    for head in range(case.heads):
        kv = head // (case.heads // case.kv_heads)
        scores = keys[:, kv] @ given["queries"][row, head]
        if case.latent:
            scores = scores + values[:, kv] @ given["absorbed"][row, head]
        scores = scores * scale
        if case.softcap is not None:
            scores = case.softcap * np.tanh(scores / case.softcap)
        if case.window is not None:
            scores[: max(0, len(scores) - case.window)] = -np.inf
        weights = np.exp(scores - scores.max())
        total = weights.sum() + (np.exp(given["sinks"][head] - scores.max()) if case.sinks else 0)
        out.append(weights @ values[:, kv] / total)
    return np.stack(out)


def check(case: Case, kind: torch.dtype, tolerance: float, device: torch.device) -> None:
    """Both implementations. Raises AssertionError."""
    random = torch.Generator().manual_seed(3)
    rows, counts = len(LENGTHS), [-(-length // BLOCK) for length in LENGTHS]
    order = torch.randperm(sum(counts) + 2, generator=random).tolist()
    tables = torch.zeros(rows, 2 + max(counts) + 3, dtype=torch.int32)[:, 2:]  # rows lie apart, as in a plan
    for row, count in enumerate(counts):
        tables[row, :count] = torch.tensor([order.pop() for _ in range(count)])

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    pools = [normal(sum(counts) + 2, BLOCK, case.kv_heads, dim).to(kind) for dim in (case.key_dim, case.value_dim)]
    queries = normal(rows, case.heads, case.key_dim).to(kind).float()
    absorbed = normal(rows, case.heads, case.value_dim).to(kind).float() if case.latent else None
    sinks, scale = normal(case.heads), 0.4
    flat = {name: pool.double().flatten(0, 1).numpy() for name, pool in zip(("keys", "values"), pools, strict=True)}
    given = flat | {"queries": queries.double().numpy(), "sinks": sinks.double().numpy()}
    given |= {} if absorbed is None else {"absorbed": absorbed.double().numpy()}
    expected = []
    for row, length in enumerate(LENGTHS):
        token = np.arange(length)
        expected.append(exact(case, given, row, tables[row].numpy()[token // BLOCK] * BLOCK + token % BLOCK, scale))
    options = {"scale": scale, "softcap": case.softcap, "window": case.window}
    placed = [None if x is None else x.to(device) for x in (queries, absorbed, *pools, tables)]
    positions = torch.tensor([length - 1 for length in LENGTHS], dtype=torch.int32, device=device)
    for attend in (triton_attention.attend, torch_paged.attend):
        found = attend(*placed, positions, **options, sinks=sinks.to(device) if case.sinks else None)  # pyright: ignore
        worst = np.abs(found.double().cpu().numpy() - np.stack(expected)).max()
        assert worst < tolerance, f"{attend.__module__} is off by {worst:.2g}"


def main() -> None:
    """All of them; values are of size 1, so the tolerances are relative to that."""
    device = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cpu")
    if device.type == "cpu":
        triton_attention.PROGRAMS = 32  # each takes the interpreter milliseconds
    for name, case in CASES.items():
        check(case, torch.float32, 1e-5, device)
        if device.type != "cpu":  # the interpreter multiplies the bits of bf16 as integers
            check(case, torch.bfloat16, 3e-2, device)
        print(f"{name} ok")


if __name__ == "__main__":
    main()
