"""The sandbox for model-written code: what programs try, what stops them, and that nothing is left behind.

Every attack runs inside the sandbox; there is no other mode. The network probe aims at a listener of the test's own.
"""

from __future__ import annotations

import gzip
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import DATA, needs
from processes import below, line_of

from collm.errors import EnvError, SandboxError
from collm.sandbox import Job, Sandbox, Verdict, judge
from collm.sandbox import box as box_module
from collm.sandbox import pool as module
from collm.sandbox.seccomp import seccomp_filter, syscalls

HUMANEVAL = "humaneval/HumanEval.jsonl.gz"
ADD = "def add(a, b):\n    return a + b\n"
SECRET = "canary-7c1e"


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    try:
        sandbox = Sandbox(1, memory_mb=512, disk_mb=4, cache=0)
    except SandboxError as error:
        pytest.skip(f"programs cannot be isolated here: {error}")
    with sandbox:
        yield sandbox


def one(sandbox: Sandbox, program: str, check: str = "pass", seconds: float = 5.0) -> Verdict:
    """The verdict of one check; a right program is judged right after it, by the same box or its successor."""
    [[verdict], [after]] = sandbox.judge([Job(program, (check,), seconds), Job(ADD, ("assert add(1, 2) == 3",))])
    assert after == Verdict(True), "the next program was harmed"
    return verdict


# What programs may do.


def test_each_check_is_judged_by_itself_in_a_fresh_namespace(box: Sandbox) -> None:
    program = "seen = []\ndef add(a, b):\n    seen.append(a)\n    return a + b\n"
    checks = ("assert add(1, 2) == 3", "assert add(1, 2) == 4, 'three'", "assert seen == []", "add(1)", "assert (", "add(")
    [verdicts] = box.judge([Job(program, checks)])
    assert [v.passed for v in verdicts] == [True, False, True, False, False, False]
    assert verdicts[0].error == ""
    assert verdicts[1].error == "AssertionError: three"
    assert verdicts[3].error.startswith("TypeError: add() missing 1 required positional argument")
    assert verdicts[4].error.startswith("SyntaxError: ")


def test_ordinary_things_work(box: Sandbox) -> None:
    program = """
    from __future__ import annotations
    import collections, dataclasses, datetime, json, math, pickle, re, sqlite3, sys, typing, unittest
    @dataclasses.dataclass
    class Point:
        x: int
    class Adds(unittest.TestCase):
        def test_sum(self):
            self.assertEqual(1 + 1, 2)
    def sum(a, b):
        return a * b
    print("words"); sys.stderr.write("words")
    assert pickle.loads(pickle.dumps(Point(3))) == Point(3)
    assert sqlite3.connect(":memory:").execute("select 2").fetchone() == (2,)
    open("notes.txt", "w").write("a"); assert open("notes.txt").read() == "a"
    assert unittest.TextTestRunner().run(unittest.TestLoader().loadTestsFromTestCase(Adds)).wasSuccessful()
    assert sys.stdin.read() == ""
    """
    check = """
    print("words"); sys.stderr.write("words")
    assert sum(2, 5) == 10, "a program may use the name of a built-in function"
    assert Point(3).x == 3
    assert open("notes.txt").read() == "a"
    """
    [[verdict]] = box.judge([Job(textwrap.dedent(program), (textwrap.dedent(check),), entries=("sum",))])
    assert verdict == Verdict(True)


PLAIN = (
    "None", "True", "-3", "2**70", "0.1", "float('inf')", "1j", "'é\\ud83d'", "b'\\x00'", "[1, [2]]", "(1, (2,))", "{1, 2}",
    "frozenset({1})", "{'a': {1: None}}", "datetime.date(2024, 1, 2)", "datetime.timedelta(1, 2)", "decimal.Decimal('0.10')",
    "fractions.Fraction(1, 3)", "collections.deque([1])", "int", "range",
)  # fmt: skip


@pytest.mark.parametrize("value", PLAIN)
def test_plain_values_cross_with_their_exact_type(box: Sandbox, value: str) -> None:
    imports = "import collections, datetime, decimal, fractions\n"
    program = f"{imports}def give(): return {value}\ndef same(x): return type(x) is type({value}) and x == {value}"
    check = f"assert type(give()) is type({value}) and give() == {value} and same({value}) is True"
    [[verdict]] = box.judge([Job(program, (check,), setup=imports)])
    assert verdict == Verdict(True)


@pytest.mark.parametrize("value", ["object()", "(i for i in 'a')", "lambda: 1", "type('I', (int,), {})(3)", "range(3)"])
def test_other_values_are_an_error_of_the_program(box: Sandbox, value: str) -> None:
    verdict = one(box, f"def give(): return {value}", "give()")
    assert "which is not a plain one" in verdict.error


def test_what_a_program_does_to_its_arguments_arrives(box: Sandbox) -> None:
    program = "def f(xs, d, s):\n    xs.append(1); xs[0].append(2); d['a'].append(3); s.add(4)"
    check = "xs, d, s = [[]], {'a': []}, set()\nf(xs, d=d, s=s)\nassert (xs, d, s) == ([[2], 1], {'a': [3]}, {4})"
    assert one(box, program, check) == Verdict(True)


def test_exceptions_arrive_as_what_they_are(box: Sandbox) -> None:
    program = """
    class Own(ValueError): pass
    def f(n):
        raise (KeyError, Own, SystemExit, StopIteration)[n]('words')
    """
    for n, kind in enumerate(("KeyError", "Own", "RuntimeError", "StopIteration")):
        check = f"try:\n    f({n})\nexcept {kind} as error:\n    assert 'words' in str(error)\nelse:\n    raise SystemError"
        assert one(box, textwrap.dedent(program), check) == Verdict(True)


def test_instances_live_with_the_program(box: Sandbox) -> None:
    program = """
    class Shelf:
        size = 3
        def __init__(self, items): self.items = items
        def add(self, item): self.items.append(item); return self
        def __len__(self): return len(self.items)
        def __contains__(self, item): return item in self.items
        def __eq__(self, other): return True
        @staticmethod
        def twice(x): return 2 * x
    """
    check = """
    shelf = Shelf([1])
    seen = shelf.items
    assert isinstance(shelf, Shelf) and isinstance(shelf.add(2), Shelf)
    assert shelf.items == [1, 2] == seen and len(shelf) == 2 and 2 in shelf and 5 not in shelf
    shelf.items.append(7)
    assert len(shelf) == 3
    shelf.items = [9]
    assert len(shelf) == 1 and Shelf.size == 3 and Shelf.twice(4) == 8
    assert shelf != 3 and shelf != Shelf([9]) and not shelf == 'x'
    try:
        3 in shelf.add(1)
    except TypeError:
        pass
    else:
        raise SystemError('what a call returns is no container')
    """
    assert one(box, textwrap.dedent(program), textwrap.dedent(check)) == Verdict(True)


def test_code_below_a_main_guard_does_not_run(box: Sandbox) -> None:
    assert one(box, "if __name__ == '__main__':\n    raise ValueError") == Verdict(True)


def test_randomness_hashes_and_verdicts_repeat(box: Sandbox) -> None:
    numbers = "(random.random(), hash('a'), list({'a', 'b', 'c'}), numpy.random.rand())"
    job = Job("import random, numpy", (f"raise ValueError({numbers})",))
    first = box.judge([job])
    assert first == box.judge([job])
    with Sandbox(1) as other:
        assert other.judge([job]) == first


@needs(HUMANEVAL)
def test_all_reference_solutions_of_humaneval_pass() -> None:
    with gzip.open(DATA / HUMANEVAL, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    jobs = [Job(r["prompt"] + r["canonical_solution"], (f"{r['test']}\ncheck({r['entry_point']})",)) for r in rows]
    wrong = [Job(r["prompt"] + "    return None\n", job.checks) for r, job in zip(rows, jobs)]
    with Sandbox(1) as sandbox:
        assert [r["task_id"] for r, [v] in zip(rows, sandbox.judge(jobs)) if not v.passed] == []
        assert sum(v.passed for [v] in sandbox.judge(wrong)) == 0


# What programs try. Each raises or ends as the third column says.

ATTACKS = {
    "read /etc/passwd": ("open('/etc/passwd')", "FileNotFoundError"),
    "read the sandbox's source outside": (f"open({module.__file__!r})", "FileNotFoundError"),
    "list the home folder": ("import os; os.listdir(os.path.expanduser('~root') + '/../home')", "FileNotFoundError"),
    "look at processes": ("import os; os.listdir('/proc')", "FileNotFoundError"),
    "list the system's settings": ("import os; os.listdir('/sys')", "FileNotFoundError"),
    "write to the root": ("open('/planted', 'w')", "OSError: [Errno 30]"),
    "write to the library": ("import json; open(json.__file__, 'a')", "OSError: [Errno 30]"),
    "write to /dev": ("open('/dev/planted', 'w')", "OSError: [Errno 30]"),
    "write to shared memory": ("open('/dev/shm/planted', 'w')", "OSError: [Errno 30]"),
    "symlink out": ("import os; os.symlink('/etc/shadow', 'link'); open('link')", "FileNotFoundError"),
    "fork": ("import os; os.fork()", "PermissionError"),
    "a fork bomb": ("import os\nwhile True:\n    os.fork()", "PermissionError"),
    "a shell": ("import subprocess; subprocess.run(['/bin/sh'])", "PermissionError"),
    "system": ("import os; assert os.system('true') == 0", "AssertionError"),
    "exec": ("import os, sys; os.execv(sys.executable, ['python'])", "PermissionError"),
    "a thread": ("import threading; threading.Thread(target=print).start()", "RuntimeError: can't start new thread"),
    "multiprocessing": ("import multiprocessing as m; m.Process(target=print).start()", "PermissionError"),
    "kill the parent": ("import os; os.kill(os.getppid(), 9)", "PermissionError"),
    "kill all": ("import os; os.kill(-1, 9)", "PermissionError"),
    "kill pid 1": ("import os; os.kill(1, 9)", "PermissionError"),
    "limits of the parent": ("import os, resource as r; r.prlimit(os.getppid(), r.RLIMIT_CPU, (0, 0))", "PermissionError"),
    "raise own limits": ("import resource as r; r.setrlimit(r.RLIMIT_AS, (-1, -1))", "ValueError: not allowed to raise"),
    "signals by a descriptor's owner": ("import fcntl, os; fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())", "PermissionError"),
    "a TCP socket": ("import socket; socket.socket()", "PermissionError"),
    "a unix socket": ("import socket; socket.socketpair()", "PermissionError"),
    "a raw socket": ("import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW)", "PermissionError"),
    "memory": ("x = [bytearray(1 << 20) for _ in range(10**6)]", "MemoryError"),
    "memory in one piece": ("x = 'a' * (1 << 40)", "MemoryError"),
    "a file in memory": ("import os; os.memfd_create('x')", "PermissionError"),
    "a large file": ("f = open('f', 'wb')\nwhile True:\n    f.write(bytes(1 << 20))", "OSError: [Errno 27]"),
    "the disk": (
        "import itertools\nfor i in itertools.count():\n    open(str(i), 'wb').write(bytes(1 << 20))",
        "OSError: [Errno 28]",
    ),
    "descriptors": ("import os\nwhile True:\n    os.dup(0)", "OSError: [Errno 24]"),
    "recursion": ("def f():\n    f()\nf()", "RecursionError"),
    "recursion without limit": (
        "import sys; sys.setrecursionlimit(10**9)\nclass A:\n    def __getattr__(s, n): return getattr(s, n)\nA().x",
        "",
    ),
    "a null pointer": ("import ctypes; ctypes.string_at(0)", "killed by signal SIGSEGV"),
    "abort": ("import os; os.abort()", "killed by signal"),
    "deep syntax": ("x = " + "(" * 100_000, ""),
    "null bytes": ("x = 1\0", "SyntaxError"),
    "half a character": ("x = '\ud800'", "UnicodeEncodeError"),
    "a program without end": ("#" * 1_000_001, "not run: the program is longer than 1000000 characters"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_is_blocked(box: Sandbox, name: str) -> None:
    program, error = ATTACKS[name]
    verdict = one(box, program)
    assert not verdict.passed
    assert verdict.error.startswith(error), verdict.error
    assert verdict.error
    assert verdict.error.isascii()
    assert verdict.error.isprintable()
    assert len(verdict.error) <= 200


CALLS = {
    "x86_64": "ptrace=101 mount=165 unshare=272 bpf=321 keyctl=250 userfaultfd=323 io_uring_setup=425 process_vm_readv=310 "
    "pidfd_open=434 setns=308 perf_event_open=298 shmget=29 tkill=200 clone=56 clone3=435 vfork=58 open_by_handle_at=304 "
    "chroot=161 init_module=175 a_later_kernel=999 x32_getpid=1073741863",
}


@pytest.mark.skipif(platform.machine() not in CALLS, reason="the numbers of this machine's calls are not in the test")
def test_raw_system_calls_are_denied(box: Sandbox) -> None:
    """Past Python, by ctypes: each call is denied by the filter (EPERM, for clone3 ENOSYS), not by its own arguments."""
    program = """
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    def errno(number):
        ctypes.set_errno(0)
        result = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(0)] * 6)
        return ctypes.get_errno() if result == -1 else f"allowed: {result}"
    """
    for name, number in (call.split("=") for call in CALLS[platform.machine()].split()):
        expected = 38 if name == "clone3" else 1
        verdict = one(box, textwrap.dedent(program), f"assert errno({number}) == {expected}, errno({number})")
        assert verdict == Verdict(True), f"{name}: {verdict.error}"


def test_network_is_not_reached(box: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        verdict = one(box, f"import urllib.request as u; u.urlopen('http://127.0.0.1:{port}', timeout=2)")
        assert not verdict.passed
        assert "Operation not permitted" in verdict.error
        listener.settimeout(0.2)
        with pytest.raises(TimeoutError):
            listener.accept()


def test_a_file_of_the_users_is_not_seen(box: Sandbox, tmp_path: Path) -> None:
    canary = tmp_path / "canary.txt"
    canary.write_text(SECRET)
    verdict = one(box, f"raise SystemExit(open({str(canary)!r}).read())")
    assert verdict.error.startswith("FileNotFoundError")
    one(box, f"import os; os.makedirs({str(tmp_path)!r}, exist_ok=True); open({str(canary)!r}, 'w').write('x')")
    assert canary.read_text() == SECRET


def test_the_environment_is_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLLM_TEST_SECRET", SECRET)
    with Sandbox(1) as sandbox:
        assert one(sandbox, "import os", "assert not os.environ, dict(os.environ)") == Verdict(True)
        peek = (
            "import ctypes; e = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), 'environ')\n"
            "i, words = 0, b''\nwhile e and e[i]:\n    words += e[i]; i += 1\n"
        )
        assert one(sandbox, peek, f"assert {SECRET.encode()!r} not in words, words") == Verdict(True)


HANGS = {
    "a loop": "while True: pass",
    "sleep": "import time; time.sleep(1000)",
    "swallowed exceptions": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "blocked signals": "import signal as s\ns.pthread_sigmask(s.SIG_BLOCK, range(1, 65))\ns.alarm(1)\nwhile True: pass",
    "prints without end": "while True: print('x' * 10**6)",
    "arithmetic in C": "9 ** 9 ** 9",
    "a regular expression": "import re; re.match('(a+)+$', 'a' * 50 + 'b')",
    "the error's own text": "class E(Exception):\n    def __str__(s):\n        while True: pass\nraise E",
    "closed channels": "import os, time; os.closerange(0, 5000); time.sleep(1000)",
}


@pytest.mark.parametrize("name", HANGS)
def test_hang_costs_its_time_and_no_more(box: Sandbox, name: str) -> None:
    start = time.monotonic()
    verdict = one(box, HANGS[name], seconds=0.4)
    assert not verdict.passed
    expected = ("killed (memory?)",) if name == "closed channels" else ("timeout after 0.4 s",)
    assert verdict.error in expected
    assert time.monotonic() - start < 3


def test_after_too_many_timeouts_the_rest_is_not_run(box: Sandbox) -> None:
    hang = "while True: pass"
    start = time.monotonic()
    [verdicts] = box.judge([Job("", ("pass", hang, hang, "pass", hang), seconds=0.2, max_timeouts=2)])
    assert [v.passed for v in verdicts] == [True, False, False, False, False]
    assert [v.error for v in verdicts[1:3]] == ["timeout after 0.2 s"] * 2
    assert [v.error for v in verdicts[3:]] == ["not run: 2 checks timed out before"] * 2
    assert time.monotonic() - start < 2


FORGERIES = {
    "os._exit": "import os; os._exit(0)",
    "SystemExit": "raise SystemExit(0)",
    "sys.exit in the function": "import sys\ndef add(a, b): sys.exit(0)",
    "os._exit in the function": "import os\ndef add(a, b): os._exit(0)",
    "exec replaced": "import builtins; builtins.exec = lambda *a, **k: None\ndef add(a, b): return 0",
    "compile replaced": "import builtins; builtins.compile = lambda *a, **k: 'pass'\ndef add(a, b): return 0",
    "own built-ins": "__builtins__ = {'abs': lambda x: 0}\ndef add(a, b): return 0",
    "abs replaced": "import builtins; builtins.abs = lambda x: 0\ndef add(a, b): return 0",
    "AssertionError replaced": "import builtins; builtins.AssertionError = KeyboardInterrupt\ndef add(a, b): return 0",
    "a trace function": (
        "import sys\ndef jump(frame, event, arg):\n    frame.f_trace_lines = True\n"
        "    if event == 'line' and 'check' in frame.f_code.co_filename: frame.f_lineno = frame.f_lineno + 1\n    return jump\n"
        "sys.settrace(jump)\ndef add(a, b): return 0"
    ),
    "unittest replaced": "import unittest; unittest.TestCase.assertEqual = lambda *a: None\ndef add(a, b): return 0",
    "another unittest": (
        "import sys, types, unittest\nfake = types.ModuleType('unittest')\n"
        "class TestCase:\n    def __getattr__(self, name): return lambda *a: None\n"
        "fake.TestCase = TestCase\nsys.modules['unittest'] = fake\ndef add(a, b): return 0"
    ),
    "an exit hook": "import atexit, os; atexit.register(os._exit, 0)\ndef add(a, b): return 0",
    "an exception hook": "import sys; sys.excepthook = lambda *a: None\ndef add(a, b): return 0",
    "a word into every descriptor": (
        "import os\nfor n in range(3, 5000):\n    try: os.write(n, b'P' + b'x' * 64)\n    except OSError: pass\n"
        "def add(a, b): return 0"
    ),
    "what is read written back": (
        "import os\nfound = b''\nfor n in range(3, 5000):\n    try: found += os.read(n, 64)\n    except OSError: pass\n"
        "for n in range(3, 5000):\n    try: os.write(n, b'P' + found)\n    except OSError: pass\ndef add(a, b): return 0"
    ),
    "a finalizer": "import os\nclass D:\n    def __del__(s): os._exit(0)\nd = D()\ndef add(a, b): return 0",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_success_is_not_forged(box: Sandbox, name: str) -> None:
    checks = (
        "assert add(1, 2) == 3",
        "assert abs(add(1, 2) - 3) == 0",
        "import unittest\nunittest.TestCase().assertEqual(add(1, 2), 3)",
    )
    [right, forged] = box.judge([Job(ADD, checks), Job(FORGERIES[name], checks, 2.0)])
    assert right == [Verdict(True)] * 3
    assert [v.passed for v in forged] == [False] * 3
    assert all(v.error for v in forged)


def test_an_exception_speaks_one_short_printable_line(box: Sandbox) -> None:
    verdict = one(box, "raise ValueError('\\n\\x1b[2J\\u202e' + 'y' * 10**6)")
    assert verdict.error.startswith("ValueError: ?[2J?yyy")
    assert len(verdict.error) == 200
    assert one(box, "class E(Exception):\n    def __str__(s): raise s\nraise E").error == "E"


def test_nothing_passes_from_one_program_to_the_next(box: Sandbox) -> None:
    plants = (
        "open('plain', 'w').write('x')",
        "import os; os.makedirs('a/b/c'); os.symlink('/', 'a/link')",
        "import os\nfor i in range(500): open(str(i), 'w')",
        "import os\nfor i in range(300):\n    os.mkdir('d'); os.chdir('d')",
        "import os; os.mkdir('x'); os.chmod('x', 0); os.chmod('.', 0)",
        "import json; json.dumps = None",
    )
    for plant in plants:
        box.judge([Job(plant, ("pass",))])
        assert one(box, "import os, json", "assert os.listdir('/box') == [] and json.dumps(1) == '1'") == Verdict(True)


def test_a_box_that_is_killed_is_replaced_and_costs_nobody_anything(box: Sandbox) -> None:
    [victim] = box._boxes
    victim.kill()
    victim._process.wait()
    assert one(box, ADD, "assert add(2, 2) == 4") == Verdict(True)
    assert box._boxes != {victim}


def test_a_box_that_dies_under_a_program_costs_that_program_alone(box: Sandbox) -> None:
    [victim] = box._boxes
    threading.Timer(0.3, victim.kill).start()
    verdict = one(box, "import time; time.sleep(3)")
    assert verdict == Verdict(False, "killed (the box died)")


# The pool.


def test_identical_jobs_are_answered_from_a_bounded_cache(box: Sandbox) -> None:
    clock = Job("import time", ("raise ValueError(time.time_ns())",))
    with Sandbox(1, cache=2) as sandbox:
        first, twin = sandbox.judge([clock, clock])
        assert first == twin
        assert sandbox.judge([clock]) == [first]
        sandbox.judge([Job(str(i), ("pass",)) for i in range(2)])
        assert sandbox.judge([clock]) != [first], "two younger jobs push the oldest out"
        slow = Job("", ("import time; time.sleep(9)",), seconds=0.2)
        for _ in range(2):
            start = time.monotonic()
            sandbox.judge([slow])
            assert time.monotonic() - start >= 0.2, "a time-out is not kept"


def test_threads_share_one_sandbox() -> None:
    results: dict[int, list[list[Verdict]]] = {}
    with Sandbox(2) as sandbox:

        def ask(n: int) -> None:
            results[n] = sandbox.judge([Job(ADD, (f"assert add({n}, 1) == {m}",)) for m in range(8)])

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert {n: [m for m, [v] in enumerate(r) if v.passed] for n, r in results.items()} == {n: [n + 1] for n in range(6)}


def open_files() -> set[str]:
    return {
        f"{n} {os.readlink(f'/proc/self/fd/{n}')}" for n in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{n}")
    }


def test_nothing_is_left_behind(box: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    files, threads, before = open_files(), threading.active_count(), set(below(os.getpid()))
    with Sandbox(2) as sandbox:
        sandbox.judge([Job(f"x = {i}; open('f', 'w')", ("pass", "import os; os.mkdir('d')", "1 / 0")) for i in range(4)])
        sandbox.judge([Job("while True: pass", ("pass",), seconds=0.2)])
        inside = set(below(os.getpid())) - before
        assert len(inside) == 6  # two boxes: bubblewrap outside, its first process inside, the zygote
    end = time.monotonic() + 3
    while inside & {int(n) for n in os.listdir("/proc") if n.isdigit()} and time.monotonic() < end:
        time.sleep(0.02)
    assert not inside & {int(n) for n in os.listdir("/proc") if n.isdigit()}
    assert (open_files(), threading.active_count()) == (files, threads)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SandboxError, match="closed"):
        sandbox.judge([])
    sandbox.close()


def test_closing_ends_a_program_that_runs(box: Sandbox) -> None:
    sandbox = Sandbox(1)
    failed: list[BaseException] = []

    def ask() -> None:
        try:
            sandbox.judge([Job("import time; time.sleep(60)", ("pass",), seconds=60)])
        except SandboxError as error:
            failed.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.3)
    start = time.monotonic()
    sandbox.close()
    thread.join()
    assert time.monotonic() - start < 5
    assert "closed" in str(failed[0])


def test_the_process_wide_pool_ends_with_the_process(box: Sandbox) -> None:
    """The pool is made at first use, outlives the thread that asked first, and leaves no process, even after SIGKILL."""
    code = (
        "import os, sys, threading, time\nfrom collm.sandbox import Job, judge\n"
        "def ask(): assert judge([Job('x = 1', ('assert x == 1',))])[0][0].passed\n"
        "t = threading.Thread(target=ask); t.start(); t.join(); time.sleep(0.1); ask()\n"
        "print('judged', flush=True)\nsys.stdin.read()"
    )
    for ending in ("end of input", "SIGKILL"):
        process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdin is not None
        assert line_of(process) == "judged\n"
        inside = set(below(process.pid))
        assert inside
        process.kill() if ending == "SIGKILL" else process.stdin.close()
        assert process.wait() == (-9 if ending == "SIGKILL" else 0)
        end = time.monotonic() + 5
        while (left := {p for p in inside if Path(f"/proc/{p}/cmdline").exists()}) and time.monotonic() < end:
            time.sleep(0.02)
        assert not left, ending
        process.stdin.close()
        process.stdout.close()


def test_judge_answers_from_the_process_wide_pool(box: Sandbox) -> None:
    assert judge([Job(ADD, ("assert add(1, 2) == 3", "assert add(1, 2) == 4")), Job("", ())]) == [
        [Verdict(True), Verdict(False, "AssertionError")],
        [],
    ]


# Refusal.


def test_without_bubblewrap_it_refuses_and_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SandboxError, match=r"bubblewrap is not installed.*apt-get install bubblewrap"):
        Sandbox(1)


def test_a_bubblewrap_that_cannot_make_the_box_is_refused_in_its_own_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxError, match=r"No permissions to create new namespace\. .*namespaces"):
        Sandbox(2)


def test_a_box_that_leaks_fails_the_self_test(box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wrong variants: a filter that lets sockets through, and a box in which the user's files can be seen."""
    real = seccomp_filter("zygote")
    monkeypatch.setattr(box_module, "seccomp_filter", lambda role: real)
    with pytest.raises(SandboxError, match="self-test failed: it must hold that a second process is refused"):
        Sandbox(1)
    monkeypatch.undo()
    command = module.command_line(16)
    here = str(Path(module.__file__).parent)
    at = command.index("/box") + 1
    monkeypatch.setattr(module, "command_line", lambda disk_mb: [*command[:at], "--ro-bind", here, here, *command[at:]])
    with pytest.raises(SandboxError, match="self-test failed: it must hold that the user's files are not there"):
        Sandbox(1)


def test_another_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(SandboxError, match="x86_64 and aarch64, but this machine is 'riscv64'"):
        Sandbox(1)


def test_bad_options_are_refused() -> None:
    for bad in ({"seconds": 0.0}, {"seconds": float("nan")}, {"max_timeouts": 0}):
        with pytest.raises(EnvError, match=next(iter(bad))):
            Job("", (), **bad)  # type: ignore[arg-type]
    for option in ("workers", "memory_mb", "disk_mb", "cache"):
        with pytest.raises(EnvError, match=f"{option}=-1"):
            Sandbox(**{option: -1})


# The filter's bytes.


@pytest.mark.parametrize("name", ["x86_64", "aarch64"])
def test_the_filter_by_an_interpreter_of_its_own(name: str) -> None:
    """Golden answers of both filters for calls by number, run through the few BPF instructions that they use."""
    import struct

    arch = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[name]
    allow, deny, missing, kill = 0x7FFF0000, 0x50001, 0x50026, 0x80000000

    def answer(role: str, call: str | int, *arguments: int, arch: int = arch) -> int:
        number = call if isinstance(call, int) else syscalls(name)[call]
        words = struct.pack("=IIQ6Q", number, arch, 0, *arguments, *[0] * (6 - len(arguments)))
        code = list(struct.iter_unpack("=HBBI", seccomp_filter(role, name)))  # type: ignore[arg-type]
        at = value = 0
        while True:
            op, yes, no, k = code[at]
            at += 1
            if op == 0x20:
                (value,) = struct.unpack_from("=I", words, k)
            elif op == 0x15:
                at += yes if value == k else no
            elif op == 0x45:
                at += yes if value & k else no
            elif op == 0x54:
                value &= k
            else:
                assert op == 0x06
                return int(k)

    for role in ("zygote", "program"):
        forks = allow if role == "zygote" else deny
        assert answer(role, "read") == answer(role, "futex") == answer(role, "exit_group") == allow
        assert answer(role, "clone", 0x01200011) == forks  # what glibc's fork asks
        assert answer(role, "execve") == answer(role, "wait4") == answer(role, "kill") == forks
        assert answer(role, "clone", 0x10000011) == deny  # CLONE_NEWUSER
        assert answer(role, "clone3") == missing
        assert answer(role, "prlimit64", 0) == allow
        assert answer(role, "prlimit64", 2) == deny
        assert answer(role, "fcntl", 0, 3) == allow
        assert answer(role, "fcntl", 0, 8) == answer(role, "fcntl", 0, 10) == answer(role, "fcntl", 0, 15) == deny
        assert answer(role, "fcntl", 0, 1031) == deny  # F_SETPIPE_SZ
        assert answer(role, "mmap", 0, 4096, 3, 0x22) == answer(role, "mmap", 0, 4096, 3, 0x01) == allow
        assert answer(role, "mmap", 0, 4096, 3, 0x21) == (allow if role == "zygote" else deny)  # shared and of no file
        assert answer(role, "ioctl", 0, 0x5401) == allow
        assert answer(role, "ioctl", 0, 0x5412) == deny  # TIOCSTI, which types into a terminal
        assert answer(role, {"x86_64": 41, "aarch64": 198}[name]) == deny  # socket
        assert answer(role, 9999) == deny
        assert answer(role, "read", arch=0x40000003) == kill  # i386
