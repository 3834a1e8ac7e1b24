"""The curves in docs/results are drawn from the numbers beside them, and drawing them again gives the same files."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from places import ROOT

RESULTS = ROOT / "docs" / "results"
GRIDS = sorted(path.parent.relative_to(RESULTS).as_posix() for path in RESULTS.glob("**/results.json"))
MATPLOTLIBS_OWN = re.compile(r"(\w+tick|text|patch|line2d|axes|figure|legend|matplotlib\.axis)_\d+")
SVG = "{http://www.w3.org/2000/svg}"
PINNED = re.search(r"^matplotlib==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


def points(element: ElementTree.Element) -> np.ndarray:
    """(K, 2) the corners of the first path below an element, in units of the picture."""
    found = element.find(f".//{SVG}path")
    assert found is not None
    return np.array(re.findall(r"[ML] (\S+) (\S+)", found.attrib["d"]), dtype=float)


def scale(drawn: dict[str, ElementTree.Element], axis: str, column: int) -> np.ndarray:
    """Slope and offset from a place in the picture to a number, by the labels of an axis."""
    ticks = [element for name, element in drawn.items() if name.startswith(f"{axis}tick_")]
    places = [points(tick)[0, column] for tick in ticks]
    labels = ["".join(tick.find(f".//{SVG}text").itertext()).replace(",", "").replace("\N{MINUS SIGN}", "-") for tick in ticks]
    return np.polyfit(places, [float(label) for label in labels], 1)


def curves(path: Path) -> dict[str, np.ndarray]:
    """By name, the (joint actions, reward) points of each line of a picture."""
    drawn = {g.attrib["id"]: g for g in ElementTree.parse(path).iter(f"{SVG}g") if "id" in g.attrib}
    scales = scale(drawn, "x", 0), scale(drawn, "y", 1)
    names = [name for name in drawn if not MATPLOTLIBS_OWN.fullmatch(name)]
    return {name: np.stack([np.polyval(s, points(drawn[name])[:, i]) for i, s in enumerate(scales)], 1) for name in names}


@pytest.mark.parametrize("grid", GRIDS)
def test_a_picture_shows_the_numbers_beside_it(grid: str) -> None:
    """Every seed's curve and every method's mean, read back from the picture by the labels of its axes."""
    written = json.loads((RESULTS / grid / "results.json").read_text())
    for task, found in written["tasks"].items():
        shown = curves(RESULTS / grid / f"curves-{task}.svg")
        runs = [run for run in written["runs"] if run["task"] == task]
        rates = {method: line["learning_rate"] for method, line in found["methods"].items()}
        kept = [run for run in runs if run["learning_rate"] == rates[run["method"]]]
        everything = np.concatenate(list(shown.values()))
        near = 1e-4 * np.ptp(everything, axis=0)
        names = set()
        for method in rates:
            seeds = {run["seed"]: np.array(run["curve"], dtype=float) for run in kept if run["method"] == method}
            at = np.unique(np.concatenate([curve[:, 0] for curve in seeds.values()]))
            at = at[at <= min(curve[-1, 0] for curve in seeds.values())]
            mean = np.stack([at, np.mean([np.interp(at, *curve.T) for curve in seeds.values()], axis=0)], 1)
            names.add(method)
            if len(mean) == 1:  # not trained: a level line
                assert (abs(shown[method] - mean)[:, 1] < near[1]).all()
                continue
            assert (abs(shown[method] - mean) < near).all()
            for seed, curve in seeds.items():
                names.add(f"{method}/seed{seed}")
                assert (abs(shown[f"{method}/seed{seed}"] - curve) < near).all()
        assert set(shown) == names


@pytest.mark.skipif(PINNED is None or matplotlib.__version__ != PINNED[1], reason="another version of matplotlib draws it")
@pytest.mark.parametrize("grid", GRIDS)
def test_drawing_a_picture_again_gives_the_same_file(grid: str, tmp_path: Path) -> None:
    draw = runpy.run_path(str(RESULTS / "draw.py"))["draw"]
    drawn = draw(RESULTS / grid / "results.json", tmp_path)
    assert {path.name for path in drawn} == {path.name for path in (RESULTS / grid).glob("curves-*")}
    for path in drawn:
        assert path.read_bytes() == (RESULTS / grid / path.name).read_bytes()
