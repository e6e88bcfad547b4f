"""
Fixtures that run Chromium through Playwright.

`tests/conftest.py` imports the fixtures `browser` and `page` from this module.
"""

from __future__ import annotations

import re
import shutil
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import pytest

from tests.project.tasks import LIMIT
from tests.support.programs import require

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from playwright.async_api import Browser, ConsoleMessage, Error, Page

PROGRAMS = ("chromium", "google-chrome", "chromium-browser")

ARGUMENTS = (
    "--no-sandbox",  # Chromium needs this as root, as in containers.
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

# Depending on the order of fixtures, a server may stop before the page; its requests then fail.
ALWAYS_ALLOWED = re.compile("net::ERR_(CONNECTION|EMPTY|INCOMPLETE|SOCKET)_")

# Resolves with the received events when the browser closes the EventSource and stops reconnecting.
RECEIVE_EVENTS = """(url) => new Promise((resolve) => {
  const seen = (window.seen = []);
  const source = new EventSource(url);
  const note = (event) => seen.push([event.type, JSON.parse(event.data).sequence]);
  for (const kind of ["enqueued", "started", "progress", "finished", "unknown"]) {
    source.addEventListener(kind, note);
  }
  source.onerror = () => source.readyState === EventSource.CLOSED && resolve(seen);
})"""

_allowed: WeakKeyDictionary[Page, list[re.Pattern[str]]] = WeakKeyDictionary()


def allow_errors(page: Page, pattern: str) -> None:
    """
    Make the fixture `page` accept console errors and exceptions of this page that match `pattern`.
    """
    _allowed.setdefault(page, []).append(re.compile(pattern))


def _chromium() -> str:
    found = (path for program in PROGRAMS if (path := shutil.which(program)))
    return require(next(found, None), f"a browser ({', '.join(PROGRAMS)})")


@pytest.fixture(scope="session")
async def browser() -> AsyncIterator[Browser]:
    # Imported here, so that the tests without a browser run without Playwright.
    from playwright.async_api import async_playwright, expect

    executable = _chromium()
    expect.set_options(timeout=LIMIT * 1000)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=executable, args=ARGUMENTS, headless=True
        )
        yield browser
        await browser.close()


@pytest.fixture
async def page(browser: Browser) -> AsyncIterator[Page]:
    """
    Return a page with its own cookies and storage; fail the test if the page logs unexpected
    errors.
    """
    context = await browser.new_context()
    page = await context.new_page()
    errors: list[str] = []

    def on_console(message: ConsoleMessage) -> None:
        if message.type == "error":
            errors.append(message.text)

    def on_page_error(error: Error) -> None:
        errors.append(str(error))

    page.on("console", on_console)
    page.on("pageerror", on_page_error)
    yield page
    allowed = [ALWAYS_ALLOWED, *_allowed.pop(page, [])]
    await context.close()
    unexpected = [e for e in errors if not any(pattern.search(e) for pattern in allowed)]
    assert not unexpected, f"errors in the page: {unexpected}"
