"""The Dockerfile of one served agent: what it copies exists, and so does each command and option that it names.

Where Docker's daemon can be reached, a slow test builds the image and asks the agent in it.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import time
import tomllib

import httpx
import pytest
from places import ROOT
from servers import free_port

from collm.cli.main import make_parser
from collm.tiny import folder

TEXT = (ROOT / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions() -> list[tuple[str, str]]:
    """(name, arguments) of each instruction, its lines joined."""
    lines = re.sub(r"\\\n\s*", "", TEXT).splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line and not line.startswith("#")]  # type: ignore[misc]


def arguments(name: str) -> list[str]:
    return [given for each, given in instructions() if each == name]


def copied() -> list[str]:
    return [source for given in arguments("COPY") for source in given.split()[:-1]]


def test_every_instruction_is_known_and_the_first_names_a_python_of_the_project():
    names = [name for name, _ in instructions()]
    assert names[0] == "FROM"
    assert set(names) <= set("FROM ARG WORKDIR COPY RUN USER EXPOSE HEALTHCHECK ENTRYPOINT CMD".split())  # noqa: SIM905
    (image,) = arguments("FROM")
    minor = int(re.fullmatch(r"python:3\.(\d+)-slim", image)[1])
    assert PROJECT["requires-python"] == ">=3.11,<3.14"
    assert 11 <= minor < 14


def test_what_is_copied_exists_and_is_all_that_the_build_reads():
    assert copied()
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for source in copied():
        assert (ROOT / source).exists(), source
        assert source in kept, f"{source} is kept out by .dockerignore"
    assert {PROJECT["readme"], *PROJECT["license-files"], "pyproject.toml", "collm"} <= set(copied())


def test_the_commands_of_the_build_exist():
    (run,) = arguments("RUN")
    install, *others = [shlex.split(command) for command in run.split("&&")]
    assert install[:2] == ["pip", "install"]
    assert install[install.index("-c") + 1] in copied()
    extra = re.fullmatch(r"\.\[(\w+)\]", install[-1])[1]
    assert extra in PROJECT["optional-dependencies"]
    assert [command[0] for command in others] == ["useradd"]
    assert shutil.which("useradd")  # as in Debian, which the image is made of
    assert arguments("USER") == [others[0][-1]]
    assert [name.partition("=")[0] for name in arguments("ARG")] == [install[install.index("--extra-index-url") + 1][1:]]


def test_the_image_serves_with_options_that_exist():
    (entry,) = map(json.loads, arguments("ENTRYPOINT"))
    assert entry[0] in PROJECT["scripts"]
    served = make_parser().parse_args([*entry[1:], "--agent", "a", "--api-key-env", "KEY"])
    assert (str(served.run), served.host, [str(served.port)]) == ("/agent", "0.0.0.0", arguments("EXPOSE"))
    (health,) = arguments("HEALTHCHECK")
    command = json.loads(health[health.index("[") :])
    assert command[:2] == ["python", "-c"]
    assert f"127.0.0.1:{served.port}/health" in command[2]
    compile(command[2], "healthcheck", "exec")


def test_its_commands_are_those_of_the_docs():
    """Those in its head: the export is one that `collm` takes, and the mounted folder is the exported one."""
    export, build, run = [line[4:] for line in TEXT.splitlines() if line.startswith("#   ")]
    exported = make_parser().parse_args(shlex.split(export)[1:])
    name = shlex.split(build)[3]
    assert shlex.split(build) == ["docker", "build", "-t", name, "."]
    assert f"$PWD/{exported.folder}:/agent:ro" in run
    assert run.endswith(f"{name} --agent {exported.agent}")
    docs = (ROOT / "docs" / "serving.md").read_text()
    assert all(line in docs for line in (export, build, run))


def daemon() -> bool:
    docker = shutil.which("docker")
    return docker is not None and subprocess.run([docker, "info"], capture_output=True, timeout=60).returncode == 0


@pytest.mark.slow
def test_the_image_is_built_and_answers():
    if not daemon():
        pytest.skip("Docker's daemon cannot be reached here, so the image is not built")
    subprocess.run(["docker", "build", "-q", "-t", "collm-agent-test", "."], cwd=ROOT, check=True, timeout=1800)
    port = free_port()
    command = ["docker", "run", "--rm", "-d", "-p", f"127.0.0.1:{port}:8000", "-v", f"{folder().resolve()}:/agent:ro"]
    identity = subprocess.check_output([*command, "collm-agent-test", "--agent", "a"], text=True).strip()
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(120):
            try:
                assert httpx.get(f"{url}/health").json() == {"status": "ok", "agent": "a"}
                break
            except httpx.HTTPError:
                time.sleep(1)
        body = {"messages": [{"role": "user", "content": "Name one colour."}]}
        assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).status_code == 200
    finally:
        subprocess.run(["docker", "kill", identity], check=True)
