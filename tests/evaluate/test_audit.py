"""The audit says what it measures: close to the merge the two gains agree, far away they do not."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from merit_fast.data import DataConfig, DatasetConfig, load_mixture, load_tokenizer
from merit_fast.errors import InputError
from merit_fast.evaluate import EvaluateConfig
from merit_fast.evaluate.audit import _Auditor, audit_merges, audit_rows
from merit_fast.evaluate.stage import MergedArm
from merit_fast.manifests.io import read_manifest
from merit_fast.manifests.schemas import AuditManifest
from merit_fast.model import load_model
from merit_fast.progress import SilentProgress

WEIGHTS = (0.2, 0.3, 0.5)


@pytest.fixture(scope="module")
def datasets(tiny_model, tiny_mixture):
    configs = [DatasetConfig(**entry) for entry in tiny_mixture]
    return load_mixture(configs, load_tokenizer(str(tiny_model)), DataConfig(), part="eval")


def checkpoint(folder, tensors, like):
    folder.mkdir()
    for file in like.iterdir():
        if "safetensors" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def sharpened(tiny_model):
    """The tiny model with its matrices times 3.

    As initialised, its loss is so flat that rounding hides a curvature.
    """
    weights = {
        n: v.float()
        for file in tiny_model.glob("*.safetensors")
        for n, v in load_file(file).items()
    }
    return {name: value * (3 if value.dim() > 1 else 1) for name, value in weights.items()}


def branches_around(folder, tiny_model, size):
    """Three branches at a random distance from the model, and their weighted average, all fp32."""
    base = sharpened(tiny_model)
    numbers = torch.Generator().manual_seed(0)
    moved = [
        {n: v + size * v.abs() * torch.randn(v.shape, generator=numbers) for n, v in base.items()}
        for _ in WEIGHTS
    ]
    merged = {n: sum(w * m[n] for w, m in zip(WEIGHTS, moved, strict=True)) for n in base}
    paths = {
        f"b{k}": checkpoint(folder / f"b{k}", tensors, tiny_model)
        for k, tensors in enumerate(moved)
    }
    return paths, checkpoint(folder / "merged", merged, tiny_model), base, moved, merged


def audited(folder, tiny_model, datasets, size):
    paths, merged, *tensors = branches_around(folder, tiny_model, size)
    start = checkpoint(folder / "base", tensors[0], tiny_model)
    merges = {"merit": MergedArm(merged, tuple(paths), WEIGHTS)}
    config = EvaluateConfig(batch_size=3, audit_rows=12, audit_points=2)
    return audit_merges(merges, paths, start, datasets, 1, config, SilentProgress())[
        "merit"
    ], *tensors


def test_near_the_merge_the_gain_is_what_the_hessian_says(tmp_path, tiny_model, datasets):
    audit, base, moved, merged = audited(tmp_path, tiny_model, datasets, 0.05)
    assert audit.ratio == pytest.approx(1.0, abs=0.1) and audit.in_basin
    mean = sum(w * loss for w, loss in zip(WEIGHTS, audit.branch_losses, strict=True))
    assert audit.gain == pytest.approx(mean - audit.merged_loss, abs=1e-9)

    def square(a, b):
        return sum(float((a[n].double() - b[n].double()).square().sum()) for n in base)

    assert audit.displacement == pytest.approx(square(merged, base) ** 0.5, rel=1e-5)
    spread = sum(w * square(m, base) for w, m in zip(WEIGHTS, moved, strict=True))
    assert audit.contraction == pytest.approx(square(merged, base) / spread, rel=1e-5)
    assert audit.contraction == pytest.approx(
        sum(w * w for w in WEIGHTS), rel=0.05
    )  # unrelated branches
    assert [(b.first, b.second) for b in audit.barriers] == [
        ("b0", "b1"),
        ("b0", "b2"),
        ("b1", "b2"),
    ]
    assert [share for share, _ in audit.noise] == [0.01, 0.03, 0.1] and audit.num_examples == 8


def test_a_merge_beside_the_mean_of_its_branches_has_a_slope_and_the_audit_counts_it(
    tmp_path, tiny_model, datasets
):
    paths, _, base, _, merged = branches_around(tmp_path, tiny_model, 0.02)
    scaled = checkpoint(
        tmp_path / "scaled", {n: base[n] + 2 * (merged[n] - base[n]) for n in base}, tiny_model
    )
    start = checkpoint(tmp_path / "base", base, tiny_model)
    merges = {"merit": MergedArm(scaled, tuple(paths), WEIGHTS)}
    config = EvaluateConfig(batch_size=3, audit_rows=12, audit_points=1)
    audit = audit_merges(merges, paths, start, datasets, 1, config, SilentProgress())["merit"]
    assert audit.gain < 0 and audit.ratio == pytest.approx(
        1.0, abs=0.1
    )  # without its slope: above 0


def test_far_from_the_merge_it_says_so(tmp_path, tiny_model, datasets):
    audit, *_ = audited(tmp_path, tiny_model, datasets, 3.0)
    assert not audit.in_basin


def test_curvature_is_the_second_difference_of_the_loss(tiny_model, datasets):
    auditor = _Auditor(load_model(str(tiny_model), "fp32"), audit_rows(datasets, 5), 1, 2)
    numbers = torch.Generator().manual_seed(1)
    auditor.set(
        {name: value for name, value in sharpened(tiny_model).items() if name in auditor.weights}
    )
    center = {name: value.clone() for name, value in auditor.weights.items()}
    delta = {n: v.abs() * torch.randn(v.shape, generator=numbers) for n, v in center.items()}
    ((slope, curvature),) = auditor.derivatives([delta])
    auditor.model.requires_grad_(False)
    step = 0.02
    there, here, back = (
        auditor.loss({n: v + s * delta[n] for n, v in center.items()}) for s in (step, 0.0, -step)
    )
    assert slope == pytest.approx((there - back) / (2 * step), rel=0.05)
    assert curvature == pytest.approx((there - 2 * here + back) / step**2, rel=0.05)


def test_a_barrier_is_the_height_above_the_line(tiny_model, datasets, monkeypatch):
    auditor = _Auditor(load_model(str(tiny_model), "fp32"), audit_rows(datasets, 2), 1, 2)
    ends = {"a": torch.zeros(1)}, {"a": torch.ones(1)}
    bump = {0.5: 0.5}
    monkeypatch.setattr(
        auditor, "loss", lambda weights: 1 + float(weights["a"]) + bump.get(float(weights["a"]), 0)
    )
    assert auditor.barrier(ends, (1.0, 2.0), points=3) == pytest.approx(0.5)
    monkeypatch.setattr(auditor, "loss", lambda weights: float(weights["a"]) ** 2)
    assert auditor.barrier(ends, (0.0, 1.0), points=3) == 0.0  # below the line is no barrier


def test_rows_are_taken_in_turn_and_none_is_refused(datasets):
    rows = audit_rows(datasets, len(datasets) + 1)
    expected = [dataset.examples[0] for dataset in datasets] + [datasets[0].examples[1]]
    for row, example in zip(rows, expected, strict=True):
        assert row.input_ids.tolist() == example.input_ids.tolist()
    assert len(audit_rows(datasets, 10_000)) == sum(d.num_examples for d in datasets)
    with pytest.raises(InputError, match="evaluate.audit: no dataset"):
        audit_merges({}, {}, None, [], 1, EvaluateConfig(), SilentProgress())


def test_a_run_with_audit_shows_it_and_without_does_not_evaluate_again(
    tmp_path, tiny_model, tiny_mixture, monkeypatch
):
    import yaml
    from support.runs import run_all, run_values

    monkeypatch.chdir(tmp_path)
    values = run_values(tiny_model, tiny_mixture)
    values["train"] |= {"controls": {}, "epochs": 1}
    values["evaluate"] |= {"audit_rows": 8, "audit_points": 1}
    file = tmp_path / "run.yml"
    file.write_text(yaml.safe_dump(values))
    run_all(file)
    assert not (tmp_path / "out" / "audit").exists()
    _, fresh = run_all(file, "evaluate.audit=true")
    assert "evaluate" in fresh and "report" not in fresh
    audit = read_manifest(AuditManifest, tmp_path / "out" / "audit" / "audit.json").arms["merit"]
    assert f"{audit.ratio:.3f}" in (tmp_path / "out" / "report" / "report.html").read_text()
