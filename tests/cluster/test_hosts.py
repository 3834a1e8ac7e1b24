"""Two hosts: network namespaces with a cable between them, a node of Ray and an agent on each. The cable is pulled out."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from processes import below, until
from ray_nodes import OWN, command, node
from test_seats import check_same

pytest.importorskip("ray", reason="ray is not installed, so nothing was tried on it: pip install 'collm[cluster]'")

HEAD, OTHER = "10.77.3.1", "10.77.3.2"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextmanager
def two_hosts() -> Iterator[tuple[str, str]]:
    """The names of two network namespaces, with the addresses HEAD and OTHER."""
    names = (f"collm-{os.getpid()}-a", f"collm-{os.getpid()}-b")
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the command ip (Debian's iproute2), so nothing was tried with two hosts")
    try:
        try:
            for name in names:
                ip("netns", "add", name)
                ip("-n", name, "link", "set", "lo", "up")
            ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
            for name, address in zip(names, (HEAD, OTHER), strict=True):
                ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
                ip("-n", name, "link", "set", "cable", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(
                f"this machine makes no network namespaces, so nothing was tried with two hosts: {error.stderr.strip()}"
            )
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize("back_after", [3.0, None], ids=["comes back", "stays away"])
def test_a_host_is_cut_off_in_the_middle(tmp_path, back_after):
    """A short break is waited for; a host that stays away is lost, and its seat is made again on the other. Both end equal."""
    words = ("--algorithm.name", "magrpo", "--run.iterations", "8")
    subprocess.run(command(tmp_path, "--run.name", "whole", *words), check=True, capture_output=True)
    environment = {**os.environ, **OWN}
    with two_hosts() as (here, there), tempfile.TemporaryDirectory(prefix="collm-test-", dir="/tmp") as folder:
        options = ("--head", "--port=6379", f"--node-ip-address={HEAD}", "--include-dashboard=false", f"--temp-dir={folder}")
        joining = (f"--address={HEAD}:6379", f"--node-ip-address={OTHER}")
        with (
            node(*options, environment=environment, host=here) as first,
            node(*joining, environment=environment, host=there) as second,
        ):
            training = command(tmp_path, "--run.name", "apart", "--cluster.address", f"{HEAD}:6379", *words)
            run = subprocess.Popen(["ip", "netns", "exec", here, *training], stderr=subprocess.PIPE, text=True, env=environment)
            until(lambda: run.poll() is not None or (tmp_path / "apart" / "checkpoints" / "000001").exists())
            seats = [[w for w in below(one.pid).values() if w.startswith("ray::Seat")] for one in (first, second)]
            ip("-n", there, "link", "set", "cable", "down")
            cut = time.monotonic()
            if back_after is not None:
                time.sleep(back_after)
                ip("-n", there, "link", "set", "cable", "up")
            _, said = run.communicate(timeout=500)
            print(f"{time.monotonic() - cut:.0f} s from the break to the end of the run\n{said}")
            assert run.returncode == 0, said
            assert list(map(len, seats)) == [1, 1]  # an agent on each host
            assert ("was lost" in said) == (back_after is None)
    check_same(tmp_path / "whole", tmp_path / "apart")
    assert (tmp_path / "apart" / "final").is_dir()
