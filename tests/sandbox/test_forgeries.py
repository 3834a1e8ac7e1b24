# ruff: noqa: E501
"""Programs that want more than they earn: answers that equal anything, and changes of what a check is judged with.

Each forgery is tried in five styles of check; none of them may pass, while the right program passes them all.
"""

from __future__ import annotations

import pytest

from collm.errors import SandboxError
from collm.sandbox import Job, Sandbox

CHECKS = {
    "HumanEval": "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(4, 5) == 9\ncheck(f)",
    "MBPP": "assert f(1, 2) == 3",
    "unittest": (
        "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        self.assertEqual(f(1, 2), 3)\n"
        "result = unittest.TestResult()\nunittest.TestSuite([T('test')]).run(result)\n"
        "assert result.testsRun == 1 and result.wasSuccessful()"
    ),
    "tolerance": "assert abs(f(1, 2) - 3.0) < 1e-6",
    "exception": "try:\n    f('a', 1)\nexcept TypeError:\n    pass\nelse:\n    assert False\nassert f(1, 2) == 3",
}
RIGHT = "def f(a, b): return a + b"
_ALL = (
    "class A{base}:\n    def __init__(s, *a): pass\n    def __eq__(s, o): return True\n    def __ne__(s, o): return False\n"
    "    def __hash__(s): return 1\n    def __lt__(s, o): return True\n    __le__ = __gt__ = __ge__ = __lt__\n"
    "    def __sub__(s, o): return s\n    __rsub__ = __sub__\n    def __abs__(s): return s\n    def __bool__(s): return True\n"
    "    def __contains__(s, o): return True\n"
)
_FAKE = "def f(a, b): return 0"
_FRAMES = (
    "import sys\ndef f(a, b):\n    frame = sys._getframe()\n    while frame:\n        for c in frame.f_code.co_consts:\n"
    "            if {test}: return c\n        frame = frame.f_back\n    return 0"
)
FORGERIES = {
    "mock.ANY": "from unittest.mock import ANY\ndef f(a, b): return ANY",
    "MagicMock": "from unittest.mock import MagicMock\ndef f(a, b):\n    m = MagicMock()\n    m.__eq__ = lambda *a: True\n    return m",
    "an equal class": _ALL.format(base="") + "def f(a, b): return A()",
    **{
        f"an equal {base}": _ALL.format(base=f"({base})") + "def f(a, b): return A()"
        for base in (
            "int",
            "float",
            "str",
            "list",
            "tuple",
            "dict",
            "set",
            "frozenset",
            "complex",
            "bytes",
            "bytearray",
            "object",
            "Exception",
        )
    },
    "an equal class object": (
        "class M(type):\n    def __eq__(s, o): return True\n    __hash__ = None\n    def __sub__(s, o): return 0\n"
        "class A(metaclass=M): pass\ndef f(a, b): return A"
    ),
    "a difference of zero": "class A:\n    def __sub__(s, o): return 0.0\ndef f(a, b): return A()",
    "equal after a tie": "class A:\n    def __getattr__(s, n): return lambda *a: True\ndef f(a, b): return A()",
    "a lazy reply": "class A:\n    def __eq__(s, o): s.v = o; return True\ndef f(a, b): return A()",
    "a generator": "def f(a, b): yield 3",
    **{
        f"own {name}": f"def {name}(*a, **k): return 0\n{_FAKE}"
        for name in ("abs", "set", "sorted", "len", "isinstance", "all", "any", "range", "list", "sum")
    },
    "own AssertionError": f"class AssertionError(Exception):\n    def __new__(c, *a): return TypeError()\n{_FAKE}",
    **{
        f"{name} replaced": f"import builtins; builtins.{name} = lambda *a, **k: 0\n{_FAKE}"
        for name in ("abs", "len", "exec", "compile", "sorted", "isinstance", "__build_class__", "__import__")
    },
    "builtins dropped": f"__builtins__ = {{}}\n{_FAKE}",
    "frames, int": _FRAMES.format(test="type(c) is int and c > 2"),
    "frames, float": _FRAMES.format(test="type(c) is float and c > 1"),
    "frames, skip the assert": (
        "import sys\ndef f(a, b):\n    g = sys._getframe(1)\n    g.f_globals['abs'] = lambda x: 0\n    return 0"
    ),
    "frames, globals": "import sys\ndef f(a, b):\n    sys._getframe(1).f_globals.update(AssertionError=KeyError)\n    return 0",
    "frames, trace": (
        "import sys\ndef f(a, b):\n    def jump(fr, e, x): return jump\n    fr = sys._getframe(1)\n    fr.f_trace = "
        "lambda fr, e, x: sys.exit(0)\n    sys.settrace(jump)\n    return 0"
    ),
    "the check by gc": (
        "import gc\ndef f(a, b):\n    for o in gc.get_objects():\n        if type(o) is dict and 'check' in o.values(): o.clear()\n"
        "    return 0"
    ),
    "the key by gc": (
        "import gc, hashlib, os\ndef f(a, b):\n    for o in gc.get_objects():\n        if type(o) is bytes and len(o) == 32:\n"
        "            for n in range(3, 1024):\n                try: os.write(n, b'P' + hashlib.blake2b(o).digest())\n"
        "                except OSError: pass\n    return 0"
    ),
    "_Outcome replaced": (
        "import unittest.case as c\nclass O:\n    success = True\n    def __init__(s, *a): pass\n"
        f"    def testPartExecutor(s, *a, **k):\n        import contextlib; return contextlib.suppress(Exception)\nc._Outcome = O\n{_FAKE}"
    ),
    "_Outcome replaced late": (
        "def f(a, b):\n    import unittest.case as c, contextlib\n"
        "    c._Outcome.testPartExecutor = lambda *a, **k: contextlib.suppress(BaseException)\n    return 0"
    ),
    "TestCase.assertEqual late": "def f(a, b):\n    import unittest as u\n    u.TestCase.assertEqual = lambda *a: None\n    return 0",
    "added to TestCase": f"import unittest\nunittest.TestCase.__getattribute__ = lambda s, n: (lambda *a: None)\n{_FAKE}",
    "added __call__": f"import unittest\nunittest.TestCase.__eq__ = lambda *a: True\n{_FAKE}",
    "_baseAssertEqual": "def f(a, b):\n    import unittest as u\n    u.TestCase._baseAssertEqual = lambda *a, **k: None\n    return 0",
    "wasSuccessful": "def f(a, b):\n    import unittest as u\n    u.TestResult.wasSuccessful = lambda s: True\n    return 0",
    "addFailure": "def f(a, b):\n    import unittest as u\n    u.TestResult.addFailure = lambda *a: None\n    return 0",
    "an audit hook": f"import sys, os\nsys.addaudithook(lambda e, a: os._exit(0) if e == 'compile' else None)\n{_FAKE}",
    "a gc callback": f"import gc, os\ngc.set_threshold(1)\ngc.callbacks.append(lambda *a: os._exit(0))\n{_FAKE}",
    "a timer": f"import signal, os\nsignal.signal(14, lambda *a: os._exit(0))\nsignal.setitimer(0, 0.001)\n{_FAKE}",
    "a profile": "import sys\ndef f(a, b):\n    sys.setprofile(lambda *a: sys.exit(0))\n    return 0",
    "os._exit": "import os\ndef f(a, b): os._exit(0)",
    "SystemExit": "def f(a, b): raise SystemExit(0)",
    "KeyboardInterrupt": "def f(a, b): raise KeyboardInterrupt",
    "SkipTest": "import unittest\ndef f(a, b): raise unittest.SkipTest",
    "a decoy frame": (
        'import os, struct\ndef f(a, b):\n    body = b\'["value", ["i", "0x3", 1], []]\'\n    for n in range(3, 1024):\n'
        "        try: os.write(n, struct.pack('>I', len(body)) + body)\n        except OSError: pass\n    return 0"
    ),
    "a deep frame": (
        "import os, struct\ndef f(a, b):\n    body = b'[' * 100000\n    for n in range(3, 1024):\n"
        "        try: os.write(n, struct.pack('>I', len(body)) + body)\n        except OSError: pass\n    return 0"
    ),
    "a word of passing": (
        "import os\ndef f(a, b):\n    for n in range(3, 1024):\n        try: os.write(n, b'P' + b'x' * 64)\n"
        "        except OSError: pass\n    return 0"
    ),
    "a pickle": "import os\nclass A:\n    def __reduce__(s): return (eval, ('3',))\ndef f(a, b): return A()",
}


def test_a_box_full_of_files_is_ended_and_the_next_program_is_right() -> None:
    try:
        sandbox = Sandbox(1, cache=0)
    except SandboxError as error:
        pytest.skip(f"programs cannot be isolated here: {error}")
    many = "import os\nfor i in range(10**7): {}"
    with sandbox:
        for make in ("os.close(os.open(str(i), 65))", "os.mkdir(str(i))", "os.symlink('x', str(i))"):
            [[crowded], [after]] = sandbox.judge([Job(many.format(make), ("pass",)), Job(RIGHT, ("assert f(1, 2) == 3",))])
            assert not crowded.passed
            assert crowded.error == "killed (more than 1000 files)"
            assert after.passed


def test_the_forgeries_are_many() -> None:
    assert len(FORGERIES) >= 60


def test_no_forgery_passes_a_check_and_the_right_program_passes_all() -> None:
    try:
        sandbox = Sandbox(1, cache=0)
    except SandboxError as error:
        pytest.skip(f"programs cannot be isolated here: {error}")
    with sandbox:
        programs = [RIGHT, *FORGERIES.values()]
        [right, *forged] = sandbox.judge([Job(program, tuple(CHECKS.values()), 2, entries=("f",)) for program in programs])
    assert all(verdict.passed for verdict in right), right
    earned = {name: [k for k, v in zip(CHECKS, job) if v.passed] for name, job in zip(FORGERIES, forged)}
    assert {name: styles for name, styles in earned.items() if styles} == {}
