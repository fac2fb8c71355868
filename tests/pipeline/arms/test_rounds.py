"""`run --rounds`: each round starts from the merge before; the first one is the run itself."""

import json
from pathlib import Path

import pytest

from merit_fast.cli.main import main
from merit_fast.manifests.io import read_manifest
from merit_fast.manifests.schemas import BranchManifest
from merit_fast.model import model_fingerprint


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr("sys.argv", ["merit-fast", *words])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code, capsys.readouterr()


def test_a_second_round_starts_from_the_first_ones_merge_and_resumes(
    finished_run, tmp_path, monkeypatch, capsys
):
    out = finished_run.copy_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    words = ("run", "run.yml", "--rounds", "2", "--json")
    code, printed = run(monkeypatch, capsys, *words)
    assert code == 0, printed.err
    first, second = json.loads(printed.out)["rounds"]
    merged = out / "merged" / "merit"
    assert Path(first["merged"]).resolve() == merged
    assert Path(second["output"]).resolve() == out / "round-2"
    branch = read_manifest(BranchManifest, out / "round-2" / "branches" / "merit-0" / "branch.json")
    assert branch.start_fingerprint == model_fingerprint(merged)
    assert second["arms"]["base"]["loss"] == pytest.approx(first["arms"]["merit"]["loss"], rel=1e-5)
    assert set(second["arms"]) == {"base", "merit"}
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    code, again = run(monkeypatch, capsys, *words)
    assert code == 0 and json.loads(again.out) == json.loads(printed.out)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}


def test_rounds_below_one_are_refused(finished_run, tmp_path, monkeypatch, capsys):
    finished_run.copy_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    code, printed = run(monkeypatch, capsys, "run", "run.yml", "--rounds", "0")
    assert code == 2 and "--rounds: must be at least 1, got 0" in printed.err
