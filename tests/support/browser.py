"""A real browser for tests: Debian's Chromium, driven by playwright."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from swarmd.dashboard.assets import static_dir

if TYPE_CHECKING:
    from playwright.async_api import Page, Playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
STATIC = static_dir()
FLAGS = [
    "--no-sandbox",
    "--headless",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

NEEDS_BROWSER = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
    pytest.mark.skipif(STATIC is None, reason="the web page was not built: pip install -e ."),
]


async def new_page(driver: Playwright) -> Page:
    """A page that has not yet gone anywhere; its browser ends with the driver."""
    browser = await driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
    page = await browser.new_page(viewport={"width": 1280, "height": 900}, reduced_motion="reduce")
    page.set_default_timeout(10_000)
    return page
