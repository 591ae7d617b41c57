"""Replaying a step without Python: a function that works on memory of its own is captured once
(https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs), or just called where nothing can be captured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

Function = Callable[[], torch.Tensor]


class Replays(Protocol):
    """Runs functions again and again."""

    def run(self, key: tuple[int, ...], function: Function) -> torch.Tensor:
        """What the function gives; valid until the next run. One key, one work on the same memory."""
        ...


class Calls:
    """Calls the function."""

    def run(self, key: tuple[int, ...], function: Function) -> torch.Tensor:
        """See `Replays`."""
        return function()


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    output: torch.Tensor


class CudaGraphs:
    """One graph for each key, all in one pool of memory; captured at the first use, on the current device.

    The function must not touch the host.
    """

    WARM_UP = 2
    """Runs before the capture: libraries set themselves up, and kernels are compiled."""

    def __init__(self) -> None:
        self._captured: dict[tuple[int, ...], _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, key: tuple[int, ...], function: Function) -> torch.Tensor:
        """See `Replays`."""
        if key not in self._captured:
            self._captured[key] = self._capture(function)
        captured = self._captured[key]
        captured.graph.replay()
        return captured.output

    def _capture(self, function: Function) -> _Captured:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(self.WARM_UP):
                function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Another thread's calls to CUDA are no matter of ours.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = function()
        return _Captured(graph, output)
