"""The code blocks of the Markdown pages, and terminal sessions that run them."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
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


BEGIN = "set -euo pipefail\ntrap 'kill $(jobs -p) 2> /dev/null || true' EXIT"
"""A terminal session stops at the first failure, and ends what it left running."""


def typed(block: Block) -> str:
    """What saves a block, or runs it, in a terminal session."""
    if block.file:
        return f"cat > {shlex.quote(block.file)} <<'END_OF_BLOCK'\n{block.text}END_OF_BLOCK"
    if block.language == "python":
        return f"python - <<'END_OF_BLOCK'\n{block.text}END_OF_BLOCK"
    assert block.language == "sh", f"a block of {block.language!r} is neither saved nor run"
    return block.text


def run_session(session: str, folder: Path, *, package: Path = ROOT, seconds: float = 1200) -> subprocess.CompletedProcess[str]:
    """Run a terminal session in a folder, with this interpreter's commands and the package that lies in another folder.

    What it started ends with it. Raises subprocess.TimeoutExpired.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    variables = {**os.environ, "PATH": path, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command, pipe = ["bash", "-c", f"{BEGIN}\n{session}"], subprocess.PIPE
    with subprocess.Popen(
        command, cwd=folder, env=variables, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as process:
        try:
            out, errors = process.communicate(timeout=seconds)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, errors)
