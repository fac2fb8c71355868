"""Places for outputs: S3 on loopback, fsspec's memory, and a folder; and outputs to put there."""

import itertools

import pytest
from support.merge.s3_server import s3_server_or_skip

from merit_fast.manifests.directories import output_directory
from merit_fast.manifests.io import stage_manifest
from merit_fast.pipeline.storage.place import open_place

NUMBERS = itertools.count()


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
