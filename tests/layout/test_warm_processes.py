"""Forked processes of ``support.warm`` behave as started ones do."""

import os
import signal
import subprocess

import pytest
from support.warm import run_python, run_together


def test_arguments_environment_and_folder_are_those_given(tmp_path):
    script = "import os, sys; print(sys.argv, os.environ['MERIT_FAST_SIMD'], os.getcwd())"
    environment = {**os.environ, "MERIT_FAST_SIMD": "generic"}
    result = run_python(["-c", script, "a b"], tmp_path, environment)
    assert result.stdout == f"['-c', 'a b'] generic {tmp_path}\n"
    assert (result.returncode, result.stderr) == (0, "")
    file = tmp_path / "tool.py"
    file.write_text("import sys; print(__name__, sys.argv[1:], sys.path[0])")
    assert run_python([file, "x"]).stdout == f"__main__ ['x'] {tmp_path}\n"
    assert run_python(["-m", "json.tool", "--help"]).stdout.startswith("usage: ")


@pytest.mark.parametrize(
    "script,code,error",
    [
        ("import sys; sys.exit(3)", 3, ""),
        ("raise SystemExit('no disk')", 1, "no disk"),
        ("1 / 0", 1, "ZeroDivisionError"),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, ""),
        ("import os, sys; print('last', file=sys.stderr, flush=True); os._exit(4)", 4, "last"),
    ],
)
def test_the_return_code_is_that_of_a_process(script, code, error):
    result = run_python(["-c", script])
    assert result.returncode == code and error in result.stderr


def test_a_child_leaves_no_trace_in_the_next():
    run_python(["-c", "import os, merit_fast.kernels; os.environ['TRACE'] = '1'; os.chdir('/')"])
    script = "import os, sys; print('TRACE' in os.environ, 'merit_fast' in sys.modules)"
    assert run_python(["-c", script]).stdout == "False False\n"


def test_commands_run_together_and_a_late_one_is_killed(tmp_path):
    script = f"""
import os, sys, time
open(f"{tmp_path}/" + sys.argv[1], "w").close()
while len(os.listdir({str(tmp_path)!r})) < 2:
    time.sleep(0.01)
print(sys.argv[1])
"""
    results = run_together([["-c", script, name] for name in "ab"], timeout=60)
    assert [result.stdout for result in results] == ["a\n", "b\n"]
    with pytest.raises(subprocess.TimeoutExpired):
        run_python(["-c", "import time; time.sleep(60)"], timeout=0.1)
