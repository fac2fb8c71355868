"""One run that is done by its units, in a random order."""

import random

import pytest
from support.execution.units import ready, run_of

from merit_fast.pipeline.units.doing import do_unit


@pytest.fixture(scope="session")
def configured(tmp_path_factory, finished_run):
    """A YAML like the finished run's, with another output."""

    def make(name):
        folder = tmp_path_factory.mktemp(name)
        finished_run.copy_config(folder)
        return folder / "run.yml"

    return make


@pytest.fixture(scope="session")
def by_units(configured):
    """A run whose units came in a random order, each from a fresh object."""
    file = configured("units")
    order = random.Random(3)
    done = []
    while names := ready(file):
        name = order.choice(names)
        assert do_unit(run_of(file), name)
        done.append(name)
    return file, done
