"""An extension of griffe: `Returns: ...`, `Raises: ...` and `Source: ...` on one line are a paragraph of their own."""

from __future__ import annotations

import re
from typing import Any

import griffe

LINE = re.compile(r"^(Args|Example|Raises|Returns|Source): (?=\S)", re.MULTILINE)


class OneLine(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = LINE.sub(r"\n**\1:** ", obj.docstring.value)
