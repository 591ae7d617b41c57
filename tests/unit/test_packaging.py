"""What is installed is complete and nothing else, versions are pinned, and files keep to a size that reads well."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
PARTS = ("dashboard", "discovery", "node", "partition", "transport")
PRODUCT = sorted(
    path for part in PARTS for path in (ROOT / part).rglob("*.py") if "node_modules" not in path.relative_to(ROOT).parts
)

MOST_LINES = 300
MOST_FUNCTION_LINES = 50


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def pinned() -> dict[str, str]:
    """Package -> the exact version in constraints.txt."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def requirements() -> list[Requirement]:
    project = PYPROJECT["project"]
    texts = [*project["dependencies"], *PYPROJECT["build-system"]["requires"]]
    for extra in project["optional-dependencies"].values():
        texts += extra
    return [Requirement(text) for text in texts]


def test_every_package_is_listed_and_every_one_listed_exists():
    folders = {path.parent.relative_to(ROOT) for path in PRODUCT}
    assert set(SETUPTOOLS["packages"]) == {".".join(("swarmd", *folder.parts)) for folder in folders}
    assert len(SETUPTOOLS["packages"]) == len(folders)


def test_every_folder_of_sources_is_a_package():
    assert [named(path.parent) for path in PRODUCT if not (path.parent / "__init__.py").is_file()] == []


def test_nothing_is_installed_outside_the_package():
    assert {name.partition(".")[0] for name in SETUPTOOLS["packages"]} == {"swarmd"}
    assert "py-modules" not in SETUPTOOLS
    assert {f"swarmd.{part}": part for part in PARTS} == SETUPTOOLS["package-dir"]


def test_what_is_installed_here_is_found_under_swarmd_only():
    """An interpreter that knows nothing but what is installed: isolated, and started elsewhere."""
    looks = f"""
import importlib.util
found = [name for name in {PARTS!r} if importlib.util.find_spec(name)]
assert not found, found
for part in {PARTS!r}:
    assert importlib.util.find_spec("swarmd." + part), part
"""
    done = subprocess.run([sys.executable, "-I", "-c", looks], cwd="/", capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_every_source_of_the_kernels_is_compiled():
    [kernels] = SETUPTOOLS["ext-modules"]
    assert kernels["optional"], "an installation without a compiler must not fail"
    found = {named(path) for path in (ROOT / "node").rglob("*.cpp")}
    assert set(kernels["sources"]) == found


def test_the_makefile_compiles_the_kernels_as_the_installation_does():
    """So that what the sanitizers and the emulator see is what people run; warnings and optimization aside."""
    [kernels] = SETUPTOOLS["ext-modules"]
    [line] = re.findall(r"^NATIVE_FLAGS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    meaning = [flag for flag in kernels["extra-compile-args"] if not flag.startswith(("-O", "-g", "-fvisibility"))]
    assert meaning == [flag for flag in line.split() if not flag.startswith("-W")]


def test_the_makefile_knows_the_same_parts():
    [line] = re.findall(r"^SUBPACKAGES := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert tuple(line.split()) == PARTS


def test_ci_runs_targets_that_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    asked = re.findall(r"^make (\w+)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert "test" in asked
    assert set(asked) <= targets


@pytest.mark.parametrize("requirement", requirements(), ids=lambda requirement: requirement.name)
def test_every_requirement_is_pinned_to_a_version_that_it_allows(requirement):
    version = pinned().get(canonicalize_name(requirement.name))
    assert version, f"constraints.txt does not pin {requirement.name}"
    assert requirement.specifier.contains(version)


def test_constraints_are_exact_versions_and_torch_is_the_one_without_cuda_libraries():
    versions = pinned()
    assert [name for name, version in versions.items() if not re.fullmatch(r"\d+(\.\w+)*", version)] == []
    assert versions["torch"] == "2.13.0"


def test_every_module_says_what_it_is():
    bench = sorted((ROOT / "bench").glob("*.py"))
    silent = [named(path) for path in [*PRODUCT, *bench] if (text := path.read_text()) and not _docstring(text)]
    assert silent == []


def _docstring(text: str) -> str | None:
    return ast.get_docstring(ast.parse(text))


def test_files_are_short_enough_to_be_read_at_once():
    lengths = {named(path): len(path.read_text().splitlines()) for path in PRODUCT}
    assert {name: n for name, n in lengths.items() if n > MOST_LINES} == {}


def test_functions_are_short_enough_to_be_read_at_once():
    functions = [
        (f"{named(path)}:{node.lineno} {node.name}", (node.end_lineno or node.lineno) - node.lineno + 1)
        for path in PRODUCT
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert len(functions) > 500
    assert [name for name, lines in functions if lines > MOST_FUNCTION_LINES] == []
