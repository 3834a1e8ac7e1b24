"""`collm report`."""

from __future__ import annotations

import argparse
import json
from contextlib import suppress
from pathlib import Path

from collm.errors import ConfigError
from collm.reports.builds import choose, draw_builds, picture
from collm.reports.curves import draw_curves
from collm.reports.live import Live, Server
from collm.reports.page import write_page
from collm.reports.screen import Screen
from collm.reports.tables import comparison_table, runs_table
from collm.runs.files import refuse_links
from collm.runs.open import open_run
from collm.studies.before_after import before_after


def run(arguments: argparse.Namespace) -> int:
    folders = {folder.resolve(): folder for folder in arguments.runs}
    if arguments.watch:
        return watch(list(folders.values()), arguments)
    if arguments.port is not None:
        raise ConfigError(f"--port {arguments.port} is the port of --watch; give both, or neither.")
    comparisons = [before_after(open_run(folder)) for folder in folders.values()]
    console = Screen(quiet=arguments.json)
    if not console.is_terminal:
        console.width = 160
    wide = console.width >= 120
    digits = 3 if wide else 2
    reports = []
    for comparison in comparisons:
        run, folder = comparison.run, comparison.run.folder / "report"
        refuse_links(run.folder)
        console.print(comparison_table(comparison, digits))
        console.print()
        files = [draw_curves([run], folder / "curves.png")]
        gallery = choose(comparison.before, comparison.after)
        if gallery is not None:
            title = f"{run.name}: {comparison.labels[0]} (above) and {comparison.labels[1]} (below)"
            files.append(draw_builds(gallery, title, folder / "builds.png"))
            if len(comparisons) == 1:
                console.print(picture(gallery, console.width))
                console.print()
        _name(console, files)
        reports.append({**comparison.plain(), "files": [str(path) for path in files]})
    runs = [comparison.run for comparison in comparisons]
    together = [write_page(runs, runs[0].folder / "report" / ("report.html" if len(runs) == 1 else "report-of-runs.html"))]
    if len(runs) > 1:
        together += [draw_curves(runs, runs[0].folder / "report" / "curves-of-runs.png")]
        console.print(runs_table(comparisons, digits, 3 if wide else 2))
        console.print()
    _name(console, together)
    if arguments.json:
        print(json.dumps({"runs": reports, "files": [str(path) for path in together]}, allow_nan=False))
    return 0


def watch(folders: list[Path], arguments: argparse.Namespace) -> int:
    """Serve the report page until Ctrl-C."""
    if arguments.json:
        raise ConfigError("--json prints one object, and --watch follows runs; leave one out.")
    live = Live(folders)
    with suppress(KeyboardInterrupt), Server(live, arguments.port or 0) as server:
        for run in live.changes(0)["runs"]:
            if run["trouble"]:
                Screen().print(run["trouble"], soft_wrap=True)
        Screen().print(f"Following {', '.join(map(str, folders))} until Ctrl-C: {server.url}", soft_wrap=True)
        server.serve_forever()
    print("The report has stopped.", flush=True)
    return 0


def _name(console: Screen, files: list[Path]) -> None:
    """Print the paths of the written files, one per line, without line breaks inside a path."""
    for path in files:
        console.print(f"wrote {path}", soft_wrap=True, markup=False)
    console.print()
