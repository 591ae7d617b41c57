"""The documents stay true: their links lead somewhere, and the commands that they show exist."""

from __future__ import annotations

import ast
import itertools
import json
import re
import shlex
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import pytest
import typer.main
from aiohttp import web

from swarmd.node.api import openai, pages, swarm
from swarmd.node.api.openai_schema import ChatRequest, parse
from swarmd.node.cli.app import app
from swarmd.node.engine.constraint import check_schema
from swarmd.node.options import OPTIONS, environment_name, flag_name

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
README = ROOT / "README.md"

_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.*)$", re.MULTILINE)
_VARIABLE = re.compile(r"\bSWARMD_[A-Z_]+\b")
_SHELL = ("sh", "bash", "console")
# Not options of a node: the token of `swarmd join`, what the tests read, and two names that stand for all.
_OTHER_VARIABLES = {
    *("SWARMD_PROFILE", "SWARMD_TOKEN", "SWARMD_NAME_OF_OPTION", "SWARMD_SOME_NAME"),
    *("SWARMD_TEST_MODEL", "SWARMD_TEST_MLX"),
}


class Block(NamedTuple):
    """A fenced block of a document."""

    language: str
    text: str


def text_of(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def prose_of(document: Path) -> str:
    return _FENCE.sub("", text_of(document))


def blocks_of(document: Path) -> list[Block]:
    return [Block(language, text) for _, language, text in _FENCE.findall(text_of(document))]


def commands_of(document: Path) -> Iterator[list[str]]:
    """The words of every shell command that a document shows, in blocks and between backquotes."""
    for block in blocks_of(document):
        if block.language in _SHELL:
            yield from (words for line in _whole_lines(block.text) if (words := _words(line)))
    for code in _INLINE.findall(prose_of(document)):
        if code.split()[0] in ("swarmd", ".venv/bin/swarmd", "make"):
            yield _words(code)


def _whole_lines(text: str) -> Iterator[str]:
    """Lines, those that a quotation mark or a backslash continues joined."""
    held = ""
    for line in text.splitlines():
        held = f"{held}\n{line}" if held else line
        try:
            shlex.split(held, comments=True)
        except ValueError:
            continue
        yield held
        held = ""
    assert not held, f"an unfinished command: {held}"


def _words(line: str) -> list[str]:
    """A command's words, without the variables set before it and the redirections and commands that follow."""
    words = shlex.split(line, comments=True)
    words = list(itertools.takewhile(lambda word: word not in ("<", ">", "|", "&", "&&", ";"), words))
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    return words


def anchor(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def named(document: Path) -> str:
    return str(document.relative_to(ROOT))


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_links_lead_somewhere(document: Path) -> None:
    for target in _LINK.findall(prose_of(document)):
        parts = urlsplit(target)
        if parts.scheme:
            continue
        file = (document.parent / parts.path).resolve() if parts.path else document
        assert file.exists(), f"{target} does not exist"
        assert file.is_relative_to(ROOT), f"{target} leads out of the project"
        if parts.fragment:
            anchors = [anchor(heading) for heading in _HEADING.findall(prose_of(file))]
            assert parts.fragment in anchors, f"{target}: {file.name} has no such heading"


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_files_of_the_project_exist(document: Path) -> None:
    """A path of a file between backquotes, beginning with a folder of the root."""
    for code in _INLINE.findall(prose_of(document)):
        if re.fullmatch(r"(bench|dashboard|discovery|docs|node|partition|tests|transport)/[\w/]+\.\w+", code):
            assert (ROOT / code).is_file(), f"there is no {code}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_swarmd_commands_exist(document: Path) -> None:
    """Every `swarmd ...` has a known subcommand, known options, and values for those that want one."""
    for words in commands_of(document):
        if words[0].removeprefix(".venv/bin/") == "swarmd":
            check_swarmd(words[1:])


def check_swarmd(words: list[str]) -> None:
    shown = f"swarmd {' '.join(words)}"
    command = group = typer.main.get_command(app)
    arguments = 0
    rest = iter(words)
    for word in rest:
        if word.startswith("-") and word != "-":
            flag = next((p for p in command.params if word in [*p.opts, *p.secondary_opts]), None)
            assert flag is not None or word == "--help", f"{shown}: there is no {word} here"
            if flag is not None and not getattr(flag, "is_flag", False):
                assert next(rest, None) is not None, f"{shown}: {word} wants a value"
        elif command is group:
            subcommands = getattr(group, "commands")  # noqa: B009 - click's group, by whatever name typer has it
            assert word in subcommands or word == "...", f"{shown}: there is no command {word}"
            command = subcommands.get(word, group)
        else:
            arguments += 1
    taken = sum(1 for p in command.params if p.param_type_name == "argument")
    assert arguments <= taken, f"{shown}: {arguments} arguments, {taken} are taken"


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_make_targets_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    for words in commands_of(document):
        if words[0] == "make":
            asked = [word for word in words[1:] if "=" not in word]
            assert set(asked) <= targets, f"{' '.join(words)}: there is no such target"
            for value in (word.removeprefix("ARGS=") for word in words if word.startswith("ARGS=") and "run" in asked):
                check_swarmd(shlex.split(value))


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_options_and_variables_exist(document: Path) -> None:
    """An option between backquotes is one of a command; a SWARMD_ variable is an option's, or one of a known few."""
    group = typer.main.get_command(app)
    commands = [group, *getattr(group, "commands").values()]  # noqa: B009
    flags = {flag for command in commands for p in command.params for flag in [*p.opts, *p.secondary_opts]}
    for code in _INLINE.findall(prose_of(document)):
        if code.startswith("--"):
            assert code.split()[0] in flags | {"--help"}, f"there is no option {code}"
    variables = {environment_name(option) for option in OPTIONS} | _OTHER_VARIABLES
    unknown = set(_VARIABLE.findall(text_of(document))) - variables
    assert not unknown, f"no such variables: {unknown}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_blocks_are_what_they_say(document: Path) -> None:
    for block in blocks_of(document):
        if block.language == "python":
            ast.parse(textwrap.dedent(block.text))
        elif block.language == "json":
            json.loads(block.text)
        elif block.language == "toml":
            assert set(tomllib.loads(block.text)) <= set(OPTIONS)


def test_readme_names_the_two_commands() -> None:
    shown = [words for words in commands_of(README) if words[0] == "make"]
    assert ["make", "run"] in shown
    assert ["make", "test"] in shown


def test_readme_curls_are_requests_that_the_endpoint_takes() -> None:
    curls = [words for words in commands_of(README) if words[0] == "curl"]
    assert curls
    for words in curls:
        asked = parse(words[words.index("-d") + 1].encode(), ChatRequest)
        assert asked.model in text_of(ROOT / "node" / "options.py")
        if schema := asked.generation().sampling.json_schema:
            check_schema(schema)
    application = web.Application()
    for part in (openai, swarm, pages):
        part.add_routes(application)
    routes = {(route.method, route.resource.canonical) for route in application.router.routes() if route.resource}
    assert {("POST", urlsplit(words[1]).path) for words in curls} <= routes


def test_readme_options_are_described_where_all_are() -> None:
    """The short table's options are a part of the whole list."""
    shown = set(re.findall(r"^\| `(--[a-z-]+)", text_of(README), re.MULTILINE))
    assert shown
    assert shown <= {flag_name(option) for option in OPTIONS}
