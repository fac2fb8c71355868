"""Whatever config, headers and rows tell is refused in one line before the first heavy step."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from support.runs import Notes, run_values

from merit_fast.errors import InputError
from merit_fast.pipeline.config import read_run_config
from merit_fast.pipeline.preflight import disk
from merit_fast.pipeline.preflight.base import check_memory
from merit_fast.pipeline.run import Run
from merit_fast.split.config import SplitConfig


@pytest.fixture
def refused(tmp_path, tiny_model, tiny_mixture, monkeypatch):
    """Runs a changed config and returns the error; nothing may be written."""
    monkeypatch.chdir(tmp_path)

    def refuse(*assignments, **changes):
        values = {**run_values(tiny_model, tiny_mixture), **changes}
        (tmp_path / "run.yml").write_text(yaml.safe_dump(values))
        out = tmp_path / "out"
        before = sorted(path for path in tmp_path.iterdir() if path != out)
        with pytest.raises(InputError) as error:
            Run(read_run_config(tmp_path / "run.yml", assignments), Notes()).all()
        left = [path.name for path in out.iterdir()] if out.exists() else []
        assert left in ([], ["tokens"]), "a refused run leaves tokenized rows at most"
        assert sorted(path for path in tmp_path.iterdir() if path != out) == before
        assert "\n" not in str(error.value)
        return str(error.value)

    return refuse


@pytest.mark.parametrize(
    "assignments,message",
    [
        (["split.groups=100"], "split.groups: must be at most the number of datasets (4"),
        (["split.pins={together: [[capitals, nowhere]]}"], "split.pins.together: must be a data"),
        (["split.pins={group: {nowhere: 0}}"], "split.pins.group: must be a dataset"),
        (["split.pins={group: {capitals: 2}}"], "split.pins.group.capitals: must be 0 to 1, got 2"),
        (["split.spread=[nowhere]"], "split.spread: must be a dataset of the mixture"),
        (
            ["split.groups=auto", "split.spread=[nowhere]"],
            "split.spread: must be a dataset of the mixture",
        ),
        (
            ["split.method=manual", "split.manual=[[capitals], [codes]]"],
            "split.manual: must name every dataset",
        ),
        (["split.parts={mlp: nowhere}"], "split.parts.mlp: must match at least one"),
        (["split.parts={a: mlp, b: up_proj}"], "split.parts: must put a parameter into one part"),
        (["split.parts={mlp: (}"], "split.parts.mlp: must be a regular expression"),
        (["split.parts={a/b: mlp}"], "split.parts: must be file names of letters"),
        (["split.parts={}"], "split.parts: must be at least one part, or absent, got {}"),
        (["split.parts=mlp"], "split.parts: must be a mapping"),
        (
            ["split.parts={head: lm_head}", "train.freeze=[lm_head]"],
            "split.parts.head: must match at least one",
        ),
        (["merge.method=slerp", "split.groups=4"], "merge: method slerp needs 2 models, got 4"),
        (["merge.weights=[1, 2, 3]"], "merge.weights: must list 2 numbers, got 3"),
        (["merge.models=[{weight: 1}]"], "merge.models: must have 2 entries, got 1"),
        (["merge.max_memory=1K"], "merge.max_memory: must be at least"),
    ],
)
def test_a_config_that_cannot_work_is_refused(refused, assignments, message):
    assert message in refused(*assignments)


def test_every_row_of_every_held_out_file_is_read_first(refused, tmp_path, tiny_mixture):
    broken = tmp_path / "broken.jsonl"
    good = Path(tiny_mixture[1]["eval_path"]).read_text()
    broken.write_text(good + '{"messages": [{"role": "user"}]}\n')
    mixture = [*tiny_mixture[:1], {**tiny_mixture[1], "eval_path": str(broken)}, *tiny_mixture[2:]]
    number = len(good.splitlines()) + 1
    assert f"broken.jsonl:{number}: " in refused(mixture=mixture)


def test_held_out_rows_are_needed_for_evaluation_and_tuning(refused, tmp_path, tiny_mixture):
    bare = [{"name": each["name"], "path": each["path"]} for each in tiny_mixture]
    assert "evaluate: no dataset of the mixture has held-out rows" in refused(mixture=bare)
    assert "merge: scale auto, weights fit and train.patience need held-out rows" in refused(
        "merge.scale=auto", mixture=bare
    )
    one = tmp_path / "one.jsonl"
    one.write_text(Path(tiny_mixture[0]["eval_path"]).read_text().splitlines()[0])
    short = [{**tiny_mixture[0], "eval_path": str(one)}, *tiny_mixture[1:]]
    assert "need at least 2 held-out rows per dataset" in refused("merge.scale=auto", mixture=short)


def test_the_base_must_be_a_causal_lm_that_transformers_knows(refused, tmp_path, tiny_model):
    for model_type, message in (
        ("lamma", "model_type: must be one that the installed transformers knows, got 'lamma'"),
        ("t5", "model_type: must be a causal language model, got 't5'"),
    ):
        model = tmp_path / model_type
        shutil.copytree(tiny_model, model)
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
        assert message in refused(model=str(model))


def test_a_quantised_base_is_not_read_layer_by_layer(tmp_path, tiny_model):
    model = tmp_path / "quantised"
    shutil.copytree(tiny_model, model)
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (model / "config.json").write_text(json.dumps(config))
    check_memory(model, SplitConfig(memory="auto"))
    check_memory(tiny_model, SplitConfig(memory="layers"))
    with pytest.raises(InputError, match=r"split\.memory: must be auto or whole for quantised"):
        check_memory(model, SplitConfig(memory="layers"))


def test_a_base_without_safetensors_is_refused_before_training(refused, tmp_path, tiny_model):
    model = tmp_path / "pickled"
    model.mkdir()
    for file in tiny_model.iterdir():
        if "safetensors" not in file.name:
            shutil.copy(file, model / file.name)
    (model / "pytorch_model.bin").write_bytes(b"x")
    assert "pytorch_model.bin is a pickle file" in refused(model=str(model))


def test_a_backend_that_cannot_run_is_refused(refused, monkeypatch):
    monkeypatch.setenv("MERIT_FAST_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    message = refused()
    assert message.startswith("MERIT_FAST_BACKEND: 'triton' cannot run flat_sketch here: ")


def test_a_disk_that_is_too_small_is_told_with_its_price(refused, monkeypatch):
    monkeypatch.setattr(disk, "free_bytes", lambda path: 1_000_000)
    message = refused()
    assert re.match(r"output: \S*out must have ", message) and "the disk has 977 KiB" in message
    assert "branches" in message and "merges" in message


def test_an_output_that_cannot_be_written_is_refused(refused, monkeypatch, tmp_path):
    monkeypatch.setattr("merit_fast.pipeline.preflight.checks.os.access", lambda *a: False)
    assert refused().startswith("output: must be writable")


def test_a_stage_checks_only_its_own_part(tmp_path, tiny_model, tiny_mixture, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    values = run_values(tiny_model, tiny_mixture)
    values["merge"] = {"method": "slerp"}
    values["split"]["groups"] = 4
    (tmp_path / "run.yml").write_text(yaml.safe_dump(values))
    assert call("sketch", "run.yml")[0] == 0
    code, _, err = call("run", "run.yml")
    assert code == 2 and "merge: method slerp needs 2 models, got 4" in err
    code, _, err = call("split", "run.yml", "split.groups=5")
    assert code == 2 and "split.groups: must be at most the number of datasets" in err
