"""One finished small run that the tests of the ledger copy."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from support.runs import run_all, run_values


@dataclass(frozen=True)
class FinishedRun:
    """A finished run; ``config`` names its output ``out`` in the current folder."""

    config: Path
    out: Path

    def copy_to(self, folder: Path) -> Path:
        """Copies the output, with its times, to ``folder/out``."""
        return Path(shutil.copytree(self.out, folder / "out"))


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, tiny_model, tiny_mixture) -> FinishedRun:
    """The merit arm only: two branches, one merge, one epoch."""
    folder = tmp_path_factory.mktemp("finished")
    values = run_values(tiny_model, tiny_mixture)
    values["train"] |= {"epochs": 1, "controls": {}}
    values["evaluate"] |= {"interpolate": [], "max_new_tokens": 1}
    config = folder / "run.yml"
    config.write_text(yaml.safe_dump(values))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_all(config)
    return FinishedRun(config, folder / "out")
