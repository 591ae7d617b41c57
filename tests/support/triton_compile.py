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

    `shared` has the bytes of shared memory of each, `assembly` the last one's PTX.
    """

    def __init__(self, kernel: Any, capability: int) -> None:
        """`capability`: 80 for compute capability 8.0."""
        self._kernel = kernel
        self._target = GPUTarget("cuda", capability, WARP)
        self.shared: list[int] = []
        self.assembly = ""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self._compile

    def _compile(self, *arguments: Any, **constants: Any) -> None:
        names = self._kernel.arg_names
        given = dict(zip(names, arguments, strict=False))
        # As a launch does: numbers that are 1 are compiled in, and the compiler is told what is a multiple of 16.
        constants |= {name: value for name, value in given.items() if isinstance(value, int) and value == 1}
        signature = {name: _type(value) for name, value in given.items()} | dict.fromkeys(constants, "constexpr")
        fixed = {(names.index(name),): value for name, value in constants.items()}
        multiples = [name for name, value in given.items() if name not in constants and _of_16(value)]
        hints: dict[tuple[int, ...], Any] = {(names.index(name),): [["tt.divisibility", 16]] for name in multiples}
        source = ASTSource(self._kernel, {name: signature[name] for name in names}, constexprs=fixed, attrs=hints)
        compiled = triton.compile(source, target=self._target)
        assert compiled.asm["cubin"], "machine code was made"
        self.assembly = compiled.asm["ptx"]
        self.shared.append(compiled.metadata.shared)


def _of_16(value: Any) -> bool:
    number = value.data_ptr() if isinstance(value, torch.Tensor) else value
    return isinstance(number, int) and number % 16 == 0


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    return "i32" if isinstance(value, int) else "fp32"
