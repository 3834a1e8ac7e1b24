"""The one console that tables and messages are printed on: what others wrote is shown, never obeyed."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from collm.types import printable


class Screen(Console):
    """A rich console on which no text is markup, and control characters of a text do not reach the terminal."""

    def __init__(self, **options: Any):
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)
