"""Replaying a step without Python: a function of tensors is captured once for each size of its inputs
(https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs), or just called where nothing can be captured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

Tensors = tuple[torch.Tensor, ...]
Function = Callable[..., torch.Tensor]


class Replays(Protocol):
    """Runs a function again and again."""

    def run(self, function: Function, inputs: Tensors) -> torch.Tensor:
        """What the function gives for these inputs; valid until the next run."""
        ...


class Calls:
    """Calls the function."""

    def run(self, function: Function, inputs: Tensors) -> torch.Tensor:
        """See `Replays`."""
        return function(*inputs)


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: Tensors
    output: torch.Tensor


class CudaGraphs:
    """One graph for each function's name and sizes of inputs, all in one pool of memory; captured at the first use.

    The function must not touch the host, and allocate the same for the same sizes.
    """

    WARM_UP = 2
    """Runs before the capture: libraries set themselves up, and kernels are compiled."""

    def __init__(self) -> None:
        self._captured: dict[tuple[object, ...], _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, function: Function, inputs: Tensors) -> torch.Tensor:
        """See `Replays`."""
        key = (function.__name__, *((tensor.shape, tensor.dtype) for tensor in inputs))
        if key not in self._captured:
            self._captured[key] = self._capture(function, inputs)
        captured = self._captured[key]
        for static, given in zip(captured.inputs, inputs, strict=True):
            static.copy_(given)
        captured.graph.replay()
        return captured.output

    def _capture(self, function: Function, inputs: Tensors) -> _Captured:
        static = tuple(tensor.clone() for tensor in inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(self.WARM_UP):
                function(*static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = function(*static)
        return _Captured(graph, static, output)
