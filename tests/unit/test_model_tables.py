"""docs/models.md: nothing that the readers know is forgotten, and its tables say what the tests noted."""

from __future__ import annotations

import json
from pathlib import Path
from xml.sax.saxutils import quoteattr

import pytest
from model_tables import BEGIN, END, PAGE, TESTS, Tables, Unusable, read_notes, with_tables

from swarmd.node.engine.quantized import BITS
from swarmd.node.models import gguf_families, hf_families
from swarmd.node.models.gguf_types import GGUFType
from swarmd.node.models.hf_quantized import METHODS

ROOT = PAGE.parents[1]
NOTES = [
    {"table": "folder", "row": "llama", "column": "native", "verdict": "works", "case": "plain", "delta": 3e-4},
    {"table": "folder", "row": "llama", "column": "native", "verdict": "works", "case": "biases", "delta": 5e-4},
    {"table": "folder", "row": "llama", "column": "mlx", "verdict": "not run", "words": "MLX is not | installed"},
    {"table": "gguf types", "row": "Q4_K", "column": "torch", "verdict": "works", "delta": 1e-6, "bits": 4.5},
    {
        "table": "refused formats",
        "row": "GGUF type IQ3_S",
        "column": "words",
        "verdict": "refused",
        "words": "tensor 'x' is of type IQ3_S, not supported yet; supported types: Q4_0, Q4_1",
    },
    {"table": "tokenizers", "row": "Unigram", "column": "tokenizer.json", "verdict": "works"},
]


def junit(path: Path, notes: list[dict[str, object]], more: str = "") -> Path:
    """A JUnit file of one test that noted these things."""
    properties = "".join(f'<property name="proves" value={quoteattr(json.dumps(note))}/>' for note in notes)
    case = f'<testcase name="t"><properties>{properties}</properties>{more}</testcase>'
    path.write_text(f"<testsuites><testsuite>{case}</testsuite></testsuites>")
    return path


def line_of(text: str, begin: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(begin))


def test_cells_say_what_was_noted(tmp_path: Path) -> None:
    made = Tables(read_notes(junit(tmp_path / "r.xml", NOTES))).render()
    llama = line_of(made, "| `llama`: ")
    assert [cell.strip() for cell in llama.split(" | ")][1:] == [
        "works in 2 forms, 5e-04",
        "no test",
        "not run (1)",
        "no test |",
    ]
    assert "1. MLX is not \\| installed" in made
    assert "| `Q4_K` | 4.5 | no test | works, 1e-06 | no test |" in made
    assert "| `IQ3_S` |  | refused (2) |" in made
    assert "2. tensor 'x' is of type …, not supported yet; supported: …" in made
    assert "| `Unigram` | no test | works |" in made


@pytest.mark.parametrize("what", ["failure", "error"])
def test_a_failed_test_leaves_the_page_alone(what: str, tmp_path: Path) -> None:
    with pytest.raises(Unusable, match="t failed"):
        read_notes(junit(tmp_path / "r.xml", NOTES, f"<{what}/>"))


def test_no_notes_are_no_page(tmp_path: Path) -> None:
    with pytest.raises(Unusable, match="nothing"):
        read_notes(junit(tmp_path / "r.xml", []))


def test_only_what_is_between_the_markers_is_replaced() -> None:
    assert with_tables(f"a\n{BEGIN}\nold\n{END}\nb", "new") == f"a\n{BEGIN}\n\nnew\n\n{END}\nb"
    with pytest.raises(Unusable, match="markers"):
        with_tables("a", "new")


def test_the_tests_that_it_runs_exist() -> None:
    assert all((ROOT / name.partition("::")[0]).is_file() for name in TESTS)


def test_nothing_that_the_readers_know_is_forgotten() -> None:
    """`make models` brings the page up to date."""
    page = PAGE.read_text(encoding="utf-8")
    for title, names in {
        "### Folders, by": [*hf_families.FAMILIES, *hf_families.WRAPPERS],
        "### GGUF files, by": gguf_families.FAMILIES,
        "### Types of tensors": [kind.name for kind in GGUFType],
        "### Formats of folders": [*METHODS, *(f"MLX {bits} bits" for bits in BITS), "MLX mxfp4"],
    }.items():
        section = page.partition(title)[2].partition("\n### ")[0]
        missing = [name for name in names if f"`{name}" not in section]
        assert not missing, f"docs/models.md lacks {missing} below {title!r}; run: make models"
        assert "works" in section
