"""The kernels are built where they can be, and an installation never fails where they cannot."""

from __future__ import annotations

import ctypes
import os
import shutil
import threading
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace

import pytest
from setuptools import Distribution, Extension

from swarmd.node.engine.cpu.build_step import BuildKernels, choose_compiler, in_parallel

GOOD = 'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n'


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package `part`, whose extension `part._native` has one source."""
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "__init__.py").touch()
    (tmp_path / "native.cpp").write_text(GOOD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path


def build(project: Path) -> list[Path]:
    """What an editable installation leaves beside the sources."""
    extension = Extension("part._native", ["native.cpp"], language="c++", optional=True)
    command = BuildKernels(Distribution({"name": "x", "packages": ["part"], "ext_modules": [extension]}))
    command.editable_mode = True  # pyright: ignore[reportAttributeAccessIssue] - what setuptools itself does
    command.build_lib, command.build_temp = str(project / "lib"), str(project / "temp")
    command.ensure_finalized()
    command.run()
    return sorted((project / "part").glob("_native*.so"))


def a_compiler() -> str | None:
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


needs_compiler = pytest.mark.skipif(a_compiler() is None, reason="no C++ compiler is installed")


@needs_compiler
def test_what_is_built_lies_beside_the_sources_and_can_be_loaded(project: Path):
    [library] = build(project)
    assert ctypes.CDLL(str(library)).answer() == 42


def test_without_a_compiler_it_warns_and_takes_the_old_build_away(
    project: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Of a library that is older than the sources nobody could say what it computes."""
    stale = project / "part" / f"_native{EXTENSION_SUFFIXES[0]}"
    stale.touch()
    monkeypatch.setenv("CXX", str(project / "no-such-compiler"))
    assert build(project) == []
    assert "the native kernels were not built" in caplog.text
    assert "apt install g++" in caplog.text
    assert "no-such-compiler" in caplog.text


@needs_compiler
def test_sources_that_do_not_compile_are_a_warning_too(project: Path, caplog: pytest.LogCaptureFixture):
    (project / "native.cpp").write_text("broken")
    assert build(project) == []
    assert "the native kernels were not built" in caplog.text


class TestCompiler:
    ROLES = ("compiler_cxx", "compiler_so_cxx", "linker_so_cxx", "linker_exe_cxx")

    def chosen(self, *there: str) -> set[str]:
        """What stands first in every command line, when Python was built with `icpc` and these compilers exist."""
        compiler = SimpleNamespace(**{role: ["icpc", "-flag"] for role in self.ROLES})
        choose_compiler(compiler, lambda name: f"/usr/bin/{name}" if name in there else None)
        assert all(getattr(compiler, role)[1:] == ["-flag"] for role in self.ROLES)
        return {getattr(compiler, role)[0] for role in self.ROLES}

    def test_pythons_own_is_kept_where_it_exists(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.delenv("CXX", raising=False)
        assert self.chosen("icpc", "g++") == {"icpc"}

    def test_another_takes_its_place_where_it_does_not(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.delenv("CXX", raising=False)
        assert self.chosen("clang++", "g++") == {"g++"}
        assert self.chosen("clang++") == {"clang++"}
        assert self.chosen() == {"icpc"}

    def test_the_one_that_was_asked_for_is_never_replaced(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("CXX", "icpc")
        assert self.chosen("g++") == {"icpc"}


def test_files_are_compiled_at_the_same_time_and_stay_in_order():
    if (os.cpu_count() or 1) < 2:
        pytest.skip("one core compiles one file at a time")
    both = threading.Barrier(2)

    def compile_one(sources: list[str], **options: object) -> list[str]:
        both.wait(30)
        return [f"{source}.o{options['debug']}" for source in sources]

    assert in_parallel(compile_one)(["b", "a"], debug=1) == ["b.o1", "a.o1"]
