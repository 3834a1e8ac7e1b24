"""docs/results/README.md quotes the grids beside it: its table must say what their results.json says."""

from __future__ import annotations

import json
import runpy
import tomllib
from importlib import import_module
from pathlib import Path
from statistics import median

import pytest
from places import ROOT

from collm.studies.grid import Grid, Study
from collm.studies.intervals import Interval, interval, student
from collm.studies.recipe import read_plan
from collm.studies.result import area_under

RESULTS = ROOT / "docs" / "results"
GRIDS = sorted(path.parent.name for path in RESULTS.glob("*/results.json"))
METHODS = ("grpo", "magrpo", "collm-dc", "td-lambda", "collm-cc")


def shown(found: dict[str, float]) -> str:
    return f"{found['mean']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"


def row(grid: str) -> str:
    """A grid's line of the page: areas of five methods, and what collm-cc has more."""
    ((_, found),) = json.loads((RESULTS / grid / "results.json").read_text())["tasks"].items()
    methods, more = found["methods"], found.get("collm-cc minus", {})
    areas = [f"{methods[name]['area']['mean']:.3f}" if name in methods else "" for name in METHODS]
    seeds = max(len(methods[name]["seeds"]) for name in METHODS if name in methods)
    cells = [f"[{grid}]({grid}/table.txt)", str(seeds), *areas]
    if more:
        cells += [shown(more[name][kind]) for name in ("magrpo", "collm-dc") for kind in ("area", "area, Student's t")]
    else:
        cells += [""] * 4  # not made yet
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("grid", [name for name in GRIDS if name != "critic"])
def test_the_page_says_what_the_grid_says(grid: str) -> None:
    assert row(grid) in (RESULTS / "README.md").read_text()


def ablation(method: str) -> str:
    """A switch's line: area, what collm-cc has more, and the variance within tasks explained before the last turn."""
    found = json.loads((RESULTS / "critic" / "results.json").read_text())["tasks"]["sparse"]
    numbers = found["methods"][method]
    more = found["collm-cc minus"].get(method, {})
    cells = [method, str(len(numbers["seeds"])), f"{numbers['area']['mean']:.3f}"]
    cells += [shown(more[kind]) if more else "" for kind in ("area", "area, Student's t")]
    return f"| {' | '.join(cells)} | {numbers['explained_variance']['7']['mean']:.2f} |"


def test_the_page_says_what_each_switch_is_worth() -> None:
    page = (RESULTS / "README.md").read_text()
    for method in json.loads((RESULTS / "critic" / "results.json").read_text())["tasks"]["sparse"]["methods"]:
        assert ablation(method) in page


LONG = ("str_build_sparse", "str_build_sparse_again")
TEN = {"magrpo": "MAGRPO", "collm-dc": "DC", "dc-difference": "DC with CC's baseline (`dc-difference`)"}


def ten_seeds() -> dict[tuple[str, int], dict]:
    runs = [run for grid in LONG for run in json.loads((RESULTS / grid / "results.json").read_text())["runs"]]
    return {(run["method"], run["seed"]): run for run in runs}


def area(curve: list[tuple[int, float]]) -> float:
    """The mean height over the points that both grids evaluate: every twelfth iteration of 64 joint actions."""
    joint_actions, rewards = zip(*(point for point in curve if point[0] % (12 * 64) == 0), strict=True)
    assert joint_actions == (0, 768, 1536, 2304, 3072, 3840)
    return area_under(joint_actions, rewards)


@pytest.mark.parametrize("other", list(TEN))
def test_ten_seeds_of_the_long_horizon_say_what_the_page_says(other: str) -> None:
    runs = ten_seeds()
    differences = [area(runs["collm-cc", seed]["curve"]) - area(runs[other, seed]["curve"]) for seed in range(10)]
    found: list[Interval] = [interval(differences), student(differences)]
    cells = [f"[{each.low:+.3f}, {each.high:+.3f}]" for each in found]
    line = f"| CC minus {TEN[other]} | {found[0].mean:+.3f} | {cells[0]} | {cells[1]} |"
    assert line in (RESULTS / "README.md").read_text()


def test_ten_seeds_of_the_critic_say_what_the_page_says() -> None:
    runs = ten_seeds()
    found = interval([runs["collm-cc", seed]["explained_variance"]["7"] for seed in range(10)])
    assert f"Over ten seeds it is {found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]" in (RESULTS / "README.md").read_text()


def by_holm(grid: str, against: str = "collm-cc", *, digits: int = 2) -> dict[str, str]:
    """Method -> p-value of "`against` minus it", by Holm for all methods of a grid, as the page writes it."""
    read = runpy.run_path(str(RESULTS / "draw.py"))["read"](RESULTS / grid / "results.json")
    found = Grid(Study(read.study.cells, against), read.results)
    return {method: f"{corrected:.{digits}f}" for method, (_, corrected) in found.p_values(*found.tasks).items()}


def test_the_verdicts_rest_on_p_values_by_holm() -> None:
    page = (RESULTS / "README.md").read_text()
    fresh, house, build, critic = map(by_holm, ("str_build_sparse_again", "house_build", "str_build", "critic"))
    assert f"Student's [+0.045, +0.108], p by Holm {fresh['magrpo']} |" in page
    assert f"bootstrap [+0.014, +0.107], p by Holm {fresh['collm-dc']};" in page
    assert f"Student's [+0.070, +0.154] (p by Holm for its six methods {house['td-lambda']};" in page
    assert f"p by Holm for their six methods {build['collm-dc']} and {house['collm-dc']} |" in page
    assert f"Student's [+0.012, +0.378], p by Holm for eleven switches {critic['text-alone']} |" in page
    assert f"Student's [+0.223, +1.126], p by Holm {critic['counterfactual']} |" in page
    assert {critic[name] for name in ("warm-up", "four-epochs", "critic-lambda-0", "normalized-targets")} == {"1.00"}
    side = {grid: by_holm(grid)["parallel"] for grid in ("tldr", "str_build", "house_build", "arxiv", "coop_code")}
    assert (
        "p by Holm: "
        + "{tldr}, {str_build}, {house_build}; {arxiv}, {coop_code}".format(**{grid: f"{grid} {p}" for grid, p in side.items()})
        in page
    )
    learned = ("tldr", "arxiv", "coop_code", "str_build", "str_build_sparse")
    assert f"(p by Holm at most {max(by_holm(grid)['grpo'] for grid in learned)})" in page


def test_the_verdicts_on_what_critics_may_read_rest_on_p_values_by_holm() -> None:
    claims, page = (RESULTS / "README.md").read_text(), (RESULTS / "credit" / "README.md").read_text()
    own, text = by_holm("credit/own_views_again"), by_holm("credit/text_alone", "readings", digits=3)
    choosing = by_holm("credit/own_views", digits=3)
    assert f"beyond Student's interval (p by Holm {choosing['constant']});" in page
    pairs = [(name, own[name]) for name in ("magrpo-teammates", "constant", "magrpo", "collm-dc")]
    words = "Corrected by Holm for the seven comparisons of the table, p is {}.".format(
        ", ".join(f"{p} against `{name}`" for name, p in pairs)
    )
    assert words in page
    assert f"p by Holm for seven comparisons {own['collm-dc']}, {own['magrpo']} and {own['magrpo-teammates']} |" in claims
    assert f"the area is above `text-alone` by both intervals (p by Holm {text['text-alone']})" in page
    assert f"Student's [+0.114, +0.230], p by Holm {text['text-alone']};" in claims
    assert f"and above that of `readings` by both intervals (p by Holm {text['no-text']})." in page


def test_every_grid_is_whole_and_told_of() -> None:
    page = (RESULTS / "README.md").read_text()
    for grid in GRIDS:
        assert f"({grid}/" in page
        assert (RESULTS / grid / "recipe.toml").read_text() == (RESULTS.parents[1] / f"recipes/compare/{grid}.toml").read_text()


PAGES = sorted(path.parent for page in ("real", "credit") for path in RESULTS.glob(f"{page}/*/results.json"))
"""Folders of the grids that have a section on a page of their own."""


def recipe_of(folder: Path) -> Path:
    return ROOT / "recipes" / "compare" / f"{'real_' if folder.parent.name == 'real' else ''}{folder.name}.toml"


@pytest.mark.parametrize("folder", PAGES, ids=lambda folder: folder.name)
def test_a_page_of_its_own_says_what_its_grids_say(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every grid is whole, made by the recipe in recipes/compare, and shown as docs/results/table.py writes it."""
    monkeypatch.syspath_prepend(str(RESULTS))
    table = import_module("table")
    page, recipe = (folder.parent / "README.md").read_text(), (folder / "recipe.toml").read_text()
    assert recipe == recipe_of(folder).read_text()
    assert json.loads((folder / "results.json").read_text())["missing"] == 0
    assert "\n".join(table.rows(folder, tomllib.loads(recipe)["compare"].get("against", "collm-cc"))) in page


@pytest.mark.parametrize("folder", PAGES, ids=lambda folder: folder.name)
def test_a_grid_goes_on_from_its_results(folder: Path, tmp_path: Path) -> None:
    """Its runs count as runs of the recipe, also after settings were added."""
    _, jobs = read_plan(recipe_of(folder), tmp_path)
    runs = json.loads((folder / "results.json").read_text())["runs"]
    recorded = {(run["task"], run["method"], run["learning_rate"], run["seed"]): run["settings"] for run in runs}
    assert recorded == {job.cell.name: job.cell.settings for job in jobs}


CREDIT = [folder for folder in PAGES if folder.parent.name == "credit" and folder.name not in ("fidelity", "real_quote_own")]


@pytest.mark.parametrize("folder", CREDIT, ids=lambda folder: folder.name)
def test_the_page_of_credit_says_what_critics_explain(folder: Path) -> None:
    """Before the last turn, in the second half of training: of every run, and of the ceiling on average."""
    page, runs = (folder.parent / "README.md").read_text(), json.loads((folder / "results.json").read_text())["runs"]
    for method in {run["method"]: None for run in runs if run["explained_variance"]}:
        own = [run for run in runs if run["method"] == method]
        last = max(own[0]["explained_variance"], key=int)
        explained, ceiling = ([run[name][last] for run in own] for name in ("explained_variance", "ceiling"))
        shown = [" ".join(f"{value:.3f}" for value in values).replace("-0.000", "0.000") for values in (explained, ceiling)]
        assert f"| `{method}` | {shown[0]} | {shown[1]} | {max(sum(explained) / sum(ceiling), 0):.2f} |" in page


def test_the_page_of_critics_says_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    table = runpy.run_path(str(ROOT / "benchmarks" / "critics.py"))["table"]
    folder = RESULTS / "critics"
    page = (folder / "README.md").read_text()
    for name in ("critics.json", "fifty.json"):
        assert table(json.loads((folder / name).read_text())).strip() in page


def test_the_pages_say_what_a_critic_without_a_language_model_is_worth() -> None:
    """The area without one minus that with one, paired by seed; all else is equal."""
    claims, credit, critics = ((RESULTS / name / "README.md").read_text() for name in ("", "credit", "critics"))
    for grid, other in (("text_alone", "collm-cc-metrics"), ("own_views_again", "collm-cc")):
        runs = json.loads((RESULTS / "credit" / grid / "results.json").read_text())["runs"]
        areas = {name: [run["area"] for run in runs if run["method"] == name] for name in ("no-text", other)}
        assert " and ".join(f"{sum(own) / len(own):.3f}" for own in areas.values()) in critics
        found = student([a - b for a, b in zip(*areas.values(), strict=True)], fewest=2)
        for page in (claims, credit):
            assert f"{found.mean:+.3f}, Student's [{found.low:+.3f}, {found.high:+.3f}]" in page


def test_the_page_of_stability_says_what_its_runs_say() -> None:
    table = runpy.run_path(str(ROOT / "benchmarks" / "stability.py"))["table"]
    folder = RESULTS / "stability"
    page = (folder / "README.md").read_text()
    for name in ("stability.json", "remedies.json"):
        for line in table(json.loads((folder / name).read_text())).splitlines():
            assert line in page
    assert all(line in page for line in [*limited_rows(folder), *area_rows(folder)])


def limited_rows(folder: Path) -> list[str]:
    """`agree.toml` with the limit as the default: a row per task and method."""
    runs = json.loads((folder / "agree.json").read_text())
    rows = []
    for task, method in dict.fromkeys((run["task"], run["method"]) for run in runs):
        own = sorted((run for run in runs if (run["task"], run["method"]) == (task, method)), key=lambda run: run["seed"])
        last, lowest = (" ".join(f"{run[name]:.2f}" for run in own) for name in ("last", "lowest_once_solved"))
        share = f"{sum(run['shortened'] for run in own)} of {steps}" if (steps := sum(run["steps"] for run in own)) else ""
        rows.append(f"| {method}, {task} agents | {last} | {lowest} | {share} |")
    return rows


def area_rows(folder: Path) -> list[str]:
    """Areas with and without the limit: a row per task and seed."""
    runs = {(run["task"], run["seed"], run["method"]): run for run in json.loads((folder / "max_drop.json").read_text())}
    rows = []
    for task, seed in dict.fromkeys((task, seed) for task, seed, _ in runs):
        found = [runs[task, seed, method] for method in ("whole", "limited")]
        areas = " | ".join(f"{run['area']:.3f}" for run in found)
        rows.append(f"| {task} | {seed} | {areas} | {found[1]['shortened']} of {found[1]['steps']} |")
    return rows


def test_where_no_step_was_shortened_the_limit_changed_no_run() -> None:
    runs = json.loads((RESULTS / "stability" / "max_drop.json").read_text())
    curves = {(run["task"], run["seed"], run["method"]): run["curve"] for run in runs}
    assert {key[:2] for key in curves} == {(task, seed) for task in ("str_build", "tldr", "quote") for seed in (10, 11, 12)}
    assert all(curves[task, seed, "whole"] == curves[task, seed, "limited"] for task, seed, _ in curves)


def test_the_pages_say_what_critics_of_two_writers_of_a_real_model_explain() -> None:
    """The median of what critics explain in the second half, and areas, `collm-cc` against the others."""
    folder = RESULTS / "credit" / "real_quote_own"
    page, claims = (folder.parent / "README.md").read_text(), (RESULTS / "README.md").read_text()
    found, runs = json.loads((folder / "explained.json").read_text()), json.loads((folder / "results.json").read_text())["runs"]
    shares = {
        method: [median(x for row in found[f"{method}-seed{seed}"][6:] for x in row) for seed in range(5)]
        for method in ("collm-dc", "collm-cc")
    }
    for method, own in shares.items():
        assert f"| `{method}` | {' '.join(f'{share:.2f}' for share in own)} | {sum(own) / 5:.2f} |" in page
    more = student([cc - dc for dc, cc in zip(*shares.values(), strict=True)], fewest=2)
    assert f"by {more.mean:.2f}, Student's [{more.low:+.2f}, {more.high:+.2f}]" in page
    means = [f"{sum(shares[method]) / 5:.2f}" for method in ("collm-cc", "collm-dc")]
    assert f"{' and '.join(means)}, Student's of the difference [{more.low:+.2f}, {more.high:+.2f}]" in claims
    areas = {(run["method"], run["seed"]): run["area"] for run in runs}
    for words, seeds in ((claims, range(5)), (page, (2, 3, 4))):
        for method in ("collm-dc", "magrpo", "magrpo-teammates"):
            least = student([areas["collm-cc", seed] - areas[method, seed] for seed in seeds], fewest=2)
            assert f"{least.mean:+.3f}, Student's [{least.low:+.3f}, {least.high:+.3f}]" in words
    assert sum(run["final"]["reward"] < 0.3605 for run in runs) == 18


def test_the_readings_on_a_second_task_are_those_on_the_page() -> None:
    page = (RESULTS / "credit" / "README.md").read_text()
    runs = json.loads((RESULTS / "credit" / "text_alone_gathering" / "results.json").read_text())["runs"]
    third, last = (
        sum(run["explained_variance"][turn] for run in runs) / sum(run["ceiling"][turn] for run in runs) for turn in "23"
    )
    assert f"the readings explain {third:.2f} of what a regression" in page
    assert f"explains, and before the last turn {last:.2f} (the ceiling" in page
    for run in runs:
        cells = [f"{run[name][turn]:.3f}" for turn in "123" for name in ("explained_variance", "ceiling")]
        assert f"| {run['seed']} | {' | '.join(cells)} |" in page
    claims = (RESULTS / "README.md").read_text()
    assert f"five fresh seeds: {third:.2f} and {last:.2f} of the ceiling before the third and the last turn" in claims


def test_the_page_of_blame_says_what_was_counted() -> None:
    table = runpy.run_path(str(ROOT / "benchmarks" / "blame.py"))["table"]
    page, found = (RESULTS / "blame.md").read_text(), json.loads((RESULTS / "blame.json").read_text())
    assert table(found).strip() in page

    def step(env: str, *names: str) -> list[float]:
        return [found[env][name]["step"]["mean"] for name in names]

    *rates, often = step("str_build", "resampling", "credit", "no-op", "most frequent")
    words = "step {:.1f} times as often as the best baseline, credit {:.1f} times, no-op replay {:.1f} times"
    assert words.format(*(rate / often for rate in rates)) in page
    right, often = step("resource_gathering", "resampling", "most frequent")
    assert f"naming always this turn is right in {100 * often:.0f} %." in page
    assert (
        f"right in {100 * right:.0f} %, {right / often:.1f} times as often; twice as often would be {200 * often:.0f} %" in page
    )


def test_the_pages_say_what_the_critic_alone_is_worth() -> None:
    """The joint critic and own critics with all else equal, on fresh seeds of own views; pairs of areas by seed."""
    folder = RESULTS / "credit"
    runs = json.loads((folder / "own_views_again" / "results.json").read_text())["runs"]
    areas = {(run["method"], run["seed"]): run["area"] for run in runs}

    def minus(one: str, other: str) -> tuple[str, str]:
        found = student([areas[one, seed] - areas[other, seed] for seed in range(5, 10)], fewest=2)
        return f"{found.mean:+.3f}", f"[{found.low:+.3f}, {found.high:+.3f}]"

    mean, interval_ = minus("td-lambda", "collm-dc")
    assert f"by {mean[1:]}, Student's {interval_} (p 0.04;" in (folder / "README.md").read_text()
    assert f"{mean}, Student's {interval_}, p 0.04, the one comparison" in (RESULTS / "README.md").read_text()
    assert all(areas["td-lambda", seed] > areas["collm-dc", seed] for seed in range(5, 10))
    mean, interval_ = minus("td-lambda", "magrpo")
    assert f"by {mean[1:]}, Student's {interval_}." in (folder / "README.md").read_text()
    mean, interval_ = minus("collm-cc", "td-lambda")
    assert f"is {mean} {interval_}, which" in (folder / "README.md").read_text()


def test_the_page_says_what_an_iteration_ahead_costs() -> None:
    page = (RESULTS.parent / "cluster.md").read_text()
    runs = json.loads((RESULTS / "cluster" / "ahead_agree.json").read_text())
    ahead, clipped = runs["collm-cc-ahead"], runs["collm-cc-clipped"]
    found = student([one["mean"] - other["mean"] for one, other in zip(ahead, clipped, strict=True)])
    assert f"lower by {-found.mean:.3f}, Student's [{-found.high:.3f}, {-found.low:.3f}]" in page
    after, before = (sorted(run["solved"] for run in one) for one in (ahead, clipped))
    assert f"after {after[0]} to {after[-1]} iterations instead of {before[0]} to {before[-1]}" in page
    assert min(run["last"] for run in ahead) >= 0.98
    assert f"never falls below {min(run['lowest'] for run in ahead):.2f} " in page
    assert [sum(run["last"] == 0 for run in runs[f"magrpo-{kind}"]) for kind in ("ahead", "clipped")] == [1, 1]
