"""One browser for all tests of the report page."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from browsing import Browser, opened


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    with opened() as found:
        yield found


@pytest.fixture
def browser(chromium: Browser) -> Browser:
    """The browser at an empty page, without messages of the test before."""
    chromium.call("/url", {"url": "about:blank"})
    chromium.console()
    return chromium
