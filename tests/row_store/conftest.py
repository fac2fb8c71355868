"""One small run whose sketch has a store; tests copy it."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from support.row_store.facts import FACTS, fact_line
from support.runs import Notes, run_values

from merit_fast.pipeline.config import read_run_config
from merit_fast.pipeline.run import Run


@dataclass(frozen=True)
class StoredRun:
    """A run that has been sketched with a store; ``config`` is its YAML."""

    config: Path
    out: Path
    lines: dict[str, list[str]]  # dataset -> the rows of its training file

    def copy_to(self, folder: Path) -> "StoredRun":
        shutil.copytree(self.out, folder / "out")
        shutil.copy2(self.config, folder)
        return StoredRun(folder / "run.yml", folder / "out", self.lines)


@pytest.fixture(scope="session")
def stored_run(tmp_path_factory, tiny_model, tiny_mixture) -> StoredRun:
    folder = tmp_path_factory.mktemp("stored")
    lines = [fact_line(q, a, i) for i, (q, a) in enumerate(FACTS * 2)]
    (folder / "facts.jsonl").write_text("\n".join(lines) + "\n")
    mixture = [{"name": "facts", "path": str(folder / "facts.jsonl")}, *tiny_mixture[1:]]
    values = run_values(tiny_model, mixture)
    values["split"] |= {"examples": "all", "store_dim": 4096, "batch_size": 4}
    values["data"] = {"ignore_columns": ["number", "score", "row"]}
    config = folder / "run.yml"
    config.write_text(yaml.safe_dump(values))
    Run(read_run_config(config, ["split.store=true"]), Notes()).sketch()
    rows = {one["name"]: Path(one["path"]).read_text().splitlines() for one in mixture}
    return StoredRun(config, folder / "out", rows)


@pytest.fixture
def copied_run(stored_run, tmp_path, monkeypatch) -> StoredRun:
    """A copy of the run in the current folder."""
    monkeypatch.chdir(tmp_path)
    return stored_run.copy_to(tmp_path)
