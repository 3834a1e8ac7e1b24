"""`collm`: parse the command, then import what it needs.

Every command has `--help` with an example. An error that the user can correct is one message on standard error with exit code 2
(1 for a full disk or for values that became NaN or infinite); a traceback is a bug of collm.
"""

from __future__ import annotations

import argparse
import errno
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from collm.errors import CollmError, ConfigError
from collm.runs.output import complain, forgo
from collm.settings.load import describe, parse_value


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # characters that the terminal cannot encode are printed escaped
            stream.reconfigure(errors="backslashreplace")
    try:
        words, overrides = split_overrides(arguments)
        known = parser.parse_args(words)
        if known.command is None:
            parser.print_help()
            return 0
        if overrides and not known.takes_settings:
            raise ConfigError(f"`collm {known.command}` takes no settings, but was given --{next(iter(overrides))}.")
        known.overrides = overrides
        code = int(known.call(known) or 0)
        sys.stdout.flush()
        return code
    except CollmError as error:
        complain(f"collm: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        complain("collm: stopped at once; the last checkpoint is intact.")
        return 130
    except BrokenPipeError:
        forgo(sys.stdout)
        return 141
    except OSError as error:
        if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EIO, errno.EBADF):
            raise
        forgo(sys.stdout)
        complain(f"collm: the output could not be written: {error.strerror}; files that were saved are whole.")
        return 1


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="collm",
        description="Train teams of language-model agents that act without a coordinator, and run each agent separately.",
        epilog="Help for one command: collm train --help",
        allow_abbrev=False,
    )
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(metavar="COMMAND")

    def command(name: str, help_text: str, example: str, module: str, *, settings: bool = False) -> Any:
        shown = f"example:\n  {example}\n"
        sub = commands.add_parser(
            name,
            help=help_text.replace("%", "%%"),
            description=help_text,
            epilog=shown,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.set_defaults(command=name, call=lambda args: _import(module)(args), takes_settings=settings)
        return sub

    train = command(
        "train",
        "Train a team with the settings of a recipe; without a recipe, run the built-in demonstration.",
        "collm train recipes/tiny/agree.toml --algorithm.name magrpo --run.seed 1\n"
        "  collm train --resume runs/str_build-collm-cc-seed0",
        "collm.cli.train:run",
        settings=True,
    )
    train.add_argument("recipe", nargs="?", type=Path, help="a TOML recipe")
    train.add_argument("--resume", type=Path, metavar="RUN", help="continue the run in this directory where it stopped")
    train.add_argument("--json", action="store_true", help="print the metrics of the last iteration as JSON")
    train.add_argument("--settings", action="store_true", help="print every setting with its default and exit")

    evaluate = command(
        "evaluate",
        "Evaluate a run's trained team, or a recipe's untrained team, on the held-out tasks: mean and 95 % interval.",
        "collm evaluate runs/demo\n  collm evaluate recipes/real/quote.toml --show 3",
        "collm.cli.evaluate:run",
        settings=True,
    )
    evaluate.add_argument("source", type=Path, metavar="RUN|RECIPE", help="a run directory or a TOML recipe")
    evaluate.add_argument(
        "--episodes",
        type=int,
        metavar="N",
        help="held-out episodes, a task each, the first again after the last; default: each once",
    )
    evaluate.add_argument("--checkpoint", metavar="N|best|final|start", default="final", help="which weights of a run")
    evaluate.add_argument("--show", type=int, metavar="N", help="also print the first N tasks: what each agent read and wrote")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")

    imitate = command(
        "imitate",
        "Teach a recipe's team the answers of the environment's scripted player, or of chats of your own, before training.",
        "collm imitate recipes/real/quote.toml --steps 20 --out teams/quote",
        "collm.cli.imitate:run",
        settings=True,
    )
    imitate.add_argument("recipe", type=Path, help="a TOML recipe")
    imitate.add_argument("--steps", type=int, default=50, metavar="N", help="optimizer steps of every agent (default: 50)")
    imitate.add_argument("--data", type=Path, metavar="FILE", help="chats as JSON lines; default: the scripted player's")
    imitate.add_argument("--out", type=Path, metavar="DIR", help="folder to write; default: runs/NAME-imitated")
    imitate.add_argument("--json", action="store_true", help="print one JSON object")

    plan = command(
        "plan",
        "Estimate what a recipe needs: memory by part, steps, tokens, hours. Exit code 1 if it does not fit.",
        "collm plan recipes/paper/tldr/collm-cc-paper.toml --memory 80GB",
        "collm.cli.plan:run",
        settings=True,
    )
    plan.add_argument("recipe", nargs="?", type=Path, help="a TOML recipe; default: the built-in demonstration")
    plan.add_argument("--memory", metavar="SIZE", help="available memory, e.g. 24GB or 80GiB; default: this machine's")
    plan.add_argument(
        "--cluster", action="store_true", help="plan for a cluster (docs/cluster.md) whose devices have this memory each"
    )
    for name, text in (("generated", "sampled"), ("updated", "read in updates")):
        plan.add_argument(f"--{name}-per-second", type=float, metavar="N", help=f"tokens {text} per second, to estimate hours")
    plan.add_argument("--measure", action="store_true", help="load the team, time real steps on this machine, and print hours")
    plan.add_argument("--json", action="store_true", help="print one JSON object")

    compare = command(
        "compare",
        "Run all methods x tasks x seeds of a recipe and compare them. A second call continues where the first stopped.",
        "collm compare recipes/compare/agree.toml",
        "collm.cli.compare:run",
    )
    compare.add_argument("recipe", type=Path, help="a TOML recipe with a table [compare]")
    compare.add_argument("--folder", type=Path, metavar="DIR", help="folder of runs and results; default: runs/compare-RECIPE")
    compare.add_argument(
        "--cluster", metavar="ADDRESS", help="place runs on the nodes of a Ray cluster: local, auto or HOST:PORT"
    )
    compare.add_argument(
        "--dry-run", action="store_true", help="check every run's settings, list finished and remaining runs, and exit"
    )
    compare.add_argument(
        "--only", metavar="PATTERN", help="only runs whose TASK/NAME matches this pattern, e.g. 'words/collm-*-seed0'"
    )
    compare.add_argument("--json", action="store_true", help="print one JSON object")

    report = command(
        "report",
        "Report on runs: held-out results before and after training, learning curves, pictures of builds.",
        "collm report runs/demo\n  collm report runs/demo --watch",
        "collm.cli.report:run",
    )
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories")
    report.add_argument("--watch", action="store_true", help="serve the report page on this machine and follow the runs")
    report.add_argument("--port", type=int, metavar="N", help="port of --watch; default: any free one")
    report.add_argument("--json", action="store_true", help="print one JSON object")

    blame = command(
        "blame",
        "Name the agent and the turn whose answer cost each failed episode of a run most: by its credit and by replay.",
        "collm blame runs/demo\n  collm blame runs/demo --below 0.5 --resample 16",
        "collm.cli.blame:run",
        settings=True,
    )
    blame.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    blame.add_argument("--below", type=float, metavar="X", help="failed is a return below X; default: below the median")
    blame.add_argument(
        "--last", type=int, default=10, metavar="N", help="consider the last N recorded iterations (default: 10)"
    )
    blame.add_argument("--credit-only", action="store_true", help="read recorded advantages; make no environment")
    blame.add_argument(
        "--resample", type=int, default=0, metavar="K", help="also play on after each answer and K other ones, K times each"
    )
    blame.add_argument("--json", action="store_true", help="print one JSON object")

    export = command(
        "export",
        "Export one agent of a run as a Hugging Face folder, which transformers loads without collm.",
        "collm export runs/demo --agent builder_0 exported/builder_0\n"
        "  collm export runs/demo --agent builder_0 exported/builder_0 --push me/builder_0",
        "collm.cli.export:run",
    )
    export.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    export.add_argument("folder", type=Path, metavar="DIR", help="folder to write, which must not exist")
    export.add_argument("--agent", required=True, metavar="NAME", help="which agent of the team")
    export.add_argument("--checkpoint", metavar="N|best|final|start", default="final", help="which weights of the run")
    export.add_argument("--merged", action="store_true", help="merge an adapter into its base and write one model")
    export.add_argument("--push", metavar="REPO", help="also upload the folder to this repository of the model hub")
    export.add_argument("--json", action="store_true", help="print one JSON object")

    serve = command(
        "serve",
        "Serve one agent of a run, or an exported folder, as an OpenAI-compatible endpoint until SIGTERM or Ctrl-C; with --all "
        "every agent of a run, on Ray Serve.",
        "collm serve runs/demo --agent builder_0 --port 8000\n"
        "  collm serve runs/demo --all --cluster.address local --replicas builder_0=2",
        "collm.cli.serve:run",
        settings=True,
    )
    serve.add_argument("run", type=Path, metavar="RUN|DIR", help="a run directory or an exported folder")
    which = serve.add_mutually_exclusive_group(required=True)
    which.add_argument("--agent", metavar="NAME", help="which agent of the team; clients send it as the model's name")
    which.add_argument("--all", action="store_true", help="every agent, on the Ray cluster of --cluster.address")
    serve.add_argument(
        "--replicas",
        action="append",
        default=[],
        metavar="AGENT=N|N-M",
        help="with --all: number of processes that serve an agent (default: 1); N-M: by load",
    )
    serve.add_argument("--port", type=int, default=8000, help="default: 8000; 0 takes a free port and prints it")
    serve.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine only; 0.0.0.0: the network")
    serve.add_argument("--checkpoint", metavar="N|best|final|start", default="final", help="which weights of a run")
    serve.add_argument("--api-key-env", metavar="NAME", help="require the API key that this environment variable holds")
    serve.add_argument("--max-tokens", type=int, default=256, help="max_tokens of requests that set none (default: 256)")
    serve.add_argument("--device", default="auto", help="cpu, cuda or auto (default)")
    serve.add_argument("--threads", type=int, help="CPU threads for torch; default: all usable cores")
    serve.add_argument("--record", type=Path, metavar="FILE", help="append begin and end of each request as JSON lines")

    play = command(
        "play",
        "Play a task with agents behind separate endpoints: decentralized execution without a critic.",
        "collm play agree --agent agent_0=http://127.0.0.1:8000/v1 --agent agent_1=http://10.0.0.2:8000/v1",
        "collm.cli.play:run",
        settings=True,
    )
    play.add_argument("task", metavar="TASK|RUN|RECIPE", help="name of a task, or a run or recipe with task and settings")
    play.add_argument(
        "--agent",
        action="append",
        default=[],
        metavar="NAME=URL",
        help="the endpoint of an agent; URL#MODEL also gives the model's name",
    )
    play.add_argument(
        "--episodes", type=int, metavar="N", help="episodes, a task each, the first again after the last; default: each once"
    )
    play.add_argument("--split", choices=("eval", "train"), default="eval", help="which tasks; default: eval (held out)")
    play.add_argument("--api-key-env", metavar="NAME", help="send the API key that this environment variable holds")
    play.add_argument("--timeout", type=float, default=120.0, metavar="S", help="seconds to wait for one answer (default: 120)")
    play.add_argument("--retries", type=int, default=4, metavar="N", help="retries of a failed request (default: 4)")
    play.add_argument("--max-requests", type=int, metavar="N", help="limit of HTTP requests, retries included; default: none")
    play.add_argument("--show", action="store_true", help="also print the episodes: what each agent read and wrote")
    play.add_argument("--json", action="store_true", help="print one JSON object")

    check = command(
        "check",
        "Check the contract of an environment: a built-in one by name, or your own as module:Class.",
        "collm check str_build --env.world=persistent\n  collm check my_task:MyEnv",
        "collm.cli.lists:check",
        settings=True,
    )
    check.add_argument("env", metavar="ENV", help="a task's name or module:Class")
    check.add_argument("--json", action="store_true", help="print one JSON object")
    for name, text in (("tasks", "List the built-in tasks and their options."), ("algorithms", "List the algorithms.")):
        sub = command(name, text, f"collm {name}", f"collm.cli.lists:{name}")
        sub.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _import(target: str) -> Any:
    from importlib import import_module

    module, _, attribute = target.partition(":")
    return getattr(import_module(module), attribute)


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Split `--room.key value` (or `--room.key=value`) pairs off a command line: (other words, {"room.key": value}).

    Raises ConfigError for a setting without a value.
    """
    words: list[str] = []
    overrides: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or "." not in name:
            words.append(word)
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"{word} needs a value: {word} VALUE.")
            value = rest.pop(0)
        overrides[name] = parse_value(value, name)
    return words, overrides


def settings_text() -> str:
    """All settings, one per line."""
    return "\n".join(f"--{name:<30} {default:<14} {sentence}" for name, default, sentence in describe())


if __name__ == "__main__":
    sys.exit(main())
