"""Programs that a model wrote: what passes, what ends them, and what they do not get."""

import os
import time

import code_runner
from code_runner import run_program, run_programs

PASS = "def f(x):\n    return x + 1\nassert f(1) == 2\n"


def test_a_program_passes_that_reaches_its_end():
    assert run_program(PASS).passed
    assert run_program("import math, re, collections, heapq, itertools\n" + PASS).passed


def test_what_fails():
    for source in (
        "assert 1 == 2",
        "raise SystemExit(0)",  # leaving early is no pass
        "import os\nos._exit(0)",
        "import sys\nsys.exit()\nassert False",
        "def f(:\n",
    ):
        outcome = run_program(source)
        assert not outcome.passed
        assert outcome.reason == "failed", source


def test_what_is_ended(monkeypatch):
    assert run_program("import time\ntime.sleep(60)", wall_seconds=1.0).reason == "timeout"
    monkeypatch.setattr(code_runner, "LIMITS", code_runner.LIMITS.replace("(5, 5)", "(1, 1)"))
    assert "(1, 1)" in code_runner.LIMITS
    start = time.monotonic()
    assert run_program("while True:\n    pass").reason == "killed by signal 9"  # one second of CPU
    assert time.monotonic() - start < code_runner.WALL_SECONDS


def test_memory_files_and_output_are_limited():
    assert not run_program("x = bytearray(4 * 2**30)").passed
    assert run_program("try:\n    x = bytearray(4 * 2**30)\nexcept MemoryError:\n    pass").passed
    assert not run_program("open('large', 'wb').write(bytes(4 * 2**20))").passed
    assert run_program("open('small', 'wb').write(bytes(2**10))\nprint('x' * 10**7)").passed


def test_nothing_of_the_environment_is_there(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "planted.py").write_text("")
    monkeypatch.chdir(tmp_path)
    names = "{'HF_TOKEN', 'HOME', 'PATH', 'PYTHONPATH', 'USER'}"
    assert run_program(f"import os\nassert not {names} & set(os.environ), os.environ").passed
    assert not run_program("import planted").passed
    assert run_program("import os\nassert os.listdir() == ['program.py']").passed
    assert run_program("import sys\nassert sys.stdin.read() == ''").passed
    assert run_program("open('left-behind', 'w').close()").passed
    assert os.listdir(tmp_path) == ["planted.py"]


def test_what_a_program_started_ends_with_it(tmp_path):
    mark = tmp_path / "still-alive"
    child = f"import time; time.sleep(1); open({str(mark)!r}, 'w')"
    assert run_program(f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}])").passed
    time.sleep(2)
    assert not mark.exists()


def test_outcomes_keep_their_order():
    sources = [PASS, "assert False", PASS, "assert False"]
    assert [outcome.passed for outcome in run_programs(sources)] == [True, False, True, False]
