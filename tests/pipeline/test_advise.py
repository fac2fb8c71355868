"""`merit-fast advise`: sketch and split only, one sentence of advice, reasons, next steps, cost."""

import json
from pathlib import Path

import pytest
import yaml
from support.runs import run_values

from merit_fast.pipeline.run import Run
from merit_fast.report import advise


@pytest.fixture
def config_file(tmp_path, tiny_model, tiny_mixture, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = run_values(tiny_model, tiny_mixture)
    values["train"] = {"epochs": 2, "batch_size": 4, "dtype": "fp32"}
    file = tmp_path / "run.yml"
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.fixture
def reported(monkeypatch):
    """The runs whose report was written, instead of the page."""
    runs = []
    monkeypatch.setattr(Run, "report", lambda run: runs.append(run) is None)
    return runs


def test_advise_answers_without_training(call, config_file, reported):
    code, out, err = call("advise", "run.yml", "--json")
    assert (code, len(reported)) == (0, 1), err
    answer = json.loads(out)
    split = reported[0].outputs.split_manifest
    steps = reported[0].data.branch_steps(split)
    advice = advise(split, steps)
    assert answer["advice"] == advice.advice in ("do not split", "measure more")
    assert answer["sentence"] == advice.sentence and answer["groups"] == 2
    assert answer["reasons"] == list(advice.reasons)
    assert answer["next"] == [text.replace("CONFIG.yml", "run.yml") for text in advice.next]
    cost = answer["cost"]
    assert cost["rows"] == 2 * sum(row.num_examples for row in split.datasets)
    assert cost["target_tokens"] == 2 * sum(row.num_target_tokens for row in split.datasets)
    assert cost["steps"] == steps and cost["minutes"] >= 0
    assert Path(answer["split"]).is_file() and not Path("out/branches").exists()

    code, out, err = call("advise", "run.yml", "split.groups=3")
    assert (code, len(reported)) == (0, 2), err
    lines = out.splitlines()
    assert lines[0].startswith(("Do not split: ", "Measure more: ")) and "Reasons:" in lines
    assert any("merit-fast" in line and "run.yml" in line for line in lines)
    assert "optimizer steps; each control" in lines[-1]  # no minutes: the sketch was there


def test_advise_needs_a_config(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call("advise")
    assert (code, out) == (2, "") and "advise: needs a CONFIG.yml" in err
