"""A run tokenizes its rows once: later commands read them, a sketch alone those that it draws."""

import shutil

import pytest
import yaml
from support.runs import Notes, run_values

import merit_fast.data.store.workers as workers
from merit_fast.manifests.stages import SKETCH, SPLIT
from merit_fast.pipeline.config import read_run_config
from merit_fast.pipeline.kept.clean import removable, remove
from merit_fast.pipeline.kept.status import config_status
from merit_fast.pipeline.run import Run


@pytest.fixture
def config(tmp_path, tiny_model, tiny_mixture, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yml").write_text(yaml.safe_dump(run_values(tiny_model, tiny_mixture)))
    return lambda *assignments: read_run_config(
        tmp_path / "run.yml", ["split.examples=4", *assignments]
    )


@pytest.fixture
def encoded(monkeypatch):
    """The rows that this process encodes."""
    rows = []
    plain = workers.pack_rows
    monkeypatch.setattr(workers, "pack_rows", lambda r, n: (rows.extend(r), plain(r, n))[1])
    return rows


def test_commands_share_tokens_and_a_sketch_takes_what_it_draws(config, encoded, tmp_path):
    alone = Run(config("output=alone"), Notes())
    alone.preflight([SKETCH])
    alone.sketch()
    assert len(encoded) == 4 * 4
    assert not list((tmp_path / "alone/tokens").glob("*/*/tokens.bin"))

    encoded.clear()
    whole = Run(config(), Notes())
    whole.preflight([SKETCH, SPLIT])
    num_rows = sum(dataset.num_examples for dataset in whole.data.train)
    assert len(encoded) == num_rows > 16
    whole.sketch()
    files = sorted(path.name for path in (tmp_path / "out/sketch").glob("*.safetensors"))
    assert len(files) == 4
    for name in files:
        one, other = (tmp_path / out / "sketch" / name for out in ("alone", "out"))
        assert one.read_bytes() == other.read_bytes()

    encoded.clear()
    again = Run(config(), Notes())
    again.preflight([SPLIT])
    again.split()
    assert not encoded and (tmp_path / "out/split/split.json").exists()

    # tokens of another config are the only ones that clean removes
    before = {path.name for path in (tmp_path / "out/tokens").iterdir()}
    other = Run(config("data.max_length=30"), Notes())
    _ = other.data.train
    rows = removable(config_status(config(), "run", verify=False))
    assert len(rows) == 4 and {row.name.split("/")[0] for row in rows} == {"tokens"}
    assert remove(tmp_path / "out", rows) == rows
    assert before == {path.name for path in (tmp_path / "out/tokens").iterdir()}

    # a cache: a run without it is as good
    shutil.rmtree(tmp_path / "out/tokens")
    rows = config_status(config(), "run", verify=True)
    states = {row.name: row.state for row in rows}
    assert states["sketch"] == states["split"] == "up to date"


def test_a_dry_run_keeps_no_tokens(config, tmp_path):
    run = Run(config(), Notes(), dry_run=True)
    run.preflight()
    assert not (tmp_path / "out").exists()
