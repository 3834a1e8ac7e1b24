"""One browser for all tests of the report page."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from browsing import Browser, opened


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with opened() as found:
        yield found
