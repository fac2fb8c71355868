"""The report stage: a page of whatever is there, made again when more is there."""

import json

import pytest
import yaml
from support.runs import Notes, run_values

from merit_fast.manifests.io import read_manifest
from merit_fast.manifests.schemas import SplitManifest
from merit_fast.pipeline.config import read_run_config
from merit_fast.pipeline.run import Run
from merit_fast.report import advise


@pytest.fixture
def run_of(tmp_path, tiny_model, tiny_mixture, monkeypatch):
    """Makes a new Run of one config and collects its notes."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "run.yml"
    values = run_values(tiny_model, tiny_mixture)
    for key in ("arms", "controls"):  # few datasets: there may be no split to draw a control from
        values["train"].pop(key, None)
    file.write_text(yaml.safe_dump(values))

    def make(*assignments):
        notes = Notes()
        return Run(read_run_config(file, assignments), notes), notes

    return make


def state(folder):
    return json.loads((folder / "out" / "report" / "report.json").read_text())["state"]


def test_the_report_is_made_after_the_split_and_again_after_the_evaluation(run_of, tmp_path):
    run, notes = run_of()
    run.sketch()
    run.split()
    assert run.report()
    assert "report: of the split only; no evaluation of this config is there" in notes.notes
    page = (tmp_path / "out" / "report" / "report.html").read_text()
    split = read_manifest(SplitManifest, tmp_path / "out" / "split" / "split.json")
    assert advise(split).sentence in page and state(tmp_path) == "before training"
    assert not run.report()  # nothing more is there

    run, notes = run_of()
    run.all()
    assert state(tmp_path) == "after evaluation"
    assert {path.name for path in (tmp_path / "out" / "report").iterdir()} >= {
        "report.html",
        "report.json",
        "datasets.csv",
        "pairs.csv",
        "arms.csv",
    }
    assert not run.report()

    # an evaluation of another config does not count, and that is told
    run, notes = run_of("evaluate.max_new_tokens=3")
    assert run.report() and state(tmp_path) == "before training"
    assert any(note.startswith("report: of the split only") for note in notes.notes)


def test_an_audit_that_is_asked_for_and_absent_is_told(run_of, tmp_path):
    run, _ = run_of()
    run.all()
    run, notes = run_of("evaluate.audit=true", "evaluate.audit_rows=4")
    assert run.report() and state(tmp_path) == "after evaluation"
    assert "report: without an audit; no audit of this config is there" in notes.notes
