"""Every number of README.md is held to its source: a file of docs/, a recipe, a plan, an environment or the package itself.

A number that no sentence of `HELD` covers fails, unless it belongs to a name or to code (`uncovered`).
"""

from __future__ import annotations

import json
import math
import re
import runpy
import tomllib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from string import Formatter
from tempfile import TemporaryDirectory
from typing import Any

import huggingface_hub
import pytest
from places import ROOT
from safetensors import safe_open

import collm
from collm.cluster.outlook import outlook
from collm.envs.building.str_build import PALETTES, StrBuild
from collm.envs.catalogue import make
from collm.models.blueprint import Blueprint
from collm.models.sources import TINY
from collm.planning.apart import apart
from collm.planning.memory import GIB, plan
from collm.settings.load import load_config, parse_config
from collm.settings.rooms import Config
from collm.studies.intervals import Interval, student

README = (ROOT / "README.md").read_text()
DOCS = ROOT / "docs"
REAL = DOCS / "results" / "real"
RECIPES = ROOT / "recipes"
PAPER = RECIPES / "paper" / "str_build" / "collm-cc-paper.toml"
QUOTE = RECIPES / "real" / "quote.toml"
SPARSE = RECIPES / "tiny" / "str_build_sparse.toml"
DEMO = ROOT / "collm" / "cli" / "demo.toml"
WORDS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
CARDS = (8, 12, 16, 24, 32, 40, 48, 80)
"""GB of memory that GPUs are sold with."""
RANK = 16
"""Of the adapters in plans."""

Values = Sequence[object]


@cache
def read(*path: str) -> Any:
    """A JSON file of docs/."""
    return json.loads(DOCS.joinpath(*path).read_text())


@cache
def recipe(path: Path) -> Config:
    return load_config(path)


def found(pattern: str, text: str | None) -> str:
    match = re.search(pattern, text or "")
    assert match is not None, f"{pattern} is not in the source"
    return match[1]


def agents(path: Path) -> str:
    config = recipe(path)
    return WORDS[len(make(config.env.name, **config.env.options).possible_agents)]


def cores(path: Path) -> str:
    return WORDS[recipe(path).run.threads or 0]


def held_out(path: Path) -> int:
    config = recipe(path)
    return make(config.env.name, split="eval", **config.env.options).num_tasks


def joint_actions(path: Path) -> int:
    """Those of an iteration, of one turn each."""
    config = recipe(path)
    return config.rollout.tasks * config.algorithm.group_size


def shown(reward: dict[str, float], digits: int) -> str:
    return "{mean:.{n}f} [{low:.{n}f}, {high:.{n}f}]".format(**reward, n=digits)


def rate(value: float) -> str:
    return f"{value:.0e}".replace("e-0", "e-")


def percent(of: Any) -> str:
    return found(r"(\d+) % interval", of.__doc__)


# the tiny team


def minutes() -> int:
    """Of one core, at most."""
    return math.ceil(read("images", "demo.json")["other_processor"]["cpu_seconds"] / 60)


def builders() -> Values:
    """Agents of the curve, parameters of one, and turns."""
    config = recipe(SPARSE)
    with safe_open(TINY / "model.safetensors", "np") as weights:
        size = sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return agents(SPARSE).capitalize(), size / 1e6, WORDS[config.env.options["turns"]]


def seeds() -> Values:
    """Seeds of the curve, its interval, and the seeds of the first grid, on which choices were made."""
    drawn = runpy.run_path(str(DOCS / "images" / "draw.py"))
    (number,) = {len(rewards) for rewards in drawn["curves"]().values()}
    first = tomllib.loads((DOCS / "results" / drawn["GRIDS"][0] / "recipe.toml").read_text())["compare"]["seeds"]
    return WORDS[number], percent(student), WORDS[len(first)]


def demonstrated(name: str) -> Values:
    """Both cells of a row of the demonstration."""
    return tuple(shown(cell, 2) for cell in read("images", "demo.json")["report"][name])


# pre-trained models


@cache
def episodes() -> list[dict[str, Any]]:
    """The episode of the README before and after training."""
    run = read("results", "real", "quote", "texts.json")["collm-cc-seed3"]
    return [next(e for e in run[when] if e["task"] == "1") for when in ("before", "after")]


def text() -> Values:
    words = episodes()[0]["turns"][0]["first"][0].split("\n")[0]
    return len(words.split()), words


def answers(number: int) -> Values:
    (turn,) = episodes()[number]["turns"]
    said = "<br>".join(f"{writer}: {answer.strip()}" for writer, (_, answer) in turn.items())
    return said, episodes()[number]["reward"]


def quote(method: str) -> dict[str, Any]:
    return read("results", "real", "quote", "results.json")["tasks"]["quote"]["methods"][method]


def means() -> Values:
    before, after = quote("parallel"), quote("collm-cc")
    return WORDS[len(after["seeds"])], before["reward"]["mean"], after["reward"]["mean"]


def first_hour() -> int:
    hour = read("results", "real", "first-hour.json")
    assert (hour["recipe"], hour["note"].split()[:2]) == ("recipes/real/quote.toml", ["one", "thread"])
    return round(hour["wall_seconds"] / 60)


def adapters() -> float:
    """GiB that the recipe of two SmolLM2-135M writers is planned at."""
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    shape |= {"num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True, "model_type": "llama"}
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape))
        return plan(load_config(QUOTE, {"team.model": folder})).peak / GIB


def sides() -> dict[str, Any]:
    return read("results", "real", "comlrl.json")["sides"]


def rates() -> list[float]:
    return [sides()[side]["joint_actions_per_cpu_second"] for side in ("collm", "comlrl")]


def rewards() -> list[str]:
    return [shown(sides()[side]["after"]["reward"], 3) for side in ("collm", "comlrl")]


def reference() -> str:
    """The version of comlrl in the benchmarks."""
    return found(r'"comlrl==([\d.]+)"', (ROOT / "benchmarks" / "matched.py").read_text())


# plans


def on_a_gpu(path: Path, **more: object) -> Config:
    return load_config(path, {"run.device": "cuda", **{name.replace("__", "."): value for name, value in more.items()}})


def memory(size: str) -> Values:
    """GiB of one GPU, of the GPU that needs most with one unit on each, and of one GPU with adapters."""
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as empty:
        # as on a machine without the model, whose tokenizer would be used
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", empty)
        config = on_a_gpu(PAPER, team__model=f"Qwen/Qwen3-{size}")
        whole = plan(config)
        one = plan(on_a_gpu(PAPER, team__model=f"Qwen/Qwen3-{size}", team__lora__rank=RANK))
        widest = max(unit.peak for unit in apart(config, whole.work))
    return size, whole.peak / GIB, widest / GIB, one.peak / GIB


def paper() -> Values:
    """Of the recipes of CoLLM-CC: GPUs and their memory for whole models, and the memory of one for adapters."""
    paths = sorted((RECIPES / "paper").glob("*/collm-cc-paper.toml"))
    plans = {path: plan(on_a_gpu(path)) for path in paths}
    most = max(unit.peak for found in plans.values() for unit in apart(found.config, found.work))
    card = next(size for size in CARDS if most <= size * 1e9)
    number = max(len(outlook(found.config, card * 10**9, found.work).devices) for found in plans.values())
    small = max(plan(on_a_gpu(path, team__lora__rank=RANK)).peak for path in paths)
    return WORDS[number], card, next(size for size in CARDS if small <= size * 1e9), RANK


def bytes_per_parameter() -> Values:
    whole = {"env": {"name": "agree"}, "algorithm": {"name": "magrpo"}, "team": {"model": "Qwen/Qwen3-0.6B"}}
    found = plan(parse_config(whole))
    (gradient,) = {phase.parts["gradient"] for phase in found.phases if phase.name.startswith("update")}
    trained = [passes.model.trained for passes in found.passes]
    held = (found.held["weights"] + found.held["optimizer"]) / sum(trained)
    return (round(held + gradient / trained[0]),)


def learning_rates() -> Values:
    """Of adapters and the tiny model, of other whole models, and of critics that are adapters."""

    def default(model: str, **team: object) -> tuple[str, str]:
        critic = {"body": "auto"}
        config = parse_config({"env": {"name": "agree"}, "critic": critic, "team": {"model": model, **team}})
        blueprint = Blueprint.of(config, ("a", "b"))
        return rate(blueprint.policies[0].rate(config)), rate(blueprint.critics[0].rate(config))

    (adapter, critic), (tiny, _) = default("Qwen/Qwen3-0.6B", lora={"rank": RANK}), default("tiny")
    assert adapter == tiny
    return adapter, default("Qwen/Qwen3-0.6B")[0], critic


# other packages


def said(package: str, what: str, pattern: str) -> str:
    return found(pattern, read("packages.json")[package][what])


def machines() -> Values:
    return (
        cores(DEMO),
        said("comlrl", "smallest", r"(\d+) GB"),
        said("TrajWeave", "smallest", r"Qwen2.5-([\d.]+B)"),
        *(said("MARTI", "smallest", pattern) for pattern in (r"(\d+)\S\d+G GPUs per agent", r"(\d+)G GPUs per agent")),
        said("verl", "smallest", r"(\d+) GB"),
    )


def documents() -> Values:
    return read("packages.json")["read"], read("packages.json")["comlrl"]["version"]


def largest() -> Values:
    return said("MARTI", "largest", r"(\d+B)-scale"), said("verl", "largest", r"up to (\d+B)")


# the rest


def pythons() -> Values:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    least, beyond = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", project["requires-python"]).groups()  # type: ignore[union-attr]
    return f"3.{least}", f"3.{int(beyond) - 1}"


def lines() -> Values:
    """Tens of lines."""
    return (math.ceil(len((ROOT / "examples" / "minimal.py").read_text().splitlines()) / 10) * 10,)


def within() -> Values:
    """Per cent, as the test of plans says."""
    return (found(r"def test_the_plan_is_within_(\d+)_percent", (ROOT / "tests" / "planning" / "test_plan.py").read_text()),)


def on_a_real_gpu() -> Values:
    page = (DOCS / "gpu.md").read_text()
    return found(r"One session of (\d+) minutes on one NVIDIA", page), found(r"minutes on one NVIDIA (\w+)", page)


HELD: list[tuple[str, Callable[[], Values]]] = [
    ("it trains in minutes on {} CPU core;", lambda: (cores(DEMO),)),
    ("{:.1f} times as many joint actions per CPU second as comlrl {}", lambda: (rates()[0] / rates()[1], reference())),
    ("see {} agents learn in {} minutes", lambda: (agents(DEMO), WORDS[minutes()])),
    ("*{} agents of {:.1f} million parameters each build a word in {} turns,", builders),
    ("Mean of {} seeds with Student's {} % interval; {} of these seeds were used to select the baseline.", seeds),
    ("{} SmolLM2-135M writers are asked", lambda: (agents(QUOTE).capitalize(),)),
    ("| The text, {} words: *{}* | reward |", text),
    ("| **before** — {} | {:.2f} |", lambda: answers(0)),
    ("| **after {:.0f} joint actions** — {} | {:.2f} |", lambda: (quote("collm-cc")["joint_actions"], *answers(1))),
    ("This is one of {} held-out texts", lambda: (held_out(QUOTE),)),
    ("The mean over texts and {} seeds is {:.3f} before and {:.3f} after", means),
    ("trains {} tiny builders (at most {} minutes)", lambda: (agents(DEMO), minutes())),
    ("Linux, Python {} to {} with venv", pythons),
    (
        "takes {} CPU core and {:.1f} GB of memory",
        lambda: (cores(DEMO), read("images", "demo.json")["other_processor"]["memory_bytes"] / 1e9),
    ),
    ("for {} agents and a critic on [StrBuild", lambda: (agents(PAPER),)),
    ("| LoRA of rank {}, all on one GPU |", lambda: (RANK,)),
    ("| {} | {:.1f} | {:.1f} | {:.1f} |", lambda: memory("0.6B")),
    ("| {} | {:.1f} | {:.1f} | {:.1f} |", lambda: memory("1.7B")),
    ("| {} | {:.1f} | {:.1f} | {:.1f} |", lambda: memory("4B")),
    ("[within {} % on a CPU]", within),
    ("{} SmolLM2-135M writers with adapters are planned at {:.1f} GiB", lambda: (agents(QUOTE).capitalize(), adapters())),
    ("[{} minutes](docs/first-hour.md) on {} CPU core", lambda: (WORDS[first_hour()], cores(QUOTE))),
    ("for {:,} joint actions.", lambda: (recipe(QUOTE).run.iterations * joint_actions(QUOTE),)),
    ("[quoted](docs/packages.json), {}; comlrl: the source of {})", documents),
    ("| {} CPU core | a GPU of {} GB | one GPU ({}) | {} GPUs of {} GB per agent | a GPU of {} GB |", machines),
    ("| not named | {} in its examples | {} parameters |", largest),
    ("MAGRPO beside comlrl {} (", lambda: (reference(),)),
    ("{:.2f} joint actions per CPU second instead of {:.2f},", rates),
    ("after {} of them held-out rewards", lambda: (sides()["comlrl"]["joint_actions"],)),
    ("{} and {}, from {:.3f} (", lambda: (*rewards(), sides()["collm"]["before"]["reward"]["mean"])),
    ("Measured on a GPU: {} minutes on one {} (", on_a_real_gpu),
    ("planned at up to {} GPUs of {} GB, or one of {} GB with LoRA of rank {}.", paper),
    ("note = {{Version {}}}", lambda: (collm.__version__,)),
    ("{} builders, each with {} kinds of blocks,", lambda: (agents(DEMO), WORDS[len(PALETTES[0])])),
    ("(mean and {} % bootstrap interval over words)", lambda: (percent(Interval),)),
    ("One run has {} iterations of {} joint actions;", lambda: (recipe(DEMO).run.iterations, joint_actions(DEMO))),
    ("{} words are held out.", lambda: (held_out(DEMO),)),
    ("These are the numbers of one run (seed {});", lambda: (read("images", "demo.json")["seed"],)),
    ("| reward (at most {:.0f}) | {} | {} |", lambda: (StrBuild.max_reward, *demonstrated("reward"))),
    ("| target cells built | {} | {} |", lambda: demonstrated("target cells built")),
    ("| like blocks side by side | {} | {} |", lambda: demonstrated("like blocks side by side")),
    ("| IoU with the word | {} | {} |", lambda: demonstrated("IoU with the word")),
    ("# what {} untrained writers read and wrote", lambda: (agents(QUOTE),)),
    ("({} minutes on {} core)", lambda: (first_hour(), cores(QUOTE))),
    ("# held-out tasks: mean and {} % interval", lambda: (percent(Interval),)),
    ("trains a team in {} lines without the trainer", lines),
    ("a team trained in {} lines", lines),
    ("A whole model with AdamW needs {} bytes per parameter.", bytes_per_parameter),
    ("the tiny model learn at {}, other whole models at {}, and critics that are adapters at {};", learning_rates),
]
"""(sentence, what computes its numbers from their sources)."""


@cache
def filled(number: int) -> tuple[str, list[tuple[int, int]]]:
    """A sentence of `HELD` with its values, and where in it these are."""
    sentence, values = HELD[number]
    return fill(sentence, values())


def fill(sentence: str, values: Values) -> tuple[str, list[tuple[int, int]]]:
    text, spans, left = "", [], list(values)
    for words, field, form, _ in Formatter().parse(sentence):
        text += words
        if field is not None:
            value = format(left.pop(0), form or "")
            spans.append((len(text), len(text) + len(value)))
            text += value
    assert not left, f"{sentence} has too few places"
    return text, spans


@pytest.mark.parametrize("number", range(len(HELD)), ids=lambda number: HELD[number][0][:60])
def test_a_sentence_says_what_its_source_says(number: int) -> None:
    assert filled(number)[0] in README


NUMBER = re.compile(rf"\d[\d.,]*\d|\d|\b(?:{'|'.join(WORDS[2:])})\b", re.IGNORECASE)
"""Words from two on: "one" is an article more often than a number."""
NAMES = re.compile(
    r"\(https:[^)]*\)|smollm2(-135M)?|Qwen3|arXiv:2601\.21972|Apache-2\.0|float32|bfloat16|\bC3\b|FSDP2|"
    r"@misc\{collm2026|year = \{2026\}",
    re.IGNORECASE,
)
CODE = re.compile(r"^```(?:sh|python|toml)\n.*?^```$|`[^`\n]+`", re.DOTALL | re.MULTILINE)
COMMENT = re.compile(r"(?<=  )# .*$|^# .*$", re.MULTILINE)


def blank(match: re.Match[str]) -> str:
    return " " * len(match[0])


def code(match: re.Match[str]) -> str:
    """Code without what is not a comment in it."""
    kept = list(" " * len(match[0]))
    for comment in COMMENT.finditer(match[0]):
        kept[slice(*comment.span())] = comment[0]
    return "".join(kept)


def uncovered(page: str, sentences: Sequence[tuple[str, list[tuple[int, int]]]]) -> list[str]:
    """Numbers of a page, with the words before them, that are neither values of a sentence nor part of a name or of code."""
    left = NAMES.sub(blank, CODE.sub(code, page))
    held = set()
    for text, spans in sentences:
        for match in re.finditer(re.escape(text), page):
            held |= {match.start() + place for span in spans for place in range(*span)}
    numbers = [number for number in NUMBER.finditer(left) if not held >= set(range(*number.span()))]
    return [page[max(number.start() - 30, 0) : number.end()] for number in numbers]


def test_every_number_has_a_source() -> None:
    assert uncovered(README, [filled(number) for number in range(len(HELD))]) == []


@pytest.mark.parametrize(
    ("planted", "seen"),
    [
        ("It has 7 rooms.", 1), ("It has seven rooms and 1,234 lines.", 2), ("| 0.50 | [-0.1, 2.5] |", 3), ("20 words", 0),
        ("It has 20 words of 21.", 1), ("`--rank 16`, Qwen3 in float32", 0), ("```sh\nmake 3   # 4 minutes\n```\n", 1),
        ("```text\nin 60 lines\n```\n", 1), ("One of them.", 0),
    ],
)  # fmt: skip
def test_a_planted_number_is_seen(planted: str, seen: int) -> None:
    assert len(uncovered(planted, [fill("{} words", (20,))])) == seen
