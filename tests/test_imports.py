"""Who may import whom (docs: DESIGN, "Rooms"), read from the syntax tree."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "collm"
FILES = sorted(PACKAGE.rglob("*.py"))

# Room -> what of collm its files may import besides their own room; "envs.base" means that module alone.
RECORDS = {"types", "errors", "machine", "seeds", "settings"}
MAY = {
    "types": {"errors", "seeds"},
    "errors": set(),
    "machine": set(),
    "seeds": set(),
    "settings": {"errors"},
    "algorithms": {"errors"},
    "sandbox": {"errors", "machine"},
    "envs": {"types", "errors", "seeds", "sandbox"},
    "models": {"types", "errors", "settings", "algorithms"},
    "tiny": {"types", "errors", "seeds", "envs", "models"},
    "engines": {"types", "errors", "settings", "algorithms", "models"},
    "rollout": {"types", "errors", "machine", "seeds", "envs.base", "envs.gate", "engines.base"},
    "learning": RECORDS | {"algorithms", "models"},
    "planning": {"settings", "errors", "machine", "envs", "models.blueprint", "models.sources", "models.sharing"},
    "runs": RECORDS | {"learning", "models"},
    "serving": {"types", "errors", "settings", "algorithms", "models", "engines", "runs"},
    "cluster": RECORDS | {"algorithms", "envs", "models", "engines", "rollout", "learning", "planning", "runs", "serving"},
    "training": RECORDS | {"algorithms", "envs", "models", "engines", "rollout", "learning", "runs", "cluster"},
    "studies": {"types", "errors", "settings", "runs"},  # a run is a process: nothing that trains is imported
    "reports": {"types", "errors", "runs", "studies"},
    "cli": {"settings", "models.blueprint", "errors", "machine", "envs", "reports", "planning", "runs", "studies"},
    # of cli this is what is imported at module level (none of them imports torch); inside functions everything
    "": set(),  # collm/__init__.py
}
# File -> what it may import besides, inside functions alone: it stands low and is light, and reaches up when it is called.
INSIDE = {
    "runs/open.py": {"engines", "reports", "training"},
    "runs/weights.py": {"training"},
    "studies/compare.py": {"cluster"},
    "studies/fidelity.py": {"training"},
    "studies/blame.py": {"engines", "rollout", "training"},
}
NO_TORCH = ("types", "errors", "machine", "seeds", "settings", "sandbox", "envs", "studies", "reports", "planning", "")
NO_TORCH_FILES = ("models/blueprint.py", "models/sources.py", "models/sharing.py")
WORKSHOP = "tiny/workshop/"  # made the shipped model; only its own files import it
HEAVY = {"torch", "transformers", "tokenizers", "safetensors", "accelerate", "peft", "vllm"}
DOORS = {
    "datasets": "envs/data.py",
    "ray": "cluster/",
    "vllm": "engines/vllm.py",
    "wandb": "runs/trackers.py",
    "mlflow": "runs/trackers.py",
    "trackio": "runs/trackers.py",
    "fastapi": "serving/",
    "httpx": "engines/http.py",
    "prometheus_client": "serving/",
    "starlette": "serving/",
    "uvicorn": "serving/",
}


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def imports_of(path: Path) -> list[tuple[str, int, bool]]:
    """(dotted name, line, at module level) of every import; `if TYPE_CHECKING:` is not followed."""
    found: list[tuple[str, int, bool]] = []

    def visit(node: ast.AST, top: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, node.lineno, top) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative import"
            found.extend((f"{node.module}.{alias.name}", node.lineno, top) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child, top and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    visit(ast.parse(path.read_text(encoding="utf-8")), True)
    return found


def allowed(room: str, name: str, top: bool) -> bool:
    """May a file of `room` import collm's `name` (without "collm.")?"""
    if room == "cli" and not top:
        return True
    target = name.split(".")[0]
    return target == room or any(name == may or name.startswith(may + ".") for may in MAY[room])


def violations(path: Path) -> list[str]:
    room, where = room_of(path), path.relative_to(PACKAGE).as_posix()
    found = []
    for name, line, top in imports_of(path):
        base = name.split(".")[0]
        inside = not top and name.removeprefix("collm.").split(".")[0] in INSIDE.get(where, ())
        if base == "collm" and not inside and not allowed(room, name.removeprefix("collm").lstrip("."), top):
            found.append(f"{where}:{line} imports {name}")
        if name.startswith("collm.tiny.workshop") and not where.startswith(WORKSHOP):
            found.append(f"{where}:{line} imports {name}, which nothing outside the workshop needs")
        light = room == "planning" and base == "tokenizers" and not top  # it counts a prompt's tokens, and loads no torch
        if base in HEAVY and not light and (room in NO_TORCH or where in NO_TORCH_FILES or (room == "cli" and top)):
            found.append(f"{where}:{line} imports {base}")
        if base in DOORS and not where.startswith(DOORS[base]):
            found.append(f"{where}:{line} imports {base}, whose door is {DOORS[base]}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_stay_within_the_rules(path):
    assert room_of(path) in MAY, f"{path} belongs to no room of the design"
    assert violations(path) == []


def test_the_walk_sees_what_it_should(tmp_path):
    """The rule itself: functions, classes and branches are walked, and forbidden imports are found in each."""
    path = tmp_path / "x.py"
    path.write_text(
        "import torch.nn as nn\nfrom collm import seeds\nfrom collm.envs import base\nclass A:\n    import ray\n"
        "def f():\n    from collm.training.trainer import Trainer\n"
        "if 1:\n    try:\n        import wandb\n    except ImportError: pass\n"
    )
    assert imports_of(path) == [
        ("torch.nn", 1, True), ("collm.seeds", 2, True), ("collm.envs.base", 3, True), ("ray", 5, True),
        ("collm.training.trainer.Trainer", 7, False), ("wandb", 10, True),
    ]  # fmt: skip
    assert not allowed("envs", "training.trainer.Trainer", False)
    assert allowed("cli", "training.trainer.Trainer", False)
    assert not allowed("cli", "training.trainer.Trainer", True)
    assert allowed("rollout", "envs.base.TextEnv", True)
    assert not allowed("rollout", "envs.catalogue.EnvSpec", True)
    assert not allowed("rollout", "envs.baseline", True)
    assert not allowed("settings", "types.Sampling", True)


def test_nothing_outside_the_workshop_imports_it(tmp_path, monkeypatch):
    """Also not inside a function of the command line, which may import everything else there."""
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    lines = "def f():\n    from collm.tiny import folder, workshop\n    from collm.tiny.workshop.pretrain import main\n"
    for where, num_found in (("cli/x.py", 2), ("tiny/x.py", 2), ("tiny/workshop/x.py", 0)):
        path = tmp_path / where
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(lines)
        assert len(violations(path)) == num_found


def circle_of(package: Path) -> list[str]:
    """Modules of a package that import each other in a circle when they are loaded, the first again at the end; [] if there are
    none. Imports inside functions, and those for type checkers alone, run later or never."""
    names = {
        ".".join((package.name, *p.relative_to(package).with_suffix("").parts)).removesuffix(".__init__"): p
        for p in package.rglob("*.py")
    }

    def module(name: str) -> str:
        return name if name in names else name.rpartition(".")[0]

    graph = {
        here: {module(name) for name, _, top in imports_of(path) if top} & (names.keys() - {here})
        for here, path in names.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [str(name) for name in error.args[1]]
    return []


def test_no_modules_import_each_other_in_a_circle():
    assert circle_of(PACKAGE) == []


def test_a_planted_circle_is_found(tmp_path):
    package = tmp_path / "planted"
    (package / "room").mkdir(parents=True)
    (package / "room" / "__init__.py").write_text("")
    (package / "a.py").write_text("import planted.room.b\n")
    (package / "room" / "b.py").write_text("import os\nfrom planted import c\n")
    apart = (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from planted.a import A\n"
        "def f():\n    from planted.a import A\n"
    )
    (package / "c.py").write_text(apart)
    assert circle_of(package) == []
    (package / "c.py").write_text(f"{apart}try:\n    from planted.a import A\nexcept ImportError: pass\n")
    circle = circle_of(package)
    assert circle[0] == circle[-1]
    assert set(circle) == {"planted.a", "planted.room.b", "planted.c"}


def test_the_light_rooms_load_no_torch():
    """Also not by way of something they import."""
    modules = ["collm", "collm.types", "collm.errors", "collm.seeds", "collm.settings.load", "collm.cli.main"]
    modules += [f"collm.{name.removesuffix('.py').replace('/', '.')}" for name in NO_TORCH_FILES]
    modules += ["collm.runs.open", "collm.runs.weights"]
    modules += [
        f"collm.{p.relative_to(PACKAGE).with_suffix('').as_posix().replace('/', '.')}"
        for p in sorted((PACKAGE / "envs").rglob("*.py"))
    ]
    modules += [
        f"collm.{room}.{p.stem}" for room in ("studies", "planning", "cli") for p in sorted((PACKAGE / room).glob("*.py"))
    ]
    code = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name.removesuffix('.__init__'))\n"
    code += f"    heavy = set({sorted(HEAVY)!r}) & set(sys.modules)\n"
    code += "    assert not heavy, (name, heavy)\n"
    done = subprocess.run([sys.executable, "-c", code, *modules], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-500:]


def test_no_file_is_named_after_nothing():
    assert not {p.stem for p in FILES} & {"utils", "util", "common", "helpers", "manager", "misc", "legacy"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_file_is_long(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= (200 if path.name == "trainer.py" else 400)


def test_every_public_name_can_be_had():
    import collm

    for name in collm.__all__:
        assert getattr(collm, name).__name__ == name
    with pytest.raises(AttributeError, match="nonsense"):
        _ = collm.nonsense
