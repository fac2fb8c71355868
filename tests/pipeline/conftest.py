"""One finished small run that the tests of the ledger copy."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from support.runs import run_all, run_values


@dataclass(frozen=True)
class FinishedRun:
    """A finished run; ``config`` is the copy of its YAML in the current folder."""

    out: Path
    config = Path("run.yml")

    def copy_config(self, folder: Path) -> Path:
        """Copies the YAML: a run of it makes ``folder/out``."""
        return Path(shutil.copy2(self.out.with_name("run.yml"), folder))

    def copy_to(self, folder: Path) -> Path:
        """Copies YAML and output, with their times, to ``folder``; returns ``folder/out``."""
        self.copy_config(folder)
        return Path(shutil.copytree(self.out, folder / "out"))


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, tiny_model, tiny_mixture) -> FinishedRun:
    """The merit arm only: two branches, one merge, one epoch; every dataset has two spans."""
    folder = tmp_path_factory.mktemp("finished")
    values = run_values(tiny_model, tiny_mixture)
    values["split"]["span"] = 4
    values["train"] |= {"epochs": 1, "controls": {}}
    values["evaluate"] |= {"interpolate": [], "max_new_tokens": 1}
    config = folder / "run.yml"
    config.write_text(yaml.safe_dump(values))
    run_all(config)
    return FinishedRun(folder / "out")
