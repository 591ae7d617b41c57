"""The web page in a real browser, against a fake of the API (tests/support/fake_api.py)."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest
from support.browser import NEEDS_BROWSER, STATIC, new_page
from support.fake_api import FakeApi
from support.swarm_states import lone_node, replanned_without_kitchen, two_stages

if TYPE_CHECKING:
    from playwright.async_api import Page

playwright = pytest.importorskip("playwright.async_api", reason="the browser tests need the package playwright")
expect = playwright.expect

pytestmark = NEEDS_BROWSER


@pytest.fixture
async def api() -> AsyncIterator[FakeApi]:
    assert STATIC is not None
    async with FakeApi(STATIC, two_stages()) as fake:
        yield fake


@pytest.fixture
async def page(api: FakeApi) -> AsyncIterator[Page]:
    """A page that has not yet gone anywhere."""
    async with playwright.async_playwright() as driver:
        yield await new_page(driver)


@pytest.fixture
def complaints(page: Page) -> list[str]:
    """Console errors and warnings (breaches of the page's policy among them) and uncaught exceptions."""
    found: list[str] = []
    page.on(
        "console",
        lambda message: found.append(message.text) if message.type in ("error", "warning") else None,
    )
    page.on("pageerror", lambda error: found.append(str(error)))
    return found


@pytest.fixture
def asked_for(page: Page) -> list[str]:
    """Every URL that the page asked for."""
    urls: list[str] = []
    page.on("request", lambda request: urls.append(request.url))
    return urls


async def ask(page: Page, question: str) -> None:
    await page.get_by_label("Message").fill(question)
    await page.get_by_label("Message").press("Enter")


async def test_nodes_and_stages_are_drawn_from_the_feed(api, page, complaints, asked_for) -> None:
    response = await page.goto(api.url)
    assert "default-src 'none'; script-src 'self'" in response.headers["content-security-policy"]
    instance = page.get_by_role("region", name="smollm2:135m")
    stages = instance.locator(".stage")
    await expect(stages).to_have_count(2)
    await expect(stages.nth(0)).to_contain_text(re.compile(r"attic.*layers 0–19.*driver.*20 layers.*68\.0 MB", re.S))
    await expect(stages.nth(0)).to_contain_text("68.0 MB of 600 MB · 8.0 GB in all")
    await expect(stages.nth(1)).to_contain_text(re.compile(r"kitchen.*layers 20–29", re.S))
    await expect(stages.nth(1)).not_to_contain_text("driver")
    await expect(instance).to_contain_text("epoch 1")
    await expect(page.locator(".node")).to_contain_text(re.compile(r"laptop.*left out: 20\.0 MB", re.S))
    await expect(page.get_by_role("status")).to_have_text("Live")
    assert complaints == []
    assert {url for url in asked_for if not url.startswith(api.url)} == set()


async def test_the_picture_follows_the_swarm_without_a_reload(api, page, complaints, asked_for) -> None:
    await page.goto(api.url)
    await expect(page.locator(".stage")).to_have_count(2)
    api.publish(replanned_without_kitchen())
    await expect(page.locator(".stage")).to_have_count(1)
    await expect(page.locator(".instance")).to_contain_text("epoch 2")
    await expect(page.locator(".stage")).to_contain_text("layers 0–29")
    await expect(page.locator(".node", has_text="kitchen")).to_contain_text(re.compile(r"gone.*seen \d+ s ago", re.S))
    api.send(
        "progress",
        {"model": "big:1b", "phase": "download", "done_bytes": 25_000_000, "total_bytes": 100_000_000},
    )
    await expect(page.get_by_label("big:1b: download")).to_have_attribute("value", "0.25")
    assert asked_for.count(api.url) == 1, "the page was loaded more than once"
    assert complaints == []


async def test_a_lone_node_is_told_how_to_add_the_next_machine(api, page, complaints) -> None:
    api.swarm = lone_node()
    await page.goto(api.url)
    steps = page.get_by_role("region", name="Add the next machine")
    await expect(steps).to_contain_text(re.compile("swarmd token.*swarmd join TOKEN", re.S))
    await expect(page.get_by_role("region", name="Chat")).to_contain_text("opens when a model is being served")
    assert complaints == []


async def test_an_unreachable_node_is_said_and_found_again(api, page) -> None:
    await page.goto(api.url)
    await expect(page.get_by_role("status")).to_have_text("Live")
    await api.stop()
    await expect(page.get_by_text("This node cannot be reached.")).to_be_visible()
    await expect(page.locator(".stage")).to_have_count(2)
    api.swarm = replanned_without_kitchen()
    await api.start()
    await expect(page.get_by_role("status")).to_have_text("Live")
    await expect(page.locator(".stage")).to_have_count(1)
    await expect(page.get_by_text("This node cannot be reached.")).to_have_count(0)


async def test_an_answer_streams_and_the_conversation_goes_on(api, page, complaints) -> None:
    usage = {"choices": [], "usage": {"completion_tokens": 7}}
    api.answer_pieces = ["The capital of France ", "is <b>Paris</b>.", usage]
    api.hold.clear()
    await page.goto(api.url)
    await expect(page.get_by_role("combobox", name="Model")).to_have_value("smollm2:135m")
    await ask(page, "What is the capital of France?")
    answer = page.get_by_role("article", name="smollm2:135m")
    await expect(answer).to_contain_text("The capital of France is <b>Paris</b>.")
    await expect(page.get_by_role("button", name="Stop")).to_be_visible()
    api.hold.set()
    await expect(page.get_by_role("button", name="Send")).to_be_visible()
    await expect(answer).to_contain_text(re.compile(r"first token \d.*7 tokens", re.S))

    await page.get_by_label("Message").fill("And")
    await page.get_by_label("Message").press("Shift+Enter")
    await page.keyboard.type("of Italy?")
    await page.keyboard.press("Enter")
    await expect(answer).to_have_count(2)
    assert api.requests[-1]["messages"] == [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "The capital of France is <b>Paris</b>."},
        {"role": "user", "content": "And\nof Italy?"},
    ]
    assert api.requests[-1]["stream"] is True
    assert complaints == []


async def test_stop_ends_the_answer_and_keeps_what_was_said(api, page, complaints) -> None:
    api.answer_pieces = ["One, two"]
    api.hold.clear()
    await page.goto(api.url)
    await ask(page, "Count.")
    answer = page.get_by_role("article", name="smollm2:135m")
    await expect(answer).to_contain_text("One, two")
    await page.get_by_role("button", name="Stop").click()
    await expect(answer).to_contain_text("Stopped.")
    await expect(page.get_by_role("button", name="Send")).to_be_visible()
    await api.client_left.wait()
    assert complaints == []


async def test_an_error_in_mid_answer_is_shown_and_can_be_tried_again(api, page, complaints) -> None:
    api.answer_pieces = ["Half an", {"error": {"message": "the node kitchen was lost", "code": "node_lost"}}]
    await page.goto(api.url)
    await ask(page, "Hello?")
    answer = page.get_by_role("article", name="smollm2:135m")
    await expect(answer).to_contain_text("Half an")
    await expect(answer.get_by_role("alert")).to_have_text("the node kitchen was lost")
    api.answer_pieces = ["Whole."]
    await answer.get_by_role("button", name="Try again").click()
    await expect(answer).to_contain_text("Whole.")
    await expect(answer.get_by_role("alert")).to_have_count(0)
    assert [request["messages"] for request in api.requests] == [[{"role": "user", "content": "Hello?"}]] * 2
    assert complaints == []


async def test_an_api_key_is_asked_for_and_kept_for_the_tab(api, page) -> None:
    api.api_key = "right-key"
    await page.goto(api.url)
    dialog = page.get_by_role("dialog", name="API key")
    await dialog.get_by_label("Key", exact=True).fill("wrong-key")
    await page.keyboard.press("Enter")
    await expect(dialog.get_by_role("alert")).to_have_text("The node did not accept that key.")
    await dialog.get_by_label("Key", exact=True).fill("right-key")
    await page.keyboard.press("Enter")
    await expect(page.locator(".stage")).to_have_count(2)
    await expect(page.get_by_role("combobox", name="Model")).to_have_value("smollm2:135m")
    await page.reload()
    await expect(page.locator(".stage")).to_have_count(2)


@pytest.mark.parametrize("width", [320, 768, 1600])
async def test_nothing_is_cut_off_at_any_width(api, page, width: int) -> None:
    await page.set_viewport_size({"width": width, "height": 800})
    await page.goto(api.url)
    await expect(page.locator(".stage")).to_have_count(2)
    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert await page.evaluate(overflow) == 0
    cut = "cards => cards.filter(card => card.scrollHeight > card.clientHeight).length"
    assert await page.locator(".stage").evaluate_all(cut) == 0
