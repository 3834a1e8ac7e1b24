"""The code blocks of the Markdown pages."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

from places import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(
    r"(?:<!-- not run: ([^\n]+) -->\n)?(?:Save this as `(\S+)`:\n\n)?^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE
)


class Block(NamedTuple):
    why: str
    """Why no test runs it; "" where one does."""
    file: str
    """The file that it is saved as, or ""."""
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = [Block(*match) for match in BLOCK.findall(text)]
    assert text.count("```") == 2 * len(found), f"{page.name} has a block that cannot be read"
    return found


def script(page: Path) -> str:
    """A page as one terminal session: files are saved, commands and Python run in order; it stops at the first failure."""
    lines = ["set -euo pipefail", "trap 'kill $(jobs -p) 2> /dev/null || true' EXIT"]
    for why, file, language, text in blocks(page):
        if why:
            continue
        if file:
            lines.append(f"cat > {shlex.quote(file)} <<'END_OF_BLOCK'\n{text}END_OF_BLOCK")
        elif language == "python":
            lines.append(f"python - <<'END_OF_BLOCK'\n{text}END_OF_BLOCK")
        else:
            assert language == "sh", f"{page.name}: a block of {language!r} is neither saved nor run"
            lines.append(text)
    return "\n".join(lines)
