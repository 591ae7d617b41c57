"""The tables of docs/models.md, from what the tests noted: `python bench/model_tables.py [JUNIT_FILE]`.

Without a file it runs the tests that note something (`proves` in tests/conftest.py) and reads their JUnit file. If any
of them failed, the page stays as it was.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from figures import markdown_table

from swarmd.node.engine.gguf_blocks import DENSE_TYPES, QUANTIZED_FORMS
from swarmd.node.engine.quantized import BITS
from swarmd.node.models import gguf_families, hf_families
from swarmd.node.models.gguf_types import GGUFType
from swarmd.node.models.hf_quantized import METHODS

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "models.md"
TESTS = [
    f"tests/unit/{name}.py"
    for name in (
        "test_every_architecture",
        "test_every_format",
        "test_refused_models",
        "test_tokenizer_forms",
        "test_folder_tokenizer",
        "test_sentencepiece_model",
    )
]
TESTS.append("tests/unit/test_hf_quantized.py::test_gptq_with_groups_of_scattered_inputs_is_refused")
BEGIN, END = "<!-- begin: made by `make models`, not by hand -->", "<!-- end -->"
PACKAGES = ("torch", "transformers", "mlx", "gguf", "tokenizers")
DEVICES = {"native": "CPU, our kernels", "torch": "CPU, plain torch", "mlx": "MLX", "cuda": "CUDA"}
TOKENIZER_SOURCES = {"gguf": "GGUF", "tokenizer.json": "`tokenizer.json`", "other": "other files of a folder"}
KNOWN_AS = {
    "llama": "Llama 1 to 3, SmolLM2; in GGUF files also Mistral and Mixtral",
    "mistral3": "Mistral's newer ones",
    "qwen2": "Qwen 2, 2.5",
    "qwen3_moe": "Qwen 3, mixtures",
    "qwen3moe": "Qwen 3, mixtures",
    "gemma3": "Gemma 3, text",
    "gemma3_text": "Gemma 3, text",
    "phi3": "Phi 3, Phi 4",
    "olmo2": "OLMo 2; in GGUF files also OLMo 3",
    "granitemoeshared": "Granite's mixtures with a shared expert",
    "deepseek_v3": "DeepSeek V3, R1",
}
"""Where an architecture's name does not say it."""


class Unusable(Exception):
    """There are no results to make a page of, and why."""


@dataclass(frozen=True)
class Note:
    """What one test showed of one cell; `delta`: logits' largest difference, of their range; `bits` per weight."""

    table: str
    row: str
    column: str
    verdict: str
    words: str = ""
    case: str = ""
    delta: float | None = None
    bits: float | None = None
    device: str = ""


def read_notes(junit: Path) -> list[Note]:
    """Raises Unusable if a test failed, naming the first, or none noted anything."""
    notes: list[Note] = []
    for case in ET.parse(junit).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            raise Unusable(f"{case.get('name')} failed; mend it first")
        found = [item.get("value", "") for item in case.iter("property") if item.get("name") == "proves"]
        notes += [Note(**json.loads(value)) for value in found]
    if not notes:
        raise Unusable(f"{junit} holds nothing that a test noted")
    return notes


class Tables:
    """Renders notes; reasons that are long stand once each below the tables, by number."""

    def __init__(self, notes: Iterable[Note]) -> None:
        self._notes = list(notes)
        self._reasons: list[str] = []

    def render(self) -> str:
        """All tables as Markdown."""
        sections = [
            self._grid("Folders, by `model_type` in config.json", "folder", hf_families.FAMILIES, DEVICES),
            self._wrappers(),
            self._grid("GGUF files, by `general.architecture`", "gguf", gguf_families.FAMILIES, DEVICES),
            self._grid("Types of tensors in GGUF files", "gguf types", self._gguf_types(), DEVICES, bits=True),
            self._grid("Formats of folders", "folder formats", self._folder_formats(), DEVICES, bits=True),
            self._grid("Tokenizers", "tokenizers", self._rows_of("tokenizers"), TOKENIZER_SOURCES),
            self._refused("Architectures that are refused", "refused architectures"),
            self._refused("Formats that are refused", "refused formats"),
            self._refused("Other things that are refused", "refused files"),
        ]
        return "\n\n".join(section for section in [*sections, self._why()] if section)

    def _grid(self, title: str, table: str, rows: Iterable[str], columns: dict[str, str], *, bits: bool = False) -> str:
        head = ["", *(["bits a weight"] if bits else []), *columns.values()]
        lines = []
        for row in rows:
            cells = [self._cell(table, row, column) for column in columns]
            lines.append([_named(row), *([self._bits(table, row)] if bits else []), *cells])
        return f"### {title}\n\n{markdown_table(head, lines)}"

    def _cell(self, table: str, row: str, column: str) -> str:
        notes = [n for n in self._notes if (n.table, n.row, n.column) == (table, row, column)]
        if works := [n for n in notes if n.verdict == "works"]:
            worst = max((n.delta for n in works if n.delta is not None), default=None)
            cases = len({n.case for n in works})
            many = f" in {cases} forms" if cases > 1 else ""
            return f"works{many}" if worst is None else f"works{many}, {worst:.0e}"
        if notes:
            return f"{notes[0].verdict} ({self._number(notes[0].words)})" if notes[0].words else notes[0].verdict
        if table == "gguf types" and (refused := self._note("refused formats", f"GGUF type {row}")):
            return f"refused ({self._number(_brief(refused))})"
        return "no test"

    def _bits(self, table: str, row: str) -> str:
        bits = next((n.bits for n in self._notes if (n.table, n.row) == (table, row) and n.bits), None)
        return "" if bits is None else f"{bits:.4g}"

    def _note(self, table: str, row: str) -> Note | None:
        return next((n for n in self._notes if (n.table, n.row) == (table, row)), None)

    def _number(self, reason: str) -> int:
        if reason not in self._reasons:
            self._reasons.append(reason)
        return self._reasons.index(reason) + 1

    def _rows_of(self, table: str) -> list[str]:
        return list(dict.fromkeys(n.row for n in self._notes if n.table == table))

    def _gguf_types(self) -> list[str]:
        computed = [kind.name for kind in (*DENSE_TYPES, *QUANTIZED_FORMS)]
        return computed + [kind.name for kind in GGUFType if kind.name not in computed]

    def _folder_formats(self) -> list[str]:
        """What was tested, and every method and number of bits that is read and was not."""
        tested = self._rows_of("folder formats")
        known = [*METHODS, *(f"MLX {bits} bits" for bits in BITS)]
        return tested + [name for name in known if not any(row.startswith(name) for row in tested)]

    def _wrappers(self) -> str:
        names = ", ".join(f"`{name}`" for name in hf_families.WRAPPERS)
        return f"{names} (models of text and images) are read as what `text_config` says; images cannot be given."

    def _refused(self, title: str, table: str) -> str:
        """By the words, so that what is refused in the same words stands in one line."""
        by_words: dict[str, list[str]] = {}
        for note in self._notes:
            if note.table == table:
                names = by_words.setdefault(_brief(note), [])
                names += [note.row] if note.row not in names else []
        lines = [[", ".join(names), f"{_cell_text(words)}"] for words, names in by_words.items()]
        return f"### {title}\n\n{markdown_table(['what', 'the words'], lines)}"

    def _why(self) -> str:
        lines = [f"{number}. {_cell_text(reason)}" for number, reason in enumerate(self._reasons, 1)]
        return "### The reasons\n\n" + "\n".join(lines) if lines else ""


def _named(row: str) -> str:
    return f"`{row}`: {KNOWN_AS[row]}" if row in KNOWN_AS else f"`{row}`"


def _brief(note: Note) -> str:
    """The words without what is refused, so that it can be told which are the same, and the list of what is not."""
    words = note.words.replace(repr(note.row), "…").replace(note.row.removeprefix("GGUF type "), "…")
    for begin in ("supported architectures: ", "supported are llama", "supported types: "):
        at = words.find(begin)
        if at >= 0:
            return f"{words[: at + begin.index(' ')].rstrip(':')}: …"
    return words


def _cell_text(words: str) -> str:
    return words.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def facts(notes: Iterable[Note]) -> str:
    """When, of which commit, and with what."""

    def of(package: str) -> str:
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            return f"no {package}"

    from swarmd.node.engine.cpu import bindings

    try:
        kernels = f"kernels for {bindings.isa()}"
    except bindings.NativeMissing:
        kernels = "no kernels"
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    python = f"Python {sys.version_info.major}.{sys.version_info.minor} on {sys.platform}"
    devices = sorted({note.device for note in notes} - {""})
    found = ", ".join([python, kernels, *map(of, PACKAGES)])
    return f"Made on {date.today()} at {commit or 'no commit'}, devices {', '.join(devices)}: {found}.\n"


def with_tables(page: str, made: str) -> str:
    """The page with what is between the markers replaced. Raises Unusable if it has none."""
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise Unusable(f"{PAGE} has no markers {BEGIN} and {END}")
    return f"{head}{BEGIN}\n\n{made}\n\n{END}{tail}"


def run_tests(junit: Path) -> None:
    """Raises Unusable if they failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-o", "junit_family=xunit1", f"--junitxml={junit}", *TESTS]
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        raise Unusable("tests failed; docs/models.md stays as it was")


def main(args: Sequence[str]) -> int:
    """Write the page; the exit code."""
    with tempfile.TemporaryDirectory() as place:
        junit = Path(args[0]) if args else Path(place) / "results.xml"
        try:
            if not args:
                run_tests(junit)
            notes = read_notes(junit)
            made = f"{facts(notes)}\n\n{Tables(notes).render()}"
            PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), made), encoding="utf-8")
        except Unusable as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
