"""Mixtures as a run's YAML gives them: their entries, or the message that refuses them."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from merit_fast.data import DatasetConfig
from merit_fast.errors import InputError
from merit_fast.pipeline.config import RunConfig, read_run_config


def config_of(folder: Path, mixture: Any, *assignments: str) -> RunConfig:
    file = folder / "run.yml"
    file.write_text(yaml.safe_dump({"model": "org/m", "mixture": mixture}))
    return read_run_config(file, assignments)


def entries(folder: Path, mixture: Any) -> dict[str, DatasetConfig]:
    return {entry.name: entry for entry in config_of(folder, mixture).mixture}


def message(folder: Path, mixture: Any) -> str:
    with pytest.raises(InputError) as caught:
        config_of(folder, mixture)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{folder}/", "")
