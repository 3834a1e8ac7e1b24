"""Where the checkout and the public data are. Set COLLM_DATA to a folder of public data that is not at ../shared/data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("COLLM_DATA") or ROOT.parent / "shared" / "data")


def public_data(path: str) -> Path:
    """A file or folder of the public data; the test is skipped, naming it, where it is missing."""
    if not (found := DATA / path).exists():
        pytest.skip(f"no public data at {found}: set COLLM_DATA to the folder that holds {path}")
    return found


def needs(path: str) -> pytest.MarkDecorator:
    """A mark that skips a test, naming what is missing, where the public data have no such file or folder."""
    found = DATA / path
    return pytest.mark.skipif(
        not found.exists(), reason=f"no public data at {found}: set COLLM_DATA to the folder that holds it"
    )
