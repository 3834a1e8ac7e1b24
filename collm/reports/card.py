"""The model card of an exported agent: README.md with a YAML header, in the form that model hubs read."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from collm.errors import RunError
from collm.reports.tables import held_out, spread
from collm.runs.directory import read_config
from collm.runs.open import Run, open_run
from collm.runs.read import read_evaluation
from collm.runs.weights import CARD, find_weights, saved_agents
from collm.studies.intervals import Interval, interval
from collm.studies.series import REWARD, scores


def card_of(source: Path, agent: str, checkpoint: str, *, adapter: bool = False) -> str:
    """The card of an agent of a run directory; of an exported folder, the card that it has, or "" if it has none.

    adapter: the weights are an adapter, not a whole model. Raises RunError or ConfigError as `find_weights`.
    """
    if (source / "tokenizer_config.json").is_file():
        return (source / CARD).read_text(encoding="utf-8") if (source / CARD).is_file() else ""
    return model_card(open_run(source), agent, checkpoint, adapter=adapter)


def model_card(run: Run, agent: str, checkpoint: str, *, adapter: bool = False) -> str:
    """The card of one agent: task, algorithm, seed, held-out results with intervals, and how to serve it.

    No path of this machine is named.
    """
    weights, _ = find_weights(run.folder, checkpoint)
    config = read_config(run.folder)
    done = _iterations(run, weights)
    task, algorithm = config.env.name, config.algorithm.name
    base = _public(config.team.models.get(agent, config.team.model))
    before, results = _results(run, 0), {} if done is None else _results(run, done)
    team = saved_agents(weights, shared=config.team.shared) if weights else ()
    facts = {
        "task": f"`{task}`",
        "team": ", ".join(f"`{name}`" for name in team),
        "algorithm": f"`{algorithm}`",
        "seed": str(config.run.seed),
        "iterations": "" if done is None else f"{done} of {config.run.iterations}",
        "initial model": f"`{base}`" if base else "",
    }
    lines = [f"| {name} | {fact} |" for name, fact in facts.items() if fact]
    return "\n".join(
        [
            f"---\n{_header(agent, task, algorithm, base, results, adapter)}\n---\n",
            f"# {agent}, trained on {task}\n",
            "One agent of a team that was trained with multi-agent reinforcement learning by `collm`.",
            "It acts on its own history alone: to run it, neither the critic nor a team-mate is needed.\n",
            "| | |\n|---|---|",
            *lines,
            "\n## Held-out results\n",
            *_table(before if done else {}, results),
            "\n## Use\n",
            "Download this repository to a folder, then serve the agent as an OpenAI-compatible endpoint:\n",
            f"```\ncollm serve FOLDER --agent {agent} --port 8000\n```\n",
            "Or load it without collm:\n",
            "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n",
            'model = AutoModelForCausalLM.from_pretrained("FOLDER")',
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n```\n',
            "The chat template makes its prompts; chats in `examples.jsonl`, if there are any, precede every history.\n",
        ]
    )


def _iterations(run: Run, weights: Path | None) -> int | None:
    """Number of iterations before weights were saved. None for final ones if the run does not end with the planned iteration:
    it was extended since, or did not train."""
    if weights is None:
        return 0
    if weights.name != "final":
        return int(weights.name)
    with suppress(RunError):
        if run.metrics and run.metrics[-1]["iteration"] == run.planned:
            return run.planned
    return None


def _header(agent: str, task: str, algorithm: str, base: str, results: dict[str, Interval], adapter: bool) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    reward = results.get(REWARD)
    kind, of = "text-generation", f"{task}, held-out tasks"
    found = [EvalResult(kind, task, of, REWARD, round(reward.mean, 4))] if reward and reward.mean == reward.mean else None
    return ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag=kind,
        base_model=base or None,
        tags=["collm", "multi-agent", "reinforcement-learning", algorithm],
        model_name=agent,
        eval_results=found,
    ).to_yaml()


def _results(run: Run, iteration: int) -> dict[str, Interval]:
    """Measure -> held-out mean after so many iterations, if the run recorded that evaluation."""
    if path := run.evaluations().get(iteration):
        with suppress(RunError):  # a file without an episode that was played to its end
            return {name: interval(list(by_task.values())) for name, by_task in scores(read_evaluation(path)).items()}
    return {}


def _table(before: dict[str, Interval], results: dict[str, Interval]) -> list[str]:
    if not results:
        return ["The run recorded no held-out evaluation of these weights."]
    columns = [before, results] if before else [results]
    head = ["measure", "before training", "these weights"] if before else ["measure", "these weights"]
    rows = [
        [name.replace("|", "\\|"), *(spread(column[name]) if name in column else "" for column in columns)] for name in results
    ]
    return [
        f"Means [95 % intervals] of the whole team over {held_out(results[REWARD].num_tasks)}.\n",
        *("| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)),
        *([f"\nThere is {results[REWARD].note}."] if results[REWARD].note else []),
    ]


def _public(model: str) -> str:
    """The name of a model that came from the hub, or "" for any other, such as a folder of the machine that trained."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if "/" in model and not Path(model).exists():
        with suppress(HFValidationError):
            files = [try_to_load_from_cache(model, name) for name in ("config.json", "adapter_config.json")]
            return model if any(isinstance(file, str) for file in files) else ""
    return ""
