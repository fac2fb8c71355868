"""Places for outputs: S3 on loopback, fsspec's memory, and a folder; and outputs to put there."""

import random

import pytest
from support.merge.s3_server import s3_server_or_skip
from support.merge.stores import NUMBERS
from support.storage.faulty import with_faults
from support.storage.machines import copy_of, machine, ready

from merit_fast.manifests.directories import output_directory
from merit_fast.manifests.io import stage_manifest
from merit_fast.pipeline.storage import place as place_module
from merit_fast.pipeline.storage.place import open_place
from merit_fast.pipeline.units.stored import do_stored_unit


@pytest.fixture(scope="package")
def server():
    yield from s3_server_or_skip()


@pytest.fixture(params=["s3", "memory", "folder"])
def place(request, tmp_path):
    """A new place of each kind."""
    if request.param == "folder":
        return open_place(str(tmp_path / "shared" / "run"))
    name = f"outputs-{next(NUMBERS)}"
    if request.param == "memory":
        return open_place(f"memory://{name}/run")
    request.getfixturevalue("server")
    location = open_place(f"s3://{name}/run")
    location.store.mkdir(name)
    return location


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr("merit_fast.pipeline.storage.place.PAUSES_S", (0.0, 0.0, 0.0))


@pytest.fixture
def make_output(tmp_path):
    """Makes a finished output of two files; ``seconds`` is what no two attempts share."""

    def make(name, seconds=1.0):
        manifest = stage_manifest("train", {"name": name}, {})
        path = tmp_path / f"made-{next(NUMBERS)}" / name
        with output_directory(path, manifest) as directory:
            (directory / "deep").mkdir()
            (directory / "deep" / "weights.bin").write_bytes(bytes(range(256)) * 40)
            (directory / "timing.json").write_text(f'{{"train_s": {seconds}}}')
        return path, manifest.fingerprint

    return make


@pytest.fixture(scope="package")
def by_machines(finished_run, tmp_path_factory):
    """A run of which every unit was done on a machine of its own, in a random order.

    A tenth of all requests fails, and all of them are slow.
    """
    storage = f"memory://run-{next(NUMBERS)}"
    order = random.Random(5)
    done = {}
    failed = 0
    head = tmp_path_factory.mktemp("head")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place_module, "PAUSES_S", (0.0,) * 6)
        while names := ready(machine(head, finished_run, storage)):
            name = order.choice(names)
            run = machine(tmp_path_factory.mktemp("machine"), finished_run, storage)
            faulty = with_faults(run.outputs.store.place, 0.1, 0.01, seed=len(done))
            assert do_stored_unit(run, name)
            done[name] = run.outputs.store.copied_bytes()
            failed += faulty.failed
    assert failed > 10
    return storage, done


@pytest.fixture
def store(by_machines):
    """A store of the finished run, for one test."""
    return copy_of(by_machines[0])
