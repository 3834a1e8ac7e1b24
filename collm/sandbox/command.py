"""The command line of bubblewrap, which determines the parts of the machine that are visible inside a box."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path

import numpy as np

from collm.errors import SandboxError

_INSIDE = Path(__file__).with_name("inside")
WAY_OUT = (
    "Code that a model wrote is never run without isolation. Install bubblewrap (apt-get install bubblewrap) and allow user "
    "namespaces (sysctl kernel.unprivileged_userns_clone=1; on Ubuntu 24.04 also "
    "kernel.apparmor_restrict_unprivileged_userns=0; in a container, one whose seccomp profile allows them), "
    "or choose a task that runs no code."
)


def command_line(disk_mb: int) -> list[str]:
    """The call of bubblewrap: a read-only file system with the system's libraries, one Python and a small work folder."""
    if sys.platform != "linux":
        raise SandboxError(f"the sandbox needs Linux, but this is {sys.platform}. Choose a task that runs no code.")
    bubblewrap = shutil.which("bwrap")
    if bubblewrap is None:
        raise SandboxError(f"bubblewrap is not installed: there is no 'bwrap' on the PATH. {WAY_OUT}")
    python = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    command = [bubblewrap, "--unshare-all", "--unshare-user", "--uid", "65534", "--gid", "65534", "--hostname", "box"]
    command += ["--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"]
    for folder in ("/usr/lib", "/usr/lib64", "/lib", "/lib64"):
        path = Path(folder)
        if path.is_symlink():
            command += ["--symlink", os.readlink(folder), folder]
        elif path.is_dir():
            command += ["--ro-bind", folder, folder]
    command += ["--ro-bind-try", "/usr/share/zoneinfo", "/usr/share/zoneinfo"]
    command += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    base = Path(sys.base_prefix).resolve()
    if not (base / "lib").is_relative_to("/usr/lib"):
        command += ["--ro-bind", str(base / "lib"), str(base / "lib")]
    command += ["--ro-bind", str(python), str(python)]
    # The user's installed packages are hidden.
    for name in ("purelib", "platlib"):
        packages = Path(sysconfig.get_path(name, vars={"base": str(base), "platbase": str(base)}))
        if packages.is_dir():
            command += ["--tmpfs", str(packages), "--remount-ro", str(packages)]
    # Except numpy, which some of the public classes need.
    for package in _numpy_folders():
        command += ["--ro-bind", str(package), f"/packages/{package.name}"]
    command += ["--dev", "/dev", "--remount-ro", "/dev"]
    command += ["--ro-bind", str(_INSIDE), "/inside", "--size", str(disk_mb << 20), "--tmpfs", "/box"]
    command += ["--remount-ro", "/", "--chdir", "/box", "--setenv", "PYTHONHASHSEED", "0"]
    command += ["--setenv", "OPENBLAS_NUM_THREADS", "1"]
    return [*command, str(python), "-S", "-s", "-B", "-P", "/inside/zygote.py"]


def _numpy_folders() -> list[Path]:
    """The folders of numpy and of the libraries in its wheel."""
    package = Path(np.__file__).resolve().parent
    return [folder for folder in (package, package.with_name("numpy.libs")) if folder.is_dir()]
