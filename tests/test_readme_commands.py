"""Every command of README.md runs in a copy of the tracked files, in the README's order, as it is written or as said here."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from pages import BLOCK, Block, run_session, typed
from places import ROOT

SMOLLM2 = ROOT / "build" / "smollm2"
INLINE = re.compile(r"`((?:\w+=\S+ )?(?:collm|curl|docker|git|make|pip|python3?|source|uv|\.) [^`\n]+)`")
READ = ("toml", "bibtex", "text")
"""Languages of blocks that hold no commands."""


class Instead(NamedTuple):
    why: str
    typed: str = ""
    """What is run in place of a command; "" if this test runs nothing."""


def shorter(words: str) -> Instead:
    """The command with more words."""
    return Instead("it takes minutes", f"{{}} {words}")


def example(line: str) -> Instead:
    return Instead("words in it stand for others", line)


def answers(*logs: str) -> str:
    """Waits until servers have written their addresses to these files, as they do when they answer."""
    return "\n".join(f"timeout 300 sh -c 'until grep -q http://127 {log}; do sleep 1; done'" for log in logs)


def address(log: str) -> str:
    return f"$(grep -o 'http://127.*' {log})"


STOP = "kill $(jobs -p)\nwait"
SHORT = "--run.iterations 2"

OTHERWISE = {
    "make demo": Instead(
        "it installs collm, and trains for minutes: .venv/bin/collm is made here, and trains for less",
        "mkdir -p .venv/bin\n"
        "cat > .venv/bin/collm <<'END'\n"
        '#!/bin/sh\n[ "$1" != train ] || set -- "$@" --run.iterations 2 --rollout.tasks 8 --evaluation.episodes 8\n'
        'exec collm "$@"\nEND\n'
        "chmod +x .venv/bin/collm\n"
        "{}",
    ),
    "make test": Instead("this test may be part of it"),
    "pip install torch --index-url https://download.pytorch.org/whl/cpu": Instead("it downloads torch"),
    "pip install .": Instead("test_packaging.py installs the wheel with pip and uv"),
    "pip install '.[vllm,serve,cluster,hub,trackers]'": Instead("it downloads gigabytes; .ci/run installs the extras"),
    "make smollm2": Instead("it downloads a model; .ci/run calls it first", f"mkdir -p build && ln -s {SMOLLM2} build/smollm2"),
    "collm evaluate recipes/real/quote.toml --show 3": shorter("--episodes 3"),
    "collm train recipes/real/quote.toml": shorter(
        "--run.iterations 1 --rollout.tasks 1 --algorithm.group_size 2 --evaluation.episodes 2"
    ),
    "collm train [RECIPE.toml] [--room.key value ...]": example(f"collm train recipes/tiny/agree.toml {SHORT} --run.name mine"),
    "collm train --resume runs/NAME": example("collm train --resume runs/demo --run.iterations 3"),
    "collm plan RECIPE.toml [--memory 24GB] [--measure]": example("collm plan recipes/tiny/agree.toml --memory 24GB --measure"),
    "collm plan RECIPE.toml --cluster --memory 80GB": example("collm plan recipes/tiny/agree.toml --cluster --memory 80GB"),
    "collm evaluate RUN|RECIPE [--show N]": example("collm evaluate runs/demo --show 1 --episodes 4"),
    "collm export RUN --agent NAME DIR [--push REPO]": Instead(
        "words in it stand for others, and --push needs a hub (runs/test_hub.py)",
        "collm export runs/demo --agent builder_0 exported/builder_0",
    ),
    "collm serve RUN --agent NAME --port P": example(
        "collm serve exported/builder_0 --agent builder_0 --port 0 > first.log 2>&1 &\n"
        "collm serve runs/demo --agent builder_1 --port 0 > second.log 2>&1 &\n"
        f"{answers('first.log', 'second.log')}"
    ),
    "collm serve RUN --all --cluster.address ADDRESS": Instead("tests/cluster/test_deployments.py calls it, on Ray Serve"),
    "collm play TASK|RUN --agent NAME=URL ...": example(
        f"collm play runs/demo --episodes 2 --agent builder_0={address('first.log')} "
        f"--agent builder_1={address('second.log')}\n{STOP}"
    ),
    "collm compare RECIPE.toml [--cluster ADDRESS]": Instead(
        "words in it stand for others, and the shortest study takes minutes (docs/tutorials/comparing.md is run)",
        "collm compare recipes/compare/agree.toml --dry-run",
    ),
    "collm report RUN... [--watch]": example(
        "collm report runs/demo runs/agree-collm-cc-seed0\n"
        f"collm report runs/demo --watch > live.log 2>&1 &\n{answers('live.log')}\n"
        f"curl --silent --fail --output /dev/null --max-time 60 {address('live.log')}\n{STOP}"
    ),
    "collm blame RUN [--resample K]": example("collm blame runs/demo --resample 2"),
    "collm imitate RECIPE.toml": example("collm imitate recipes/tiny/agree.toml --steps 2"),
    "collm check ENV": example("collm check agree"),
    "collm train recipes/tiny/agree.toml --algorithm.name magrpo --run.seed 1": shorter(SHORT),
    "collm train recipes/tiny/agree.toml --algorithm.name magrpo --algorithm.teammates replay --run.name difference": shorter(
        SHORT
    ),
    "collm train recipes/tiny/agree.toml --env.agents 3 --run.name three": shorter(SHORT),
    ". .venv/bin/activate": Instead("commands are on the path here"),
    "make docs": Instead("it installs packages; .ci/run calls it"),
}
"""Command -> why it is not run as it is written, and what is run instead; {} is the command."""


def commands(block: str) -> list[str]:
    """The commands of a block, one a line, without comments."""
    lines = (line.partition(" #")[0].rstrip() for line in block.replace("\\\n", " ").splitlines())
    return [line for line in lines if line]


def steps(page: str) -> list[str | Block]:
    """The commands of a page, of blocks and of sentences, each once, and its blocks of Python, in order."""
    found: list[str | Block] = []
    end = 0
    for match in BLOCK.finditer(page):
        found += INLINE.findall(page[end : match.start()])
        end, block = match.end(), Block(*match.groups(""))
        if block.language == "python":
            found.append(block)
        elif block.language not in READ:
            found += commands(block.text)
    return list(dict.fromkeys(found + INLINE.findall(page[end:])))


def session(steps: list[str | Block]) -> str:
    """What is typed for these steps, each after a line that names it."""
    lines = []
    for step in steps:
        if isinstance(step, Block):
            lines += ["echo '$ python'", typed(step)]
        else:
            lines += [f"echo {shlex.quote(f'$ {step}')}", OTHERWISE[step].typed.format(step) if step in OTHERWISE else step]
    return "\n".join(lines)


README = steps((ROOT / "README.md").read_text())


def test_what_is_run_otherwise_is_in_the_readme() -> None:
    assert [command for command in OTHERWISE if command not in README] == []
    assert [command for command, instead in OTHERWISE.items() if not instead.why] == []


def test_every_kind_of_command_is_found() -> None:
    page = """
`make one` and `collm two --three`, and `X=. collm four`; `collm` and `collm.five` are names.

```sh
collm six [A]      # a comment
git \\
  seven

collm eight
```

```text
collm/   a tree
```

Save this as `nine.py`:

```python
nine()
```

`make one` again.
"""
    *found, python = steps(page)
    assert found == ["make one", "collm two --three", "X=. collm four", "collm six [A]", "git    seven", "collm eight"]
    assert isinstance(python, Block)
    assert (python.file, python.text) == ("nine.py", "nine()\n")


def test_a_command_that_fails_is_named(tmp_path: Path) -> None:
    done = run_session(session(["true", "false", "true"]), tmp_path)
    assert done.returncode == 1
    assert done.stdout.splitlines() == ["$ true", "$ false"]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of the files that git tracks, as they are in the checkout."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip(f"the checkout is not one of git: {listed.stderr.strip()}")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tmp_path / name)
            shutil.copymode(ROOT / name, tmp_path / name)
    return tmp_path


@pytest.mark.slow
def test_the_commands_of_the_readme_run(clone: Path) -> None:
    left_out = [] if SMOLLM2.is_dir() else [step for step in README if "smollm2" in step or "recipes/real/" in step]
    done = run_session(session([step for step in README if step not in left_out]), clone, package=clone, seconds=900)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert {"demo", "agree-magrpo-seed1", "difference", "three"} <= {path.name for path in (clone / "runs").iterdir()}
    assert {path.name for path in (clone / "exported").iterdir()} == {"agent_0", "agent_1", "builder_0"}
    if left_out:
        pytest.skip(f"all others ran, but these need {SMOLLM2} (make smollm2): {', '.join(map(str, left_out))}")
