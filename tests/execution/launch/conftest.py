"""Stand-ins for merit-fast, and a project whose names need quotes."""

from pathlib import Path

import pytest
from support.execution.launches import HARD, OPTIONS, WORDS, Programs, sorted_as, write_config


@pytest.fixture
def programs(tmp_path):
    folder = tmp_path / "programs"
    folder.mkdir()
    return Programs(folder)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The current folder, whose name needs quotes, and a run's YAML in it."""
    folder = tmp_path / HARD
    folder.mkdir()
    monkeypatch.chdir(folder)
    write_config(Path("a run's.yml"))
    return folder


@pytest.fixture
def make_jobs(call, tmp_path):
    """Writes the job files of a target; returns their folder."""

    def make(target: str, *words: str, inputs: list[str] = WORDS) -> Path:
        out = tmp_path / "jobs"
        options = ["--to", target, "--out", out, *OPTIONS[target], *words]
        code, shown, error = call("launch", *inputs, *options)
        assert code == 0, error
        assert shown.split("\n")[:-1] == [str(path) for path in sorted_as(shown, out)]
        return out

    return make
