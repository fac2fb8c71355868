"""Forks Python processes from one that has imported torch: the server of ``support.warm``.

A start of Python with torch and its compiler takes four seconds, a fork a few milliseconds. A child
imports merit_fast itself, so the native module reads its environment in each child. The server
computes nothing: a fork after OpenMP has started threads would hang.
"""

import atexit
import json
import os
import runpy
import signal
import sys
import threading
import time
import traceback
from typing import Any, TextIO

import numpy  # noqa: F401
import safetensors.torch  # noqa: F401
import torch
import torch._dynamo  # noqa: F401  (torch.compiler and torch.library import it)
import transformers  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
from transformers.models.llama import modeling_llama  # noqa: F401

FORBIDDEN = ("merit_fast",)  # each child reads its environment variables itself
TIMED_OUT = 1 << 16


def serve(requests: TextIO, replies: TextIO) -> None:
    loaded = [name for name in FORBIDDEN if name in sys.modules]
    assert not loaded, f"the warm server has imported {loaded}"
    assert threading.active_count() == 1, threading.enumerate()
    for line in requests:
        request = json.loads(line)
        children = [start(process) for process in request["processes"]]
        json.dump([wait(child, request["timeout"]) for child in children], replies)
        replies.write("\n")
        replies.flush()


def start(process: dict[str, Any]) -> int:
    child = os.fork()
    if child == 0:
        run(process)
    return child


def wait(child: int, timeout: float | None) -> int:
    if timeout is None:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return TIMED_OUT


def run(process: dict[str, Any]) -> None:
    """Becomes ``python ARGUMENTS...`` with its own environment; never returns."""
    code = 1
    try:
        become(process)
        code = execute(process["arguments"])
    except SystemExit as stop:
        code = exit_code(stop)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]  # it has no public name
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def become(process: dict[str, Any]) -> None:
    for number, name in enumerate(("/dev/null", process["stdout"], process["stderr"])):
        descriptor = os.open(name, os.O_RDWR)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = os.fdopen(0)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    os.chdir(process["cwd"])
    os.environ.clear()
    os.environ.update(process["environment"])
    script_folder = sys.path[0]
    sys.path.remove(script_folder)
    path = os.environ.get("PYTHONPATH", "")
    sys.path[:0] = [folder for folder in path.split(os.pathsep) if folder]


def execute(arguments: list[str]) -> int:
    """Does with ``-c CODE``, ``-m MODULE`` or FILE what ``python`` does."""
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        sys.path.insert(0, "")
        code = compile(arguments[1], "<string>", "exec")
        main = type(sys)("__main__")
        sys.modules["__main__"] = main
        exec(code, main.__dict__)
    elif arguments[0] == "-m":
        sys.argv = [arguments[1], *arguments[2:]]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
        runpy.run_path(arguments[0], run_name="__main__")
    return 0


def exit_code(stop: SystemExit) -> int:
    if stop.code is None or isinstance(stop.code, int):
        return stop.code or 0
    print(stop.code, file=sys.stderr)
    return 1


if __name__ == "__main__":
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints is no reply
    serve(os.fdopen(os.dup(0)), replies)
