"""Joint actions per second of collm, the reference package comlrl 1.3.6, and the bare arithmetic, in one run.

    python benchmarks/throughput.py                     # one and four turns, three rounds: about half an hour
    python benchmarks/throughput.py --quick             # one short round
    python benchmarks/throughput.py --sides reference floor --turns 1 --json

One joint action is one answer of every agent at one turn: generated, rewarded once as a team, and learned from. The
measured time includes optimizer steps; it excludes imports, loading of models and a warm-up. Every measurement is a process of
its own, with its own peak memory (largest resident set, imports included). The sides are measured in turn within a round;
ratios are computed within a round; the median over the rounds is printed.

The work is the same on every side. Two agents, each a whole model of 0.92M parameters in float32, read 37 new tokens per turn
after all they read and wrote before, and answer with 64 tokens sampled from the whole vocabulary at temperature 1. The
model cannot end early and writes only letters, one token each, so lengths are the same on all sides; each side checks this.
With --history newest an agent reads the turn's 37 tokens alone, and a critic what the agents read then.

    collm       its own trainer
    reference   comlrl's trainers, in a virtual environment of their own, with this environment's version of transformers
    floor       batched calls of transformers and nothing else: the limit of this machine

The reference is installed once into DIR/reference, by pip, from the index that pip is configured to use. Everything runs on the
CPU. On one thread, CPU seconds far below seconds mean that another process used the core; the ratios per CPU second are then
the more stable ones.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

try:
    from pettingzoo import ParallelEnv
except ImportError:  # in the reference's environment
    ParallelEnv = object

import matched
from matched import Row, Stopwatch, count_turns, in_a_process, make_reference, peak_memory_mb

SIDES = ("collm", "reference", "floor")
NUM_AGENTS = 2
NEW_TOKENS = 37
"""The tokens that one agent reads at each turn: two marks and 35 characters."""
ANSWER_TOKENS = 64
TURN_TOKENS = NEW_TOKENS + ANSWER_TOKENS
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": ANSWER_TOKENS}
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<|end|>"
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
EPISODES = 128
"""Episodes in one iteration of collm and in one batch of the floor."""
TOKENS_AT_ONCE = 32 * 101
"""Tokens in one forward and backward pass of the floor: about the fastest on one core, since larger passes exceed the cache."""
GROUP = 4
WIDE = 32
"""Answers to one prompt that the reference generates in one call in the rows `maac-wide` and `iac-wide`."""

HISTORY = "full"
"""What an agent reads at later turns: all it has read and written ("full"), or the turn's 37 tokens alone ("newest")."""


# --- the work, the same for every side ---------------------------------------------------------------------------------


def observation(task: int, agent: int, turn: int) -> str:
    """The observation of an agent at a turn: 35 characters, different for every task, agent and turn."""
    return f"task {task:06d} agent {agent} turn {turn}".ljust(NEW_TOKENS - 2, ".")


def turn_text(task: int, agent: int, turn: int) -> str:
    """The observation as the chat template renders it, up to the mark that begins the answer: 37 tokens."""
    return f"{USER}{observation(task, agent, turn)}{ASSISTANT}"


def build_model(folder: Path) -> Row:
    """Save a random Qwen3 that writes 64 letters for any input, with a tokenizer of one token per byte.

    Dimension 0 of the residual stream is a large constant: every embedding has 10 there, and no layer writes to it (its row
    of each output projection is zero). The vocabulary head has a large negative weight on it for every token except letters, so
    that their probability is zero in float32. The few small updates of a measurement do not change that.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token="<|pad|>",
        additional_special_tokens=[USER, ASSISTANT],
        model_max_length=2048,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=TEMPLATE,
    )
    size = {"hidden_size": 128, "num_hidden_layers": 4, "vocab_size": 512, "intermediate_size": 384}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen3Config(**size, **heads, **special, max_position_embeddings=2048, tie_word_embeddings=False)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config).float()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 10.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        model.lm_head.weight[:, 0] = -10.0
        model.lm_head.weight[tokenizer.convert_tokens_to_ids(list(LETTERS)), 0] = 0.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"architecture": "Qwen3", "parameters": sum(p.numel() for p in model.parameters()), **size}


def check_lengths(tokenizer: Any) -> None:
    """A turn's text has 37 tokens, also after an answer."""
    text = turn_text(0, 0, 0) + "a" * ANSWER_TOKENS + turn_text(0, 0, 1)
    length = len(tokenizer(text)["input_ids"])
    if length != TURN_TOKENS + NEW_TOKENS:
        raise AssertionError(f"two prompts and one answer have {length} tokens, not {TURN_TOKENS + NEW_TOKENS}")


def row(method: str, turns: int, joint_actions: int, *watches: Stopwatch) -> Row:
    """One measurement, with the peak memory of this process so far."""
    return {
        "method": method,
        "turns": turns,
        "joint_actions": joint_actions,
        "seconds": sum(watch.wall for watch in watches),
        "cpu_seconds": sum(watch.cpu for watch in watches),
        "peak_memory_mb": peak_memory_mb(),
    }


# --- collm ---------------------------------------------------------------------------------------------------------------


def measure_collm(model: Path, method: str, turns: int, *, quick: bool) -> list[Row]:
    """Joint actions per second of collm's trainer: collect and one update of agents and critics.

    Runs in a process of its own: `throughput.py --side collm --method maac|iac|magrpo --turns T --model DIR`. The
    environment has `turns` turns, the observation `observation(task, agent, turn)` and the reward `team_reward(answers)`. An
    iteration has EPISODES episodes, for magrpo in groups of GROUP. Joint actions are counted by the environment's steps; the
    first iteration is the warm-up. Returns `[row(method, turns, joint_actions, stopwatch)]`.
    """
    from collm.settings.load import parse_config
    from collm.training.trainer import Trainer

    settings = {
        "run": {"iterations": 9, "threads": int(os.environ["OMP_NUM_THREADS"]), "trackers": []},
        "env": {"name": "throughput:make_world", "turns": turns},
        "team": {"model": str(model)},
        "rollout": {
            "tasks": EPISODES // (GROUP if method == "magrpo" else 1),
            "max_tokens": ANSWER_TOKENS,
            "history": HISTORY,
        },
        "algorithm": {"name": {"maac": "collm-cc", "iac": "collm-dc", "magrpo": "magrpo"}[method], "teammates": "none"},
        "critic": {"body": "auto"},  # a language model, as the reference's critics are
        "evaluation": {"every": 0},
    }
    with tempfile.TemporaryDirectory() as folder:
        settings["run"]["folder"] = folder
        trainer = Trainer(parse_config(settings), quiet=True)
        watch, joint_actions = Stopwatch(), 0
        for trainer.iteration in range(2 if quick else 4):
            with Stopwatch() if trainer.iteration == 0 else watch:
                groups = trainer.collect()
                trainer.learner.update(groups, trainer.iteration)
                trainer.engine.load(trainer.team)
            if trainer.iteration:
                joint_actions += count_turns(groups, ANSWER_TOKENS)
    return [row(method, turns, joint_actions, watch)]


def make_world(turns: int, split: str = "train") -> ParallelEnv:
    """The benchmark's environment for collm."""
    return matched.make_world(NUM_AGENTS, turns, observation, ANSWER_TOKENS)


# --- the reference -------------------------------------------------------------------------------------------------------


def measure_reference(model: Path, method: str, turns: int, *, quick: bool) -> list[Row]:
    """Joint actions per second of one comlrl trainer's `train()`.

    Joint actions are counted by calls of the reward function; the trainer's own count (`env_step`) must agree.
    Settings are the trainer's defaults except: no logging, no evaluation, no early end of an episode (by default the first
    reward above -0.2 ends it), the whole history in the prompt, and sampling from the whole vocabulary, the cheapest way.
    The actor-critic trainers generate for one prompt per call and learn from one sequence per pass with all settings; with
    one turn they can generate several answers to the prompt per call, and `maac-wide` and `iac-wide` do. MAGRPO over
    several turns grows a tree with GROUP joint actions at every node: GROUP + GROUP^2 + ... of one task.
    """
    from comlrl.trainers.actor_critic import IACConfig, IACTrainer, MAACConfig, MAACTrainer
    from comlrl.trainers.reinforce import MAGRPOConfig, MAGRPOTrainer
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    check_lengths(tokenizer)
    algorithm, _, width = method.partition("-")
    config_class, trainer_class, critics = {
        "maac": (MAACConfig, MAACTrainer, {"critic_model": str(model)}),
        "iac": (IACConfig, IACTrainer, {"critics": [str(model)] * NUM_AGENTS}),
        "magrpo": (MAGRPOConfig, MAGRPOTrainer, {}),
    }[algorithm]
    num_generations = GROUP if algorithm == "magrpo" else WIDE if width else 1
    per_task = sum(GROUP**depth for depth in range(1, turns + 1)) if algorithm == "magrpo" else turns * num_generations
    wanted = (64 if algorithm == "magrpo" else 4 * WIDE if width else 32) // (4 if quick else 1)
    num_tasks = max(1, wanted // per_task)
    counted = 0

    def reward(first: list[str], second: list[str]) -> list[float]:
        nonlocal counted
        counted += len(first)
        return [matched.team_reward(answers, ANSWER_TOKENS) for answers in zip(first, second, strict=True)]

    def transition(prompt: str, agent_completions: list[str], prompt_history_per_agent: list[list[str]], **_: Any) -> list[str]:
        """Each agent's next prompt: the current observation, after (with the full history) all it read and wrote so far."""
        return [
            (seen[-1] + answer if HISTORY == "full" else "") + turn_text(int(prompt), agent, len(seen))
            for agent, (seen, answer) in enumerate(zip(prompt_history_per_agent, agent_completions, strict=True))
        ]

    args = config_class(
        num_agents=NUM_AGENTS,
        num_turns=turns,
        num_generations=num_generations,
        num_train_epochs=1,
        **SAMPLING,
        early_termination_threshold=None,
        external_prompt_passthrough=True,
        eval_interval=0,
    )
    trainer = trainer_class(
        agents=[str(model)] * NUM_AGENTS,
        tokenizer=tokenizer,
        reward_func=reward,
        formatters=[lambda item, agent=agent: turn_text(int(item["prompt"]), agent, 0) for agent in range(NUM_AGENTS)],
        external_transition=transition,
        args=args,
        **critics,
    )
    trainer.verbose = False

    def train(tasks: range) -> Stopwatch:
        trainer.train_dataset = [{"prompt": str(task)} for task in tasks]
        watch = Stopwatch()
        with watch:
            trainer.train()
        return watch

    if algorithm == "magrpo":
        args.num_turns = 1  # a whole tree is not needed for the warm-up
    train(range(2))
    args.num_turns, counted, before = turns, 0, trainer.env_step
    watch = train(range(2, 2 + num_tasks))
    if not counted == trainer.env_step - before == num_tasks * per_task:
        raise AssertionError(f"the reward saw {counted} joint actions, the trainer counts {trainer.env_step - before}")
    return [row(method, turns, counted, watch)]


# --- the floor -----------------------------------------------------------------------------------------------------------


def measure_floor(model: Path, method: str, turns: int, *, quick: bool) -> list[Row]:
    """Joint actions per second of batched transformers calls: EPISODES episodes generated, then learned from once.

    Each turn's generation is prefilled with the whole history. Learning is one forward and backward pass per agent over
    whole histories, with vocabulary logits and log-softmax at the answers' tokens only, and one AdamW step. Rows:
        actors           the agents alone
        critic           and a critic: a body without vocabulary head and a linear value at the end of every turn's prompts,
                         over both agents' prompts and all earlier answers; forward and backward once, one AdamW step
        critic-answers   the same, reading the last turn's answers too, as a critic of joint actions would
    """
    import torch
    from torch import Tensor, nn
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    check_lengths(tokenizer)
    agents = [AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32) for _ in range(NUM_AGENTS)]
    body = AutoModel.from_pretrained(model, dtype=torch.float32)
    value = nn.Linear(body.config.hidden_size, 1)
    optimizers = [torch.optim.AdamW(agent.parameters(), lr=5e-6) for agent in agents]
    critic_optimizer = torch.optim.AdamW([*body.parameters(), *value.parameters()], lr=5e-6)

    def generate(num: int, agent: int, turns: int) -> Tensor:
        ids_EL = torch.zeros(num, 0, dtype=torch.int64)
        for turn in range(turns):
            new = tokenizer([turn_text(task, agent, turn) for task in range(num)], return_tensors="pt")["input_ids"]
            ids_EL = torch.cat([ids_EL, new], dim=1)
            mask_EL = torch.ones_like(ids_EL)
            ids_EL = agents[agent].generate(input_ids=ids_EL, attention_mask=mask_EL, do_sample=True, **SAMPLING)
            matched.team_reward(tokenizer.batch_decode(ids_EL[:, (turn + 1) * TURN_TOKENS - ANSWER_TOKENS :]), ANSWER_TOKENS)
        return ids_EL

    def passes(ids_EL: Tensor, loss_of: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        for ids_BL in ids_EL.split(max(1, TOKENS_AT_ONCE // ids_EL.shape[1])):
            loss_of(ids_BL).backward()
        optimizer.step()

    def learn(agent: int, ids_EL: Tensor) -> None:
        columns = torch.arange(ids_EL.shape[1])
        columns = columns[columns % TURN_TOKENS >= NEW_TOKENS]

        def loss_of(ids_BL: Tensor) -> Tensor:
            hidden = agents[agent].model(input_ids=ids_BL, use_cache=False).last_hidden_state[:, columns - 1]
            logps = agents[agent].lm_head(hidden).log_softmax(-1).gather(-1, ids_BL[:, columns, None])
            return logps.sum() / len(ids_EL)

        passes(ids_EL, loss_of, optimizers[agent])

    def criticize(ids_AEL: list[Tensor], answers: bool) -> None:
        """Joint text: at each turn what each agent read, then what each agent answered."""
        ids_ETAP = torch.stack(ids_AEL).unflatten(-1, (-1, TURN_TOKENS)).permute(1, 2, 0, 3)
        joint_ETP = torch.cat([ids_ETAP[..., :NEW_TOKENS].flatten(2), ids_ETAP[..., NEW_TOKENS:].flatten(2)], dim=-1)
        joint_EL = joint_ETP.flatten(1)
        joint_EL = joint_EL if answers else joint_EL[:, : -NUM_AGENTS * ANSWER_TOKENS]
        markers = torch.arange(joint_ETP.shape[1]) * NUM_AGENTS * TURN_TOKENS + NUM_AGENTS * NEW_TOKENS - 1

        def loss_of(ids_BL: Tensor) -> Tensor:
            hidden = body(input_ids=ids_BL, use_cache=False).last_hidden_state[:, markers]
            return (value(hidden) - 0.5).square().sum() / len(joint_EL)

        passes(joint_EL, loss_of, critic_optimizer)

    def run(num: int, turns: int) -> Iterator[Row]:
        actors, histories = Stopwatch(), []
        with actors:
            for agent in range(NUM_AGENTS):
                once = [generate(num, agent, turns)] if HISTORY == "full" else [generate(num, agent, 1) for _ in range(turns)]
                histories.append(torch.cat(once))
                learn(agent, histories[agent])
        yield row("actors", turns, num * turns, actors)
        for name, answers in (("critic", False), ("critic-answers", True)):
            critic = Stopwatch()
            with critic:
                criticize(histories, answers)
            yield row(name, turns, num * turns, actors, critic)

    list(run(16, 1))  # the warm-up
    return list(run(EPISODES, turns))


# --- rounds, medians, ratios ---------------------------------------------------------------------------------------------

CASES = {
    "collm": lambda turns: ["maac", "iac", "magrpo"],
    "reference": lambda turns: ["maac", "iac", "magrpo"] + (["maac-wide", "iac-wide"] if turns == 1 else []),
    "floor": lambda turns: ["all"],
}
MEASURE = {"collm": measure_collm, "reference": measure_reference, "floor": measure_floor}
COMPARED = [
    *(("collm", method, "reference", method) for method in ("maac", "iac", "magrpo")),
    *(("collm", method, "reference", f"{method}-wide") for method in ("maac", "iac")),
    *(("collm", "maac", "floor", "critic"), ("collm", "magrpo", "floor", "actors")),
    *(("floor", "critic", "reference", "maac"), ("floor", "actors", "reference", "magrpo")),
]
"""Ratios of joint actions per second: (side, method) divided by (side, method)."""


def measured(side: str, method: str, turns: int, python: Path, model: Path, options: argparse.Namespace) -> list[Row]:
    """The rows of one measurement."""
    command = [python, __file__, "--side", side, "--method", method, "--turns", str(turns), "--model", model]
    command += ["--threads", str(options.threads), "--history", options.history]
    command += ["--quick"] if options.quick else []
    rows: list[Row] = in_a_process(command, options.threads)
    for r in rows:
        r |= {"side": side, "joint_actions_per_second": r["joint_actions"] / r["seconds"]}
        print(f"  {side} {r['method']}, turns={turns}: {r['joint_actions_per_second']:.2f}", file=sys.stderr)
    return rows


def medians(rounds: list[list[Row]]) -> list[Row]:
    """Every measurement's median over the rounds, and its joint actions per second in each of them."""
    results = []
    for same in zip(*rounds, strict=True):
        result = {name: same[0][name] for name in ("side", "method", "turns", "joint_actions")}
        for name in ("joint_actions_per_second", "peak_memory_mb", "seconds", "cpu_seconds"):
            result[name] = statistics.median(r[name] for r in same)
        results.append(result | {"rounds": [r["joint_actions_per_second"] for r in same]})
    return results


def ratios(rounds: list[list[Row]], unit: str) -> dict[str, float]:
    """Ratios of joint actions per unit ("seconds" or "cpu_seconds"), taken within each round: their medians."""
    rates = [{(r["side"], r["method"], r["turns"]): r["joint_actions"] / r[unit] for r in rows} for rows in rounds]
    found = {}
    for turns in sorted({r["turns"] for r in rounds[0]}):
        for side, method, other, baseline in COMPARED:
            over, under = (side, method, turns), (other, baseline, turns)
            if over in rates[0] and under in rates[0]:
                name = f"{side} {method} / {other} {baseline}, turns={turns}"
                found[name] = statistics.median(rate[over] / rate[under] for rate in rates)
    return found


def show(report: Row) -> None:
    """The report as two plain tables: measurements, then ratios."""
    size, threads, history = report["model"]["parameters"], report["threads"], report["history"]
    print(f"joint actions per second, {threads} thread(s), history={history}, model of {size:,} parameters")
    layout = "{:<10} {:<15} {:>5} {:>10} {:>14} {:>6} {:>8} {:>8} {:>8}"
    print(layout.format("side", "method", "turns", "per second", "min..max", "MB", "counted", "seconds", "CPU"))
    for r in report["results"]:
        numbers = f"{r['joint_actions_per_second']:.2f}", f"{min(r['rounds']):.2f}..{max(r['rounds']):.2f}"
        costs = round(r["peak_memory_mb"]), r["joint_actions"], round(r["seconds"], 1), round(r["cpu_seconds"], 1)
        print(layout.format(r["side"], r["method"], r["turns"], *numbers, *costs))
    print(f"{'ratio of joint actions':<55} {'per second':>12} {'per CPU sec.':>12}")
    for name, ratio in report["ratios"].items():
        print(f"{name:<55} {ratio:>12.2f} {report['cpu_ratios'][name]:>12.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--sides", nargs="+", choices=SIDES, default=SIDES, help="which sides to measure")
    add("--turns", nargs="+", type=int, choices=range(1, 10), default=[1, 4], help="turns of an episode (default: 1 4)")
    add("--history", choices=("full", "newest"), default="full", help="what an agent reads at later turns (default: full)")
    add("--methods", nargs="+", default=["maac", "iac", "magrpo"], help="which methods (default: maac iac magrpo)")
    add("--threads", type=int, default=1, help="CPU threads of every side (default: 1)")
    add("--repeats", type=int, default=3, help="rounds (default: 3)")
    add("--quick", action="store_true", help="one round, less work of the reference, no MAGRPO tree over several turns")
    add("--work", type=Path, default=Path(__file__).parent / ".work", metavar="DIR", help="folder of model and reference")
    add("--json", action="store_true", help="print one JSON object instead of tables")
    add("--side", choices=[*SIDES, "model"], help=argparse.SUPPRESS)  # one measurement, in this process
    add("--method", help=argparse.SUPPRESS)
    add("--model", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        measure_here(options)
        return
    model = options.work.resolve() / "model"
    python = {side: Path(sys.executable) for side in SIDES}
    if "reference" in options.sides:
        python["reference"] = make_reference(options.work.resolve() / "reference")
    size = in_a_process([sys.executable, __file__, "--side", "model", "--model", model], threads=1)
    rounds: list[list[Row]] = []
    for number in range(1 if options.quick else options.repeats):
        print(f"round {number + 1}", file=sys.stderr)
        rounds.append([])
        for turns, side in product(options.turns, options.sides):
            for method in CASES[side](turns):
                wanted = side == "floor" or method.split("-")[0] in options.methods
                if wanted and not (options.quick and side == "reference" and method == "magrpo" and turns > 1):
                    rounds[-1] += measured(side, method, turns, python[side], model, options)
    report = {"threads": options.threads, "history": options.history, "model": size, "results": medians(rounds)}
    report |= {"ratios": ratios(rounds, "seconds"), "cpu_ratios": ratios(rounds, "cpu_seconds")}
    if options.json:
        print(json.dumps(report))
    else:
        show(report)


def measure_here(options: argparse.Namespace) -> None:
    """Build the model, or take one measurement, in this process; prints JSON on the last line."""
    import torch

    global HISTORY
    HISTORY = options.history
    torch.set_num_threads(options.threads)
    random.seed(0)
    torch.manual_seed(0)
    if options.side == "model":
        result: Any = build_model(options.model)
    else:
        result = MEASURE[options.side](options.model, options.method, options.turns[0], quick=options.quick)
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    main()
