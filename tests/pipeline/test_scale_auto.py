"""The scale that held-out rows choose: the minimum of a parabola within its range."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file
from support.checks import tree_bytes
from support.paths import KILL_AT
from support.runs import MEASURED, run_values
from support.tiny import chat_row
from support.tuning import make_branches, make_setting, read, tune
from support.warm import run_python

from merit_fast.evaluate.losses import mean_loss
from merit_fast.merge import load_merged, merge_state_dicts
from merit_fast.tune import fit
from merit_fast.tune.search import _Losses

SCALES = fit.SCALES


@pytest.fixture
def setting(tmp_path, tiny_model, tiny_mixture):
    return make_setting(tmp_path, tiny_model, tiny_mixture)


def losses_of(monkeypatch, loss):
    monkeypatch.setattr(_Losses, "_measure", lambda self, point: loss(point["scale"]))


@pytest.mark.parametrize("at,expected", [(1.3, 1.3), (0.62, 0.62), (7.0, 2.0), (-3.0, 0.0)])
def test_the_minimum_of_a_parabola_is_found_and_moved_into_the_range(at, expected):
    assert fit.parabola_minimum(SCALES, [2 + (s - at) ** 2 for s in SCALES]) == pytest.approx(
        expected
    )


@pytest.mark.parametrize(
    "losses", [[1, 2, 1], [1, 2, 3], [2, 2, 2], [1, 1, float("nan")], [1, 1, float("inf")]]
)
def test_what_does_not_curve_upwards_has_no_minimum(losses):
    assert fit.parabola_minimum(SCALES, losses) is None


def test_a_known_minimum_is_taken(setting, monkeypatch):
    losses_of(monkeypatch, lambda s: 3 + 0.5 * (s - 1.37) ** 2)
    tuned, sentence = tune(setting, scale="auto")
    assert tuned.scale == tuned.scale_search.minimum == pytest.approx(1.37, abs=1e-4)
    assert tuned.scale_search.scales[:3] == SCALES and len(tuned.scale_search.losses) == 4
    assert "scale 1.37: loss 3.0000 against 3.0684 at scale 1" in sentence
    assert tuned.weights == (0.25, 0.5, 0.25) and tuned.weight_search is None


@pytest.mark.parametrize(
    "loss,expected",
    [
        (lambda s: -s, 1.5),  # no parabola opens upwards: the best of the three
        # the minimum is worse than the three
        (lambda s: 9.0 if s not in SCALES else (s - 1.2) ** 2, 1.0),
        (lambda s: (s - 1) ** 2, 1.0),  # it is one of the three
        (lambda s: 1.0, 1.0),  # all alike: the merge as it was
        (lambda s: None if s > 1 else s, 0.5),  # not finite beyond 1
    ],
)
def test_nothing_worse_than_what_was_evaluated_is_taken(setting, monkeypatch, loss, expected):
    losses_of(monkeypatch, loss)
    assert tune(setting, scale="auto")[0].scale == expected


def test_losses_are_those_of_the_merges(setting):
    candidates, examples = setting
    tuned, _ = tune(setting, scale="auto", method="task_arithmetic", weights="uniform")
    search = tuned.scale_search
    for scale, loss in zip(search.scales, search.losses, strict=True):
        model = load_merged(
            candidates.models,
            tuned.weights,
            base=candidates.base,
            scale=scale,
            method="task_arithmetic",
        )
        assert loss == pytest.approx(mean_loss(model, examples, 1, 4), abs=1e-12)
    assert min(search.losses) == search.losses[search.scales.index(tuned.scale)]


def test_a_method_without_weights_takes_a_scale(setting):
    tuned, _ = tune(setting, scale="auto", method="sce")
    assert (
        min(tuned.scale_search.losses)
        == tuned.scale_search.losses[tuned.scale_search.scales.index(tuned.scale)]
    )


def merit(*words, cwd):
    return run_python(["-m", "merit_fast.cli.main", *map(str, words)], cwd=cwd)


@pytest.fixture
def checkpoints(tmp_path, tiny_model):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps(chat_row("Give the capital.", "France", "Paris")) + "\n" for _ in range(3)
        )
    )
    paths = make_branches(tmp_path, tiny_model)
    return [word for path in paths for word in ("--model", path)], rows


def test_checkpoints_are_merged_at_the_scale_and_weights_that_rows_choose(
    tmp_path, tiny_model, checkpoints
):
    models, rows = checkpoints
    options = [
        "--base",
        tiny_model,
        "--validation",
        f"c={rows}",
        "--scale",
        "auto",
        "--weights",
        "fit",
        "--json",
    ]
    result = merit("merge", "out", *models, *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    tuned = read(tmp_path / "out" / "tune.json")
    assert summary["tuned"] == tuned and tuned["num_examples"] == 3
    assert summary["weights"] == pytest.approx(tuned["weights"])
    assert [c for _, c in summary["coefficients"]][:3] == pytest.approx(
        [tuned["scale"] * w for w in tuned["weights"]]
    )
    inputs = [
        load_file(tmp_path / "branches" / f"merit-{k}" / "model.safetensors") for k in range(3)
    ]
    base = {n: v for file in tiny_model.glob("*.safetensors") for n, v in load_file(file).items()}
    expected = merge_state_dicts(
        inputs, summary["weights"], base, scale=tuned["scale"], normalize=False
    )
    for file in (tmp_path / "out").glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            assert np.array_equal(tensor.numpy(), expected[name].numpy()), name


def test_a_run_directory_can_be_merged_with_rows(tmp_path, tiny_model, checkpoints, finished_run):
    _, rows = checkpoints
    options = [
        "--run",
        finished_run.copy_to(tmp_path),
        "--base",
        tiny_model,
        "--validation",
        f"c={rows}",
        "--param",
        "scale=auto",
    ]
    result = merit("merge", "merged", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "at scale 1 (nats per target token of 3 held-out rows)" in result.stderr


@pytest.mark.parametrize(
    "words,message",
    [
        (["--scale", "auto"], "scale: auto is chosen on held-out rows"),
        (["--weights", "fit"], "weights: fit is chosen on held-out rows"),
        (["--validation", "c=rows.jsonl"], "--validation goes with --scale auto or --weights fit"),
        (["--scale", "auto", "--validation", "rows.jsonl"], "--validation: must be NAME=PATH"),
        (["--scale", "auto", "--validation", "a/b=rows.jsonl"], "name: must be a file name"),
        (["--scale", "auto", "--validation", "c=none.jsonl"], "none.jsonl"),
        (
            ["--scale", "auto", "--validation", "c=rows.jsonl"],
            "scale auto needs a base model; give --base",
        ),
        (
            ["--weights", "fit", "--validation", "c=rows.jsonl", "--dry-run"],
            "go with a scale and weights in numbers",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path, checkpoints, call, monkeypatch, words, message
):
    monkeypatch.chdir(tmp_path)
    code, _, errors = call("merge", "out", *checkpoints[0], *words)
    assert code == 2 and message in errors and errors.count("\n") == 1, errors
    assert not (tmp_path / "out").exists()


def test_too_few_held_out_rows_are_refused_before_the_training(
    tmp_path,
    tiny_model,
    tiny_mixture,
    call,
    monkeypatch,
):
    values = run_values(tiny_model, tiny_mixture) | {"merge": {"scale": "auto"}}
    values["mixture"] = [dict(entry) for entry in tiny_mixture]
    rows = Path(values["mixture"][1]["eval_path"]).read_text().splitlines()
    (tmp_path / "one.jsonl").write_text(rows[0] + "\n")
    values["mixture"][1]["eval_path"] = str(tmp_path / "one.jsonl")
    (tmp_path / "run.yml").write_text(yaml.safe_dump(values))
    monkeypatch.chdir(tmp_path)
    code, _, errors = call("run", "run.yml", "--json")
    rule = "codes: scale auto, weights fit and train.patience need at least 2 held-out rows"
    assert code == 2 and rule in errors
    assert not (tmp_path / "out" / "branches" / "joint").exists()


KILLS = [
    ("tried.json", 1),
    ("tried.json", 7),
    ("tune.json", 1),
    ("merit.tmp/model-00002", 1),
    ("merged/merit$", 1),
]


@pytest.mark.process
@pytest.mark.slow
def test_kill_9_while_choosing_then_resume_gives_the_same_bytes(tmp_path, tiny_model, tiny_mixture):
    values = run_values(tiny_model, tiny_mixture) | {"merge": {"scale": "auto", "weights": "fit"}}
    values["train"] |= {"controls": {}, "epochs": 1}
    whole = tmp_path / "whole"
    broken = tmp_path / "broken"
    whole.mkdir()
    (whole / "run.yml").write_text(yaml.safe_dump(values))
    for stage in ("sketch", "split", "train"):
        assert merit(stage, "run.yml", cwd=whole).returncode == 0
    shutil.copytree(whole, broken)
    assert merit("merge", "run.yml", cwd=whole).returncode == 0
    script = str(KILL_AT)
    for pattern, count in KILLS:
        result = run_python([script, pattern, str(count), "merge", "run.yml"], cwd=broken)
        assert result.returncode == -signal.SIGKILL, (pattern, result.stderr)
    assert merit("merge", "run.yml", cwd=broken).returncode == 0
    assert not list(broken.rglob("*.tmp")) and not list(broken.rglob("tried.json"))
    assert tree_bytes(whole / "out", MEASURED) == tree_bytes(broken / "out", MEASURED)
