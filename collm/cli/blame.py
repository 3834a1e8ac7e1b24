"""`collm blame`."""

from __future__ import annotations

import argparse
import json
import sys

from collm.errors import ConfigError
from collm.reports.screen import Screen
from collm.reports.tables import WIDTH, blame_table
from collm.runs.open import open_run
from collm.studies.blame import blame


def run(arguments: argparse.Namespace) -> int:
    if arguments.credit_only and arguments.resample:
        raise ConfigError("--credit-only makes no environment, and --resample plays on in one. Leave out one of them.")
    opened = open_run(arguments.run, overrides=arguments.overrides)
    with Screen(stderr=True).status("replaying the failed episodes"):
        found = blame(
            opened,
            below=arguments.below,
            last=arguments.last,
            replay=not arguments.credit_only,
            resamples=arguments.resample,
            overrides=arguments.overrides,
        )
    if arguments.json:
        print(json.dumps({"run": str(opened.folder), **found.plain()}, allow_nan=False))
        return 0
    Screen(width=None if sys.stdout.isatty() else WIDTH).print(blame_table(opened.name, found))
    return 0
