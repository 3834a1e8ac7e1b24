"""What tests read from processes has a time limit."""

from __future__ import annotations

import subprocess
import sys
import time

from processes import below, line_of


def test_a_process_that_prints_nothing_in_time_is_killed_with_all_below_it() -> None:
    code = "import subprocess, time; print('begun', flush=True); subprocess.run(['sleep', '60'])"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert line_of(process) == "begun\n"
        began = time.monotonic()
        assert line_of(process, 0.5) == ""
        assert time.monotonic() - began < 30
    assert process.returncode < 0
    assert below(process.pid) == {}
