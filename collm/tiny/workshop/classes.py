"""Poor programmers of `class_eval`, for pre-training.

They nearly always use the requested form, but most bodies belong to another method or have a wrong name, sign or number; some
methods are left out, and some of a team-mate's are also written.
"""

from __future__ import annotations

import random
import re

from collm.envs.coding.class_eval import ClassEval
from collm.envs.coding.class_samples import ITEMS, NUMBER
from collm.tiny.workshop.scripted import Chat, play

SLIPS = (("+", "-"), ("-", "+"), ("*", "+"), (">", "<"), ("<", ">"), (" + x", ""), ("y ", "x "), ("self.", ""), ("return ", ""))


def class_eval(rng: random.Random) -> list[Chat]:
    """One to three agents' chats about a class of the train split."""
    env = ClassEval(
        wording="terse",
        agents=rng.choices((1, 2, 3), weights=(1, 10, 2))[0],
        turns=rng.choice((1, 1, 2)),
        share=rng.choice(("parameters", "parameters", "round_robin")),
        feedback=rng.choice(("level", "level", "plain")),
    )
    return play(env, write_methods, rng)


def write_methods(env: ClassEval, agent: str, rng: random.Random) -> str:
    """Methods of the agent's own with bodies that are right now and then, and now and then one of another's."""
    listed = dict.fromkeys(env.owned[agent])
    if rng.random() < 0.2:
        listed[rng.choice(env.problem.methods)] = None
    if not env.owned[agent] and rng.random() < 0.8:
        return "pass"
    skill = rng.choice((0.1, 0.2, 0.3, 0.5))
    texts = [_method(env, name, skill, rng) for name in listed if rng.random() > 0.1]
    return _dressed("\n".join(texts) or "pass", env.problem.class_name, rng)


def _method(env: ClassEval, name: str, skill: float, rng: random.Random) -> str:
    head, body = _solution(env.problem.solution, name)
    draw = rng.random()
    if draw > skill:
        other = rng.choice(ITEMS if "self.items" in env.problem.solution else NUMBER).filled(rng.randint(2, 9))
        body = rng.choice((_slipped(body, rng), _slipped(body, rng), other.body, other.body, "pass", "return x", "return 0"))
    if rng.random() < 0.03:
        head = rng.choice((head.removesuffix(":"), head.replace("self, ", "self"), head.replace("self", "")))
    return f"{head}\n    {body}"


def _solution(solution: str, name: str) -> tuple[str, str]:
    """Head and body of a method of a built-in class, whose bodies have one line."""
    lines = solution.splitlines()
    place = next(number for number, line in enumerate(lines) if line.startswith(f"    def {name}("))
    return lines[place].strip(), lines[place + 1].strip()


def _slipped(body: str, rng: random.Random) -> str:
    """The body with one slip: a sign, a name, a number."""
    slips = [(old, new) for old, new in SLIPS if old in body]
    numbers = re.findall(r"\d", body)
    if numbers and (not slips or rng.random() < 0.3):
        return body.replace(rng.choice(numbers), str(rng.randint(0, 9)), 1)
    return body.replace(*rng.choice(slips), 1) if slips else body


def _dressed(code: str, class_name: str, rng: random.Random) -> str:
    """Bare, as asked for; sometimes in a fence or in the class."""
    draw = rng.random()
    if draw < 0.05:
        code = f"class {class_name}:\n" + "\n".join(f"    {line}" for line in code.splitlines())
    return f"```python\n{code}\n```" if draw > 0.9 else code
