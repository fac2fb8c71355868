"""A run on images from end to end: sketch, split, train, merge, evaluate, report."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from support.runs import run_all

from bench.vision.digits import TASKS, write_digit_tasks
from merit_fast.data import collate, load_mixture, load_tokenizer_or_processor
from merit_fast.evaluate.weights import Interpolation, displacement
from merit_fast.manifests.io import read_manifest
from merit_fast.manifests.schemas import EvaluateManifest, SplitManifest
from merit_fast.merge import load_merged
from merit_fast.model import load_model, target_losses, tower_parameters
from merit_fast.pipeline.config import read_run_config

PROCESSOR = ("preprocessor_config.json", "processor_config.json", "chat_template.jinja")


def join_rows(entry):
    """Writes training rows as LLaVA does: one array, with a row of two turns and one of text."""
    rows = [json.loads(line) for line in Path(entry["path"]).read_text().splitlines()]
    further = [{"from": "human", "value": "sure?"}, {"from": "gpt", "value": "yes"}]
    rows[0]["conversations"] += further
    rows.append({"id": "text", "conversations": further})
    file = Path(entry["path"]).with_suffix(".json")
    file.write_text(json.dumps(rows))
    entry["path"] = str(file)


@pytest.fixture(scope="module")
def run(vision_folders, tmp_path_factory):
    """Folder of a finished run on every task, its config file and the base."""
    folder = tmp_path_factory.mktemp("run")
    base = vision_folders("qwen2_5_vl")
    mixture = write_digit_tasks(folder / "data", num_train=4, num_eval=2)
    join_rows(mixture[0])
    values = {
        "model": str(base),
        "mixture": mixture,
        "output": str(folder / "out"),
        "data": {"max_length": 128},
        "split": {"groups": 2, "examples": 4, "proj_dim": 4096, "blocks": 4, "dtype": "fp32"},
        "train": {
            "batch_size": 8,
            "learning_rate": 1e-2,
            "dtype": "fp32",
            "controls": {"joint": True},
        },
        "evaluate": {"max_new_tokens": 2, "interpolate": [0.5], "audit": True, "dtype": "fp32"},
    }
    file = folder / "run.yml"
    file.write_text(json.dumps(values))
    summary, _ = run_all(file)
    return folder / "out", file, base, summary


def tensors(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def held_out(config_file):
    config = read_run_config(config_file, ())
    processor = load_tokenizer_or_processor(config.model)
    return load_mixture(config.mixture, processor, config.data, part="eval")


def test_every_task_is_in_a_group(run):
    split = read_manifest(SplitManifest, run[0] / "split/split.json")
    assert split.datasets[0].num_examples == 5 and split.datasets[1].num_examples == 4
    assert {row.name for row in split.datasets} == set(TASKS)
    assert {row.group for row in split.datasets} == {0, 1}


def test_models_have_the_base_s_tensors_and_its_frozen_tower(run):
    """Branches and merges use the names of the base's files, and their towers are its bits."""
    out, _, base, _ = run
    before = tensors(base)
    models = [path.parent for path in sorted(out.glob("*/*/config.json"))]
    assert {path.parent.name for path in models} == {"branches", "merged"}
    for model in models:
        after = tensors(model)
        assert after.keys() == before.keys()
        for name, tensor in after.items():
            assert torch.equal(tensor, before[name]) == name.startswith("visual."), name
        assert json.loads((model / "config.json").read_text())["model_type"] == "qwen2_5_vl"


def test_models_carry_the_processor_byte_for_byte(run):
    out, _, base, _ = run
    for model in (path.parent for path in out.glob("*/*/config.json")):
        for name in PROCESSOR:
            assert (model / name).read_bytes() == (base / name).read_bytes(), model / name
        assert load_tokenizer_or_processor(str(model)).image_processor.patch_size == 14


def test_evaluation_is_the_merged_model_s_own_loss(run):
    out, file, _, _ = run
    result = read_manifest(EvaluateManifest, out / "evaluate/evaluate.json")
    merged = load_model(str(out / "merged/merit"), "fp32")
    assert set(result.arms["merit"].datasets) == set(TASKS)
    for dataset in held_out(file):
        losses = []
        for example in dataset.examples:
            with torch.no_grad():
                losses.append(target_losses(merged, collate([example], [0], 0)).loss)
        mean = float(torch.cat(losses).mean())
        assert result.arms["merit"].datasets[dataset.name].loss == pytest.approx(mean, abs=1e-4)
    assert result.arms["merit"].text_loss > 0 and result.arms["base"].chat_nll > 0


def test_the_audit_stands_on_the_same_models(run):
    """Its weights are read under the names in memory, which are not those of the files."""
    out, _, _, _ = run
    result = read_manifest(EvaluateManifest, out / "evaluate/evaluate.json").arms["merit"]
    audit = json.loads((out / "audit/audit.json").read_text())["arms"]["merit"]
    assert audit["displacement"] == pytest.approx(result.displacement, rel=1e-4)
    assert audit["merged_loss"] == pytest.approx(result.token_loss, abs=1e-3)
    assert 0 < audit["contraction"] <= 1


def test_merging_in_memory_gives_the_merged_model(run):
    out, _, _, _ = run
    evaluation = read_manifest(EvaluateManifest, out / "evaluate/evaluate.json")
    branches = sorted((out / "branches").glob("merit-*"))
    weights = evaluation.merging_gain["merit"].weights
    model = load_merged(branches, weights)
    expected = load_model(str(out / "merged/merit"), "fp32").state_dict()
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


def test_interpolation_reaches_the_base_under_the_names_in_memory(run):
    """The files call a tensor visual.x, the model calls it model.visual.x."""
    out, _, base, _ = run
    joint = next((out / "branches").glob("joint*"))
    model = load_model(str(joint), "fp32")
    Interpolation(model, base).set(0.0)
    for name, tensor in load_model(str(base), "fp32").state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert displacement(joint, base) > 0


def test_a_second_run_has_nothing_to_do(run):
    _, file, _, summary = run
    again, fresh = run_all(file)
    assert {"sketch", "split", "evaluate"} <= fresh
    assert again == summary


def test_thawing_the_tower_outdates_sketch_and_branches(run, tmp_path):
    from merit_fast.pipeline.outputs import Outputs

    _, file, _, _ = run
    frozen = Outputs(read_run_config(file, ()), "{stage}")
    thawed = Outputs(read_run_config(file, ("train.freeze=[]",)), "{stage}")
    assert frozen.sketch.fingerprint != thawed.sketch.fingerprint
    branch = next(iter(frozen.branches.values()))
    assert frozen.branch(branch).fingerprint != thawed.branch(branch).fingerprint


def test_text_only_rows_train_a_model_that_reads_images(vision_folders, tiny_mixture, tmp_path):
    base = vision_folders("qwen2_5_vl")
    values = {
        "model": str(base),
        "mixture": tiny_mixture,
        "output": str(tmp_path / "out"),
        "split": {"groups": 2, "examples": 2, "proj_dim": 4096, "blocks": 4, "dtype": "fp32"},
        "train": {"batch_size": 8, "packing": True, "dtype": "fp32"},
        "evaluate": {"max_new_tokens": 2, "dtype": "fp32"},
    }
    file = tmp_path / "run.yml"
    file.write_text(json.dumps(values))
    run_all(file)
    merged = load_model(str(tmp_path / "out/merged/merit"), "fp32")
    start = load_model(str(base), "fp32")
    for name, parameter in tower_parameters(merged).items():
        assert torch.equal(parameter, start.get_parameter(name))
