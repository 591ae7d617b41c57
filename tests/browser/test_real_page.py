"""The web page of a real daemon in a real browser: a swarm grows before one's eyes, and answers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from support.browser import NEEDS_BROWSER, new_page
from support.swarm import Node, join

playwright = pytest.importorskip("playwright.async_api", reason="the browser tests need the package playwright")
expect = playwright.expect

pytestmark = [*NEEDS_BROWSER, pytest.mark.timeout(240)]


async def test_the_page_shows_the_swarm_grow_and_answers(tmp_path: Path, smollm2_path: Path) -> None:
    with Node(tmp_path / "kitchen", "--model", str(smollm2_path)) as first:
        await asyncio.to_thread(first.until_ready)
        async with playwright.async_playwright() as driver:
            page = await new_page(driver)
            complaints: list[str] = []
            page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
            page.on("pageerror", lambda error: complaints.append(str(error)))
            await page.goto(first.url)
            await expect(page.get_by_text("kitchen").first).to_be_visible()

            await page.get_by_placeholder("Message").fill("What is the capital of France?")
            await page.keyboard.press("Enter")
            # Sampled at the page's temperature, so no word of the answer is certain; that it came to its end is.
            await expect(page.get_by_role("log")).to_contain_text("tokens/s", timeout=60_000)
            await expect(page.get_by_role("log")).not_to_contain_text("error")

            token = await asyncio.to_thread(first.token)
            with join(token, tmp_path / "garage") as second:
                await asyncio.to_thread(second.until_members, 2)
                await expect(page.get_by_text("garage").first).to_be_visible(timeout=20_000)
            assert complaints == []
