"""Programs that stand in for merit-fast and for schedulers: they record what they are called with.

A scheduler's stand-in runs each job at once, as the scheduler would start it.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HARD = 'it\'s "my" $HOME `run`'  # a folder
PROGRAM = """\
#!{python} -ISs
import json, os, sys, time
from pathlib import Path
name = Path(sys.argv[0]).name
words = sys.argv[1:]
start = time.monotonic()
kept = ("SLURM_ARRAY_TASK_ID", "CUDA_VISIBLE_DEVICES")
environment = {{key: os.environ[key] for key in kept if key in os.environ}}
entry = {{"program": name, "words": words, "folder": os.getcwd(), "environment": environment}}
code = 1 if os.environ.get("FAILS") in words else 0
{body}
entry["times"] = [start, time.monotonic()]
line = json.dumps(entry) + "\\n"
log = os.open({log!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
os.write(log, line.encode())
sys.exit(code)
"""


@dataclass(frozen=True)
class Called:
    """One call of a stand-in."""

    program: str
    words: list[str]
    folder: str
    environment: dict[str, str]
    times: tuple[float, float]

    @property
    def unit(self) -> str:
        """The unit that a call of merit-fast or torchrun does."""
        assert "unit" in self.words
        return self.words[-1]


class Programs:
    """Stand-ins in a folder of their own, which is the whole PATH next to the system's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "calls.jsonl"
        for name in ("merit-fast", "torchrun"):
            self.add(name)

    def add(self, name: str, body: str = "") -> None:
        """A program; ``body`` is Python that sees ``words`` and may set ``code``."""
        file = self.folder / name
        body = f"import subprocess\n{body}" if "subprocess" in body else body
        text = PROGRAM.format(python=sys.executable, body=body, log=str(self.log))
        file.write_text(text)
        file.chmod(0o755)

    def run(self, script: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        path = f"{self.folder}:/usr/bin:/bin"
        return subprocess.run(
            ["bash", str(script)],
            env={**os.environ, **environment, "PATH": path},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self, *programs: str) -> list[Called]:
        """The calls of these programs, in the order in which they ended."""
        if not self.log.exists():
            return []
        entries = [Called(**json.loads(line)) for line in self.log.read_text().splitlines()]
        return [entry for entry in entries if not programs or entry.program in programs]

    def units(self) -> list[str]:
        return [call.unit for call in self.calls("merit-fast", "torchrun")]


def write_config(file: Path, **sections: dict[str, Any]) -> None:
    values: dict[str, Any] = {
        "model": "base",
        "mixture": [{"name": name, "path": f"{name}.jsonl"} for name in ("facts", "code", "maths")],
        "split": {"groups": 2, "dtype": "bf16"},
        "train": {"dtype": "bf16", "controls": {"joint": True}},
        "evaluate": {"dtype": "bf16"},
        "output": "runs/mine",
    }
    for name, section in sections.items():
        values[name] = {**values[name], **section}
    file.write_text(yaml.safe_dump(values))


CONFIG = "a run's.yml"
WORDS = ["train.engine_config=null", CONFIG]  # in any order
UNITS = [
    {"sketch/facts", "sketch/code", "sketch/maths"},
    {"sketch"},
    {"split"},
    {"train/merit-0", "train/merit-1", "train/joint"},
    {"evaluate/base"},
    {"merge/merit"},
    {"evaluate/merit-0", "evaluate/merit-1", "evaluate/joint", "evaluate/merit"},
    {"evaluate"},
    {"report"},
]
OPTIONS = {
    "shell": [],
    "slurm": [],
    "sky": ["--storage", "s3://bucket", "--install", "merit_fast"],
    "ray": [],
    "k8s-job": ["--image", "reg/merit:1", "--storage", "claim"],
    "hf-jobs": ["--image", "reg/merit:1", "--storage", "hf://buckets/me/runs"],
}


def sorted_as(shown: str, folder: Path) -> list[Path]:
    """The files of a folder in the order in which the command has listed them."""
    files = {str(path): path for path in folder.iterdir()}
    return [files.pop(line) for line in shown.splitlines()] + list(files.values())


def check_order(units: list[str]) -> None:
    """Every unit is done once, after those that it needs."""
    rest = list(units)
    for step in UNITS:
        done = rest[: len(step)]
        assert set(done) == step, f"{done} instead of {step}"
        rest = rest[len(step) :]
    assert not rest
