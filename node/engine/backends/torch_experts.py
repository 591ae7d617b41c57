"""The experts of a layer as one tall matrix, so that those that rows choose are found without asking the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from swarmd.node.engine.backends.torch_packed import PackedMatrix, PackedPart, Part, below
from swarmd.node.engine.weights import Linear, MlpWeights

ChosenProduct = Callable[[torch.Tensor, Part, torch.Tensor, int], torch.Tensor]
"""(x [n, columns], the matrices of all experts below each other, the numbers of the chosen ones [n * experts per row],
experts) -> fp32 [n * experts per row, outputs]."""


@dataclass(frozen=True)
class StackedLinear:
    """The same matrix of every expert: a part has those of all experts below each other. `bias` [experts, outputs]."""

    parts: tuple[Part, ...]
    bias: torch.Tensor | None

    def of(self, expert: int, experts: int) -> Linear:
        """One expert's, of the same memory."""
        heights = [part.rows // experts for part in self.parts]
        own = (part.take(slice(expert * n, expert * n + n)) for part, n in zip(self.parts, heights, strict=True))
        return Linear(PackedMatrix(tuple(own)), None if self.bias is None else self.bias[expert])

    def product(self, x: torch.Tensor, chosen: torch.Tensor, experts: int, multiply: ChosenProduct) -> torch.Tensor:
        """Each row of x times the matrices of the experts that it chose: fp32 [len(chosen), outputs]."""
        y = torch.cat([multiply(x, part, chosen, experts) for part in self.parts], dim=1)
        return y if self.bias is None else y + self.bias[chosen]


@dataclass(frozen=True)
class StackedExperts:
    """All experts of a layer; indexed by an expert's number it gives that one."""

    count: int
    gate_up: StackedLinear
    down: StackedLinear

    def __getitem__(self, expert: int) -> MlpWeights:
        return MlpWeights(self.gate_up.of(expert, self.count), self.down.of(expert, self.count))


def stacked(experts: Sequence[MlpWeights]) -> StackedExperts | None:
    """The experts stacked, or None where a file has them in different forms."""
    gate_up, down = ([getattr(expert, part) for expert in experts] for part in ("gate_up", "down"))
    if any(len({_forms(linear.matrix) for linear in linears}) > 1 for linears in (gate_up, down)):
        return None
    return StackedExperts(len(experts), _stacked(gate_up), _stacked(down))


def chosen_product(x: torch.Tensor, part: Part, chosen: torch.Tensor, experts: int) -> torch.Tensor:
    """See `ChosenProduct`: by operations of torch, one matrix at a time."""
    height, per_row = part.rows // experts, len(chosen) // len(x)
    rows = torch.arange(height, device=x.device)
    products = [
        part.values(chosen[pair] * height + rows).to(x.dtype) @ x[pair // per_row] for pair in range(len(chosen))
    ]
    return torch.stack(products).float()


def _stacked(linears: Sequence[Linear]) -> StackedLinear:
    parts = zip(*(linear.matrix.parts for linear in linears), strict=True)
    biases = [linear.bias for linear in linears if linear.bias is not None]
    return StackedLinear(tuple(below(same) for same in parts), torch.stack(biases) if biases else None)


def _forms(matrix: PackedMatrix) -> tuple[object, ...]:
    """Equal for matrices that can be stacked."""
    return tuple(_form(part) for part in matrix.parts)


def _form(part: Part) -> tuple[object, ...]:
    tensors = tuple((tensor.shape, tensor.dtype) for tensor in part.tensors)
    if not isinstance(part, PackedPart):
        return tensors
    codebook = None if part.codebook is None else tuple(part.codebook.tolist())
    return (part.bits, part.group_size, part.offset, codebook, part.bias is None, *tensors)
