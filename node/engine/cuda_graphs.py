"""Replaying a step without Python: a function that works on memory of its own is captured once
(https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs), or just called where nothing can be captured.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

log = logging.getLogger("swarmd.engine")

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

    The function must not touch the host. Where a driver refuses the capture, functions are called from then on, and the
    log says so.
    """

    WARM_UP = 2
    """Runs before the capture: libraries set themselves up, and kernels are compiled."""

    def __init__(self) -> None:
        self._captured: dict[tuple[int, ...], _Captured] = {}
        self._pool: Any = None
        self._refused = False

    def run(self, key: tuple[int, ...], function: Function) -> torch.Tensor:
        """See `Replays`."""
        if key not in self._captured and not self._refused:
            self._try(key, function)
        if key not in self._captured:
            return function()
        captured = self._captured[key]
        captured.graph.replay()
        return captured.output

    def _try(self, key: tuple[int, ...], function: Function) -> None:
        """Raises torch.OutOfMemoryError."""
        try:
            self._captured[key] = self._capture(function)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._refused = True
            log.warning("decode steps cannot be captured as CUDA graphs, so they run slower: %s", error)

    def _capture(self, function: Function) -> _Captured:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
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
