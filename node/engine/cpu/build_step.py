"""Builds the native kernels when swarmd is installed or packed: the setuptools command `build_ext`.

`pyproject.toml` names the sources under `ext-modules` and the command under `[tool.setuptools.cmdclass]`. The
extension is optional: where it cannot be built the installation succeeds without it, the node computes with plain
PyTorch, and `swarmd doctor` says what that costs.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CCompilerError, CompileError, ExecError, LinkError

COMPILERS = ("c++", "g++", "clang++")
REMEDY = (
    "the native kernels were not built, so swarmd will compute with plain PyTorch, several times slower; install a "
    "C++ compiler (Debian, Ubuntu: apt install g++; macOS: xcode-select --install), then install swarmd again"
)


class BuildKernels(build_ext):
    """`build_ext` with all cores, and with whatever C++ compiler is there; without one it warns and goes on."""

    def build_extension(self, ext: Extension) -> None:
        """Build one extension. A failure is a warning, and takes away what an earlier, other source was built to."""
        choose_compiler(self.compiler, shutil.which)
        self.compiler.compile = in_parallel(self.compiler.compile)
        try:
            super().build_extension(ext)
        except (CCompilerError, CompileError, ExecError, LinkError) as error:
            for stale in self._where_built(ext):
                stale.unlink(missing_ok=True)
            self.warn(f"{REMEDY}. What went wrong: {error}")

    def _where_built(self, ext: Extension) -> Iterable[Path]:
        """In the build folder, and for an editable installation beside the sources."""
        built = Path(self.get_ext_fullpath(ext.name))
        yield built
        if self.editable_mode:
            package = ext.name.rpartition(".")[0]
            where = cast(build_py, self.get_finalized_command("build_py")).get_package_dir(package)
            yield Path(where, built.name)


def choose_compiler(compiler: Any, which: Callable[[str], str | None]) -> None:
    """Take the first C++ compiler that exists, where the one that Python itself was built with is missing here.

    Python distributions are often built with a compiler that their users do not have. `compiler` is setuptools' for
    Unix; the one that CXX names is never replaced.
    """
    if os.environ.get("CXX") or which(compiler.compiler_so_cxx[0]):
        return
    found = next((name for name in COMPILERS if which(name)), None)
    if found is not None:
        for role in ("compiler_cxx", "compiler_so_cxx", "linker_so_cxx", "linker_exe_cxx"):
            setattr(compiler, role, [found, *getattr(compiler, role)[1:]])


def in_parallel(compile_all: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """setuptools' `compile(sources, ...)` with one compiler process per core; the objects in the sources' order."""

    def compile_each(sources: list[str], **options: Any) -> list[str]:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            made = pool.map(lambda source: compile_all([source], **options), sources)
            return [each for objects in made for each in objects]

    return compile_each
