"""Who may import whom (docs/design.md, "The house"), read from the sources."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("dashboard", "discovery", "node", "partition", "transport")

PURE = (
    *("discovery.dial_book", "discovery.records"),
    *("partition.costs", "partition.explain", "partition.memory_weighted", "partition.plan", "partition.units"),
    *("transport.frames", "transport.log_limit", "transport.messages"),
    *("node.cluster.actions", "node.cluster.bring_up", "node.cluster.claims", "node.cluster.ledger"),
    *("node.cluster.membership", "node.cluster.ownership", "node.cluster.planning", "node.cluster.trouble"),
    *("node.devices", "node.drain", "partition.connected"),
    *("node.engine.sampling_params", "node.engine.spec"),
    *("node.models.detokenizer", "node.models.stop_strings"),
    *("node.serving.chunking", "node.serving.depth", "node.serving.in_flight", "node.serving.kv_room"),
    *("node.serving.prefix_cache", "node.serving.prefix_tree", "node.serving.steps"),
    *("node.serving.generation", "node.serving.messages", "node.serving.scheduler", "node.serving.sequences"),
    *("node.serving.draft_policy", "node.serving.drafting", "node.serving.ngram_index", "node.serving.speculation"),
    *("node.serving.step_cost", "node.serving.text_stream", "node.serving.liveness"),
    *("node.serving.recovery", "node.serving.suspects"),
)
# Its PeerAddress stands beside the function that resolves one.
PURE_BY_ITSELF = {"discovery.dial_book"}
IMPURE = {"aiohttp", "asyncio", "mlx", "random", "secrets", "socket", "ssl", "subprocess", "time", "torch"}

# What makes a process touch the network, other processes or a device, and who may put such parts together.
ADAPTERS = {"Endpoint", "Mesh", "MdnsDiscovery", "StageEngine", "StageHost", "StageProcess"}
WIRING = {"node/daemon.py", "node/serving/stage_main.py"}

DIALECTS = ("anthropic", "ollama", "openai", "responses")


@dataclass(frozen=True)
class Import:
    """One import of `module` in `file`. `eager`: it happens when the file is imported, not later or for types only."""

    file: str
    line: int
    module: str
    eager: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


@cache
def sources() -> dict[str, tuple[str, ast.Module]]:
    """Module name -> its file, relative to the root, and its syntax tree."""
    found: dict[str, tuple[str, ast.Module]] = {}
    for part in PARTS:
        for path in sorted((ROOT / part).rglob("*.py")):
            if "node_modules" not in path.parts:
                relative = path.relative_to(ROOT)
                names = ["swarmd", *relative.with_suffix("").parts]
                module = ".".join(names[:-1] if names[-1] == "__init__" else names)
                found[module] = str(relative), ast.parse(path.read_text(encoding="utf-8"))
    assert len(found) > 80, "the sources were found"
    return found


def imports(module: str) -> Iterator[Import]:
    """Every import of a module's file, wherever it stands."""
    file, tree = sources()[module]
    yield from _imports(file, tree, eager=True)


def _imports(file: str, node: ast.AST, *, eager: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(file, child.lineno, alias.name, eager)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{file}:{child.lineno} imports relatively; write swarmd.… instead"
            assert child.module
            for alias in child.names:
                full = f"{child.module}.{alias.name}"
                yield Import(file, child.lineno, full if full in sources() else child.module, eager)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            yield from _imports(file, child, eager=False)
        else:
            lazy = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(file, child, eager=eager and not lazy)


def all_imports() -> Iterator[Import]:
    for module in sources():
        yield from imports(module)


def inside(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


@cache
def loaded_by(module: str) -> frozenset[str]:
    """Everything outside the standard packages' own needs that is imported when `module` is: other swarmd modules and
    the top-level names of libraries."""
    seen: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            if name in sources():
                todo += [found.module for found in imports(name) if found.eager]
    return frozenset(name if inside(name, "swarmd") else name.partition(".")[0] for name in seen)


@pytest.mark.parametrize("part", ["discovery", "partition", "transport"])
def test_the_three_foundations_stand_on_nothing_else_of_swarmd(part):
    own = f"swarmd.{part}"
    wrong = [
        str(found)
        for module in sources()
        if inside(module, own)
        for found in imports(module)
        if inside(found.module, "swarmd") and not inside(found.module, own)
    ]
    assert wrong == []


def test_the_dashboard_needs_nothing_of_the_node():
    """It reads the public feed and acts through the public HTTP API."""
    wrong = [
        str(found)
        for module in sources()
        if inside(module, "swarmd.dashboard")
        for found in imports(module)
        if inside(found.module, "swarmd") and not inside(found.module, "swarmd.dashboard")
    ]
    assert wrong == []


@pytest.mark.parametrize("module", PURE)
def test_decisions_are_pure(module):
    """They take events and `now` and return actions: no I/O, no clock, no chance, no tensors, not even indirectly."""
    name = f"swarmd.{module}"
    assert name in sources(), "the list of pure modules names one that is not there"
    assert [str(found) for found in imports(name) if found.module.partition(".")[0] in IMPURE] == []
    assert module in PURE_BY_ITSELF or not loaded_by(name) & IMPURE


def test_tensors_are_imported_only_below_the_engine():
    wrong = [
        str(found)
        for found in all_imports()
        if found.module.partition(".")[0] in ("torch", "mlx") and not found.file.startswith("node/engine/")
    ]
    assert wrong == []


def test_nothing_outside_the_engine_brings_torch_or_mlx_along_when_it_is_imported():
    wrong = [
        module
        for module in sources()
        if not inside(module, "swarmd.node.engine") and loaded_by(module) & {"torch", "mlx", "transformers"}
    ]
    assert wrong == []


def test_a_stage_brings_along_what_every_stage_needs():
    """There is one per node and model, and a spare one."""
    assert not loaded_by("swarmd.node.engine.stage_engine") & {"torch", "mlx", "tokenizers", "llguidance", "aiohttp"}


def test_the_engine_knows_nothing_of_links_processes_or_the_swarm():
    forbidden = [f"swarmd.{name}" for name in ("discovery", "transport", "node.api", "node.cli", "node.cluster")]
    wrong = [
        str(found)
        for module in sources()
        if inside(module, "swarmd.node.engine")
        for found in imports(module)
        if inside(found.module, *forbidden, "swarmd.node.serving", "asyncio")
    ]
    assert wrong == []


def test_http_sees_the_token_stream_and_neither_engines_nor_links():
    forbidden = ("swarmd.node.engine", "swarmd.transport", "swarmd.discovery.mdns", "swarmd.node.daemon")
    wrong = [
        str(found)
        for module in sources()
        if inside(module, "swarmd.node.api")
        for found in imports(module)
        if inside(found.module, *forbidden) and found.module != "swarmd.node.engine.sampling_params"
    ]
    assert wrong == []


def dialect(module: str) -> str | None:
    name = module.rpartition(".")[2]
    return next((d for d in DIALECTS if inside(module, "swarmd.node.api") and name.partition("_")[0] == d), None)


def test_dialects_do_not_import_each_other():
    assert dialect("swarmd.node.api.openai_schema") == "openai"
    wrong = [
        str(found)
        for module in sources()
        for found in imports(module)
        if dialect(module) and dialect(found.module) not in (None, dialect(module))
    ]
    assert wrong == []


def test_nothing_imports_the_command_line_and_only_it_and_the_public_view_the_daemon():
    wrong = [
        str(found)
        for found in all_imports()
        if not found.file.startswith("node/cli/")
        and (
            inside(found.module, "swarmd.node.cli")
            or (inside(found.module, "swarmd.node.daemon") and found.file != "node/public_view.py")
        )
    ]
    assert wrong == []


def test_only_the_daemon_and_the_main_of_a_stage_build_concrete_parts():
    built: dict[str, set[str]] = {}
    for file, tree in sources().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                made = node.func.value if isinstance(node.func, ast.Attribute) else node.func
                if isinstance(made, ast.Name) and made.id in ADAPTERS:
                    built.setdefault(file, set()).add(made.id)
    assert built.keys() == WIRING, built
    assert set().union(*built.values()) == ADAPTERS, "the list of adapters names one that is not there"


def test_bytes_of_peers_are_never_unpickled():
    wrong = [str(found) for found in all_imports() if found.module in ("pickle", "marshal", "shelve", "dill")]
    assert wrong == []
