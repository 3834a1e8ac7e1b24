"""The files for SLURM and Kubernetes in docs/cluster.md are well-formed; they were not run on such a cluster."""

from __future__ import annotations

import re
import shlex
import subprocess

import pytest
from places import ROOT

from collm.cli.main import make_parser, split_overrides

TEXT = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)
    return found


def check_command(words: list[str]) -> None:
    """It is a `collm` command with known arguments, on the cluster that its machine belongs to."""
    assert words[0] == "collm"
    known, overrides = split_overrides(words[1:])
    assert make_parser().parse_args(known).command == "train"
    assert overrides["cluster.address"] == "auto"


def test_the_slurm_script_is_valid_and_begins_ray_on_every_node():
    script = block("bash")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert subprocess.run(["bash", "-n"], input=script + "\nif", text=True, capture_output=True).returncode != 0
    words = shlex.split(script.split("srun")[1].replace("\\\n", " "))
    split = words.index("--")
    assert words[words.index("ray") : split][:2] == ["ray", "symmetric-run"]
    assert {"--address", "--min-nodes", "--num-gpus"} <= set(words[:split])
    check_command(words[split + 1 :])


def test_the_slurm_scripts_options_are_rays():
    scripts = pytest.importorskip("ray.scripts.scripts", reason="ray is not installed: pip install 'collm[cluster]'")
    words = shlex.split(block("bash").split("srun")[1].replace("\\\n", " "))
    asked = {word for word in words[words.index("symmetric-run") : words.index("--")] if word.startswith("--")}
    known = {name for command in ("start", "symmetric-run") for o in scripts.cli.commands[command].params for name in o.opts}
    assert asked <= known


def test_the_kubernetes_file_is_a_ray_job():
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load(block("yaml"))
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    check_command(shlex.split(job["spec"]["entrypoint"]))
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    containers = [group["template"]["spec"]["containers"][0] for group in groups]
    assert len({container["image"] for container in containers}) == 1  # the same versions on every node
    for group, container in zip(groups, containers, strict=True):
        volumes = {volume["name"] for volume in group["template"]["spec"]["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
