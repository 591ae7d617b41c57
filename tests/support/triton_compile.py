"""Compiling Triton's kernels for GPUs that are not here: the compiler and NVIDIA's assembler come with its package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
WARP = 32


class Compiler:
    """Stands in for a kernel: a launch compiles it for these arguments and computes nothing.

    `shared` has the bytes of shared memory of each.
    """

    def __init__(self, kernel: Any, capability: int) -> None:
        """`capability`: 80 for compute capability 8.0."""
        self._kernel = kernel
        self._target = GPUTarget("cuda", capability, WARP)
        self.shared: list[int] = []

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self._compile

    def _compile(self, *arguments: Any, **constants: Any) -> None:
        names = self._kernel.arg_names
        signature = {name: _type(value) for name, value in zip(names, arguments, strict=False)}
        signature |= dict.fromkeys(constants, "constexpr")
        positions = {(names.index(name),): value for name, value in constants.items()}
        source = ASTSource(self._kernel, {name: signature[name] for name in names}, constexprs=positions)
        compiled = triton.compile(source, target=self._target)
        assert compiled.asm["cubin"], "machine code was made"
        self.shared.append(compiled.metadata.shared)


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    return "i32" if isinstance(value, int) else "fp32"
