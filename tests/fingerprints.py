"""Fingerprints of small training runs: a hash of every weight, and every metric, of one commit or of two side by side.

    python tests/fingerprints.py                     # this commit: {configuration: fingerprint} as JSON
    python tests/fingerprints.py --against COMMIT    # this commit beside another one, here; exit code 1 if any differs
    python tests/fingerprints.py --record            # write tests/fingerprints.json, which test_fingerprints.py compares with

A refactor is proved by equal fingerprints. Bits differ between processors and versions of torch, so recorded fingerprints are
kept per processor and version. Every rate and the kind of critic are stated here, so that a new default does not change a
configuration.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).with_name("fingerprints.json")

AGREE = {"name": "agree", "agents": 2, "turns": 2, "wording": "terse"}
BUILD = {"name": "str_build", "wording": "terse", "world": "persistent", "reward": "sparse", "turns": 3, "strings": ["IT", "C"]}
RATES = {"learner": {"lr": 1e-3}, "critic": {"lr": 1e-3, "body": "auto"}}
DEFAULT: dict[str, dict[str, Any]] = {
    "env": AGREE,
    "rollout": {"tasks": 4, "max_tokens": 4, "temperature": 1.0},
    "evaluation": {"every": 0},
    **RATES,
}
CONFIGURATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "collm-cc": {"algorithm": {"name": "collm-cc"}, "env": BUILD, "rollout": {"max_tokens": 24}},
    "collm-cc, no language model as critic": {
        "algorithm": {"name": "collm-cc"},
        "env": BUILD,
        "rollout": {"max_tokens": 24},
        "critic": {"body": "none"},
    },
    "collm-cc-paper": {"algorithm": {"name": "collm-cc-paper"}},
    "collm-dc": {"algorithm": {"name": "collm-dc"}, "env": BUILD, "rollout": {"max_tokens": 24}},
    "collm-dc, no language model as critic": {
        "algorithm": {"name": "collm-dc"},
        "env": BUILD,
        "rollout": {"max_tokens": 24},
        "critic": {"body": "none"},
    },
    "magrpo": {"algorithm": {"name": "magrpo"}},
    "marloo": {"algorithm": {"name": "marloo"}},
    "maremax": {"algorithm": {"name": "maremax"}},
    "mareinforce": {"algorithm": {"name": "mareinforce"}},
    "ac": {"algorithm": {"name": "ac"}, "env": {**AGREE, "agents": 1}},
    "grpo": {"algorithm": {"name": "grpo"}, "env": {**AGREE, "agents": 1}},
    "value heads": {"algorithm": {"name": "collm-dc"}, "critic": {"body": "policy"}},
    "joint Q": {"algorithm": {"name": "collm-cc", "baseline": "counterfactual", "resamples": 2}},
    "own Q": {"algorithm": {"name": "collm-dc", "baseline": "counterfactual", "resamples": 2}},
    "turn tree": {"algorithm": {"name": "magrpo", "tree": True, "group_size": 3}, "rollout": {"tasks": 2}},
    "ratio per token": {"algorithm": {"name": "collm-cc", "loss": "ppo_clip", "epochs": 2}},
    "ratio per answer": {"algorithm": {"name": "magrpo", "loss": "sequence_clip", "epochs": 2, "normalize": "agent"}},
    "group deviation": {"algorithm": {"name": "magrpo", "normalize": "group"}},
    "PopArt, warm-up, state": {
        "algorithm": {"name": "collm-cc", "lam": 0.5, "normalize": "agent"},
        "critic": {"normalize_targets": True, "warmup": 1, "epochs": 2, "state": True},
    },
    "KL to the start": {"algorithm": {"name": "magrpo", "kl_coef": 0.01}},
    "shared policy": {"algorithm": {"name": "collm-cc"}, "team": {"shared": True}},
    "shared policy, value head": {"algorithm": {"name": "collm-dc"}, "critic": {"body": "policy"}, "team": {"shared": True}},
    "LoRA": {"algorithm": {"name": "collm-cc"}, "team": {"lora": {"rank": 4}}},
    "LoRA in bfloat16": {
        "algorithm": {"name": "collm-cc"},
        "team": {"compute": "bfloat16", "lora": {"rank": 4}},
    },
    "LoRA, critics that are whole models": {
        "algorithm": {"name": "collm-cc"},
        "critic": {"body": "model"},
        "team": {"lora": {"rank": 4}},
    },
    "LoRA, KL, value heads": {
        "algorithm": {"name": "collm-dc", "kl_coef": 0.01},
        "critic": {"body": "policy"},
        "team": {"lora": {"rank": 4}},
    },
    "adapter beside a whole model": {
        "algorithm": {"name": "collm-cc"},
        "team": {"lora": {"rank": 4, "agents": ["agent_0"]}},
        "learner": {"micro_batch_tokens": 256, "gradient_checkpointing": True},
    },
    "cut histories, small support": {
        "algorithm": {"name": "collm-dc"},
        "env": {**AGREE, "turns": 3},
        "rollout": {"history": "last", "max_turns": 2, "temperature": 0.9, "top_p": 0.95, "top_k": 20},
    },
    "newest observation, evaluation": {
        "algorithm": {"name": "magrpo"},
        "rollout": {"history": "newest"},
        "evaluation": {"every": 2, "episodes": 1},
    },
    "frozen team-mate on a server": {"algorithm": {"name": "collm-cc"}, "team": {"models": {"agent_1": "SERVER"}}},
}


def settings_of(name: str, folder: Path, server: str) -> dict[str, dict[str, Any]]:
    """All settings of one configuration, as nested plain values."""
    values = {room: dict(settings) for room, settings in DEFAULT.items()}
    for room, settings in CONFIGURATIONS[name].items():
        values[room] = dict(settings) if room == "env" else {**values.get(room, {}), **settings}
    values["algorithm"].setdefault("max_drop", "none")
    if values["algorithm"]["name"] in ("magrpo", "marloo", "maremax", "mareinforce", "grpo"):
        values["critic"] = {}
    if "models" in values.get("team", {}):
        values["team"] = {"models": {agent: server for agent in values["team"]["models"]}}
    values["run"] = {"name": "run", "folder": str(folder), "iterations": 3, "threads": 1, "device": "cpu", "trackers": []}
    return values


def fingerprint(name: str, server: str = "") -> dict[str, Any]:
    """Trains one configuration and returns {"weights": hash, "episodes": hash, "metrics": {name: hex of the last value}}."""
    from collm.settings.load import parse_config
    from collm.training.trainer import Trainer

    with tempfile.TemporaryDirectory() as folder:
        run = Trainer(parse_config(settings_of(name, Path(folder), server)), quiet=True).run()
        return {"weights": _weights(run), "episodes": _episodes(run), "metrics": _metrics(run)}


def _weights(run: Path) -> str:
    """A hash over every tensor of the last checkpoint, optimizers included, whatever its files and tensors are called."""
    from safetensors.numpy import load_file

    newest = max((run / "checkpoints").glob("[0-9]*"))
    tensors = [tensor for path in newest.glob("*.safetensors") for tensor in load_file(path).values()]
    hashes = sorted(hashlib.sha256(f"{t.dtype}{t.shape}".encode() + t.tobytes()).hexdigest() for t in tensors)
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]


def _episodes(run: Path) -> str:
    """A hash over what was read and written in all saved episodes."""
    seen = []
    for path in sorted((run / "episodes").glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            episode = json.loads(line)
            turns = [(t["reward"], {a: (x["read"], x["wrote"]) for a, x in t["agents"].items()}) for t in episode["turns"]]
            seen.append((path.name, episode["task"], turns))
    return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()[:16]


def _metrics(run: Path) -> dict[str, str]:
    """The last line's numbers, exactly; seconds are left out."""
    last = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return {k: float(v).hex() for k, v in sorted(last.items()) if isinstance(v, (int, float)) and not k.startswith("seconds")}


def fingerprints() -> dict[str, Any]:
    """Of all configurations."""
    sys.path.insert(0, str(Path(__file__).parent))
    from servers import completion, http, serve

    with serve(lambda request, number, connection: http(completion("red"))) as served:
        return {name: fingerprint(name, served.url) for name in CONFIGURATIONS}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One sentence for each part of each configuration that differs. New metrics are not differences; renamed ones are
    compared under their present names."""
    from collm.runs.read import present_name

    found = []
    for name in before:
        if name not in now:
            found.append(f"{name}: missing")
            continue
        found += [f"{name}: {what}" for what in ("weights", "episodes") if before[name][what] != now[name][what]]
        for metric, value in before[name]["metrics"].items():
            if now[name]["metrics"].get(present_name(metric)) != value:
                found.append(f"{name}: metric {metric}")
    return found


def machine() -> str:
    """What bits depend on: the processor, with what a virtual machine shows of it, and the version of torch."""
    import torch

    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    processor = " ".join(fields.get(key, "?") for key in ("model name", "cpu family", "model", "stepping"))
    flags = hashlib.sha256(" ".join(sorted(fields.get("flags", "").split())).encode()).hexdigest()[:8]
    return f"{processor}, flags {flags}, torch {torch.__version__}"


def of_commit(commit: str) -> dict[str, Any]:
    """The fingerprints of another commit, which is checked out into a temporary folder, by its own script: settings may have
    had other names there."""
    here = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder) / "checkout"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(checkout), commit], cwd=here, check=True)
        try:
            environment = {**os.environ, "PYTHONPATH": str(checkout)}
            command = [sys.executable, str(checkout / "tests" / Path(__file__).name)]
            done = subprocess.run(command, cwd=checkout, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(checkout)], cwd=here, check=True)
    return json.loads(done.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="COMMIT", help="compare with this commit")
    parser.add_argument("--record", action="store_true", help=f"write {RECORDED.name} for this machine")
    options = parser.parse_args()
    before = of_commit(options.against) if options.against else None
    now = fingerprints()
    if before is not None:
        found = differences(before, now)
        print("\n".join(found) or f"all {len(before)} configurations equal those of {options.against}")
        return bool(found)
    if options.record:
        kept = json.loads(RECORDED.read_text(encoding="utf-8")) if RECORDED.exists() else {}
        RECORDED.write_text(json.dumps({**kept, machine(): now}, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return 0
    print(json.dumps(now, indent=1))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
