"""Ctrl-C and SIGTERM end a command with one line and its exit code, whatever it is doing."""

import json

import pytest
from support.warm import run_python

START = """
import os, signal, sys, threading, time
from merit_fast.cli import main
def interrupt():
    os.kill(os.getpid(), signal.{name})
    time.sleep(60)
"""
COMMANDS = {
    "in the main thread": "main._run_command = lambda words: interrupt()",
    "with a busy thread": """
def work(words):
    threading.Thread(target=time.sleep, args=(60,)).start()
    interrupt()
main._run_command = work
""",
    "during an import": """
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "merit_fast.cli.commands":
            interrupt()
for name in [name for name in sys.modules if name.startswith("merit_fast.cli.commands")]:
    del sys.modules[name]
sys.meta_path.insert(0, Finder())
""",
    "twice, where the first is swallowed": """
def work(words):
    try:
        interrupt()
    except KeyboardInterrupt:
        pass
    interrupt()
main._run_command = work
""",
}


@pytest.mark.process
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_an_interruption_ends_at_once_with_its_code(command, name, code):
    script = START.format(name=name) + COMMANDS[command] + "\nsys.argv = ['merit-fast', 'doctor']"
    result = run_python(["-c", script + "\nmain.main()"], timeout=30)
    assert result.returncode == code
    if "twice" not in command:
        word = "interrupted" if name == "SIGINT" else "terminated"
        assert result.stderr == f"failed: {word}; the same command resumes the work\n"


def test_idle_threads_sleep_unless_the_user_chose(call, monkeypatch):
    def policy():
        _, out, _ = call("doctor", "--json")
        return json.loads(out)["environment"]["OMP_WAIT_POLICY"]

    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert policy() == "active"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    assert policy() == "passive"
