"""Python processes of their own, forked from one that has imported torch."""

import atexit
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SERVER = Path(__file__).with_name("warm_server.py")
TIMED_OUT = 1 << 16
_servers: list[subprocess.Popen[str]] = []


def run_python(
    arguments: Sequence[str | os.PathLike[str]],
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """``subprocess.run([sys.executable, *arguments])`` with captured text, without the start.

    Not for tests of the start itself (interpreter options, memory peaks, imports) and not for
    interpreted kernels: the parent has imported Triton. The return code of a killed process is the
    negative number of its signal.

    Raises:
        subprocess.TimeoutExpired: the process has run for ``timeout`` seconds and is killed.
    """
    (result,) = run_together([arguments], cwd, [environment or {**os.environ}], timeout)
    return result


def run_together(
    commands: Sequence[Sequence[str | os.PathLike[str]]],
    cwd: Path | None = None,
    environments: Sequence[Mapping[str, str]] = (),
    timeout: float | None = None,
) -> list[subprocess.CompletedProcess[str]]:
    """``run_python`` of several commands at the same time, such as the ranks of a training."""
    processes: list[dict[str, Any]] = []
    outputs: list[list[Path]] = []
    with contextlib.ExitStack() as stack:
        for i, arguments in enumerate(commands):
            files = [stack.enter_context(tempfile.NamedTemporaryFile()) for _ in range(2)]
            outputs.append([Path(file.name) for file in files])
            processes.append(
                {
                    "arguments": [os.fspath(word) for word in arguments],
                    "cwd": os.fspath(cwd or os.getcwd()),
                    "environment": dict(environments[i] if environments else os.environ),
                    "stdout": files[0].name,
                    "stderr": files[1].name,
                }
            )
        codes = _ask({"processes": processes, "timeout": timeout})
        texts = [[file.read_text() for file in files] for files in outputs]
    results = []
    for process, code, (out, err) in zip(processes, codes, texts, strict=True):
        if code == TIMED_OUT:
            assert timeout is not None
            raise subprocess.TimeoutExpired(process["arguments"], timeout, out, err)
        results.append(subprocess.CompletedProcess(process["arguments"], code, out, err))
    return results


def _ask(request: dict[str, Any]) -> list[int]:
    server = _servers[0] if _servers else _start()
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    reply = server.stdout.readline()
    assert reply, f"the warm server has ended with {server.wait()}"
    codes: list[int] = json.loads(reply)
    return codes


def _start() -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MERIT_", "TRITON_"))}
    server = subprocess.Popen(
        [sys.executable, SERVER],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    _servers.append(server)
    atexit.register(_stop, server)
    return server


def _stop(server: subprocess.Popen[str]) -> None:
    assert server.stdin is not None
    server.stdin.close()
    server.wait()
