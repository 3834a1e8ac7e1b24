"""The console for tables and messages. Text from elsewhere is printed literally: no markup, no control characters."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from collm.types import printable


class Screen(Console):
    """A rich console that does not interpret markup and that escapes control characters."""

    def __init__(self, **options: Any):
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)
