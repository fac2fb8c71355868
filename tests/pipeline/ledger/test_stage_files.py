"""stage.json holds the stage, its own options and its inputs, and each output replays from it."""

import json
from pathlib import Path

import pytest
import yaml
from support.paths import ROOT
from support.runs import run_all, run_values

from merit_fast.manifests.io import StageManifest, read_manifest
from merit_fast.manifests.schemas import (
    AuditManifest,
    BranchManifest,
    EvaluateManifest,
    SplitManifest,
)
from merit_fast.manifests.stages import AUDIT, STAGES
from merit_fast.model import model_fingerprint
from merit_fast.options.parser import parse
from merit_fast.pipeline.config import RunConfig
from merit_fast.pipeline.reporting import AuditOptions, ReportOptions
from merit_fast.report import write_report
from merit_fast.sketch.mixture.reuse import read_check


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, tiny_model, tiny_mixture):
    """A finished run with an audit; ``run.yml`` and ``out/``."""
    folder = tmp_path_factory.mktemp("run")
    values = run_values(tiny_model, tiny_mixture)
    values["train"] |= {"epochs": 1, "controls": {}}
    values["evaluate"] |= {"audit": True, "audit_rows": 4, "audit_points": 1}
    values["output"] = str(folder / "out")
    (folder / "run.yml").write_text(yaml.safe_dump(values))
    run_all(folder / "run.yml")
    return folder


def stage_files(folder: Path) -> dict[str, StageManifest]:
    files = sorted(folder.rglob("stage.json"))
    return {str(f.parent.relative_to(folder)): read_manifest(StageManifest, f) for f in files}


def test_every_stage_json_names_its_stage(run_folder):
    folder_of = {stage.folder: stage.name for stage in (*STAGES, AUDIT)}
    manifests = stage_files(run_folder / "out")
    assert {name.split("/")[0] for name in manifests} == set(folder_of)
    for name, manifest in manifests.items():
        assert manifest.stage == folder_of[name.split("/")[0]], name


def test_every_stage_writes_the_file_of_the_table(run_folder):
    for stage in (*STAGES, AUDIT):
        pattern = stage.file.replace("BRANCH", "*").replace("ARM", "*").replace("DATASET", "*")
        assert list((run_folder / "out" / stage.folder).glob(pattern)), stage.name


def test_sections_and_options_of_the_table_exist():
    import importlib

    for stage in (*STAGES, AUDIT):
        assert not stage.section or stage.section in RunConfig.__dataclass_fields__
        if stage.options:
            module, _, name = stage.options.partition(":")
            assert getattr(importlib.import_module(module), name)


def test_the_docs_list_every_stage():
    text = (ROOT / "docs" / "architecture.md").read_text()
    for stage in (*STAGES, AUDIT):
        section = f"`{stage.section}:`" if stage.section else ""
        row = f"| `merit-fast {stage.run_by}` | `{stage.folder}/{stage.file}` | {section} |"
        assert f"{row} {stage.purpose} |\n" in text, stage.name


def test_the_report_replays_from_its_stage_json(run_folder, tmp_path):
    out = run_folder / "out"
    options = parse(
        ReportOptions, json.loads((out / "report/stage.json").read_text())["config"], ""
    )
    assert options.audit and options.title == "out"
    write_report(
        read_manifest(SplitManifest, out / "split/split.json"),
        read_manifest(EvaluateManifest, out / "evaluate/evaluate.json"),
        tmp_path / "report.html",
        title=options.title,
        notes=(*options.notes, f"sketch: {read_check(out / 'sketch')}"),
        audit=read_manifest(AuditManifest, out / "audit/audit.json"),
    )
    assert (tmp_path / "report.html").read_bytes() == (out / "report/report.html").read_bytes()


def test_the_audit_keeps_its_own_options_and_depends_only_on_them(run_folder):
    manifest = stage_files(run_folder / "out")["audit"]
    batch_size = RunConfig.__dataclass_fields__["evaluate"].default.batch_size
    assert parse(AuditOptions, manifest.config, "") == AuditOptions(batch_size, 4, 1)
    assert set(manifest.inputs) == {"merit", "start", "held-out"}
    _, fresh = run_all(run_folder / "run.yml", "evaluate.max_new_tokens=3")
    assert "audit" in fresh and "evaluate" not in fresh
    _, fresh = run_all(run_folder / "run.yml", "evaluate.max_new_tokens=3", "evaluate.audit_rows=3")
    assert "evaluate" in fresh and not {"audit", "report"} & fresh


def test_base_and_start_are_the_same_without_a_warmup(run_folder, tiny_model):
    base = model_fingerprint(tiny_model)
    split = read_manifest(SplitManifest, run_folder / "out/split/split.json")
    branch = read_manifest(BranchManifest, run_folder / "out/branches/merit-0/branch.json")
    for manifest in (split, branch):
        assert manifest.base_fingerprint == manifest.start_fingerprint == base
