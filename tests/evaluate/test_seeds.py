"""Arms of several models: each is measured once, an arm is their mean, and a run resumes."""

import json
from statistics import mean, stdev

import pytest
from support.checks import tree_bytes
from support.tiny import make_model

from merit_fast.data import DataConfig, DatasetConfig, load_mixture, load_tokenizer
from merit_fast.evaluate import EvaluateConfig, evaluate_arms, evaluator
from merit_fast.evaluate.models import EvaluatedModels, EvaluationInputs, MergedArm
from merit_fast.manifests.io import write_manifest
from merit_fast.manifests.schemas import BranchManifest
from merit_fast.progress import SilentProgress

CONFIG = EvaluateConfig(interpolate=(0.5,), max_new_tokens=3, dtype="fp32")


class Counting(SilentProgress):
    def __init__(self):
        self.total = 0
        self.done = 0
        self.skipped = 0

    def task(self, name, total, unit):
        assert (name, unit) == ("evaluate", "tokens")
        self.total = total
        return super().task(name, total, unit)

    def advance(self, amount, detail=""):
        assert amount >= 0
        self.done += amount

    def skip(self, amount):
        self.skipped += amount


def trained(folder, seed):
    make_model(folder, seed=seed)
    write_manifest(
        BranchManifest(folder.name, "joint", 0, ("d",), 4, 40, 100 + seed, 5, seed, "b", "s"),
        folder / "branch.json",
    )
    timing = {"train_s": float(seed), "peak_memory_bytes": 1000 * seed}
    (folder / "timing.json").write_text(json.dumps(timing))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("models")
    names = ("joint", "joint.seed1", "merit-0", "merit-1", "merit-0.seed1", "merit-1.seed1")
    branches = {name: trained(folder / name, seed) for seed, name in enumerate(names, start=1)}
    merges = {
        name: MergedArm(trained(folder / name, seed), of, (0.25, 0.75))
        for name, seed, of in (
            ("merit", 7, ("merit-0", "merit-1")),
            ("merit.seed1", 8, ("merit-0.seed1", "merit-1.seed1")),
        )
    }
    arms = {
        "joint": ("joint", "joint.seed1"),
        "random": ("merit", "merit.seed1"),  # the same models as merit's
        "merit": ("merit", "merit.seed1"),
    }
    return EvaluatedModels(tiny_model, branches, merges, arms)


@pytest.fixture(scope="module")
def inputs(tiny_model, tiny_mixture):
    tokenizer = load_tokenizer(str(tiny_model))
    configs = [DatasetConfig(**entry) for entry in tiny_mixture]
    rows = load_mixture(configs, tokenizer, DataConfig(), part="eval")
    return EvaluationInputs(rows, tokenizer, 1, CONFIG)


@pytest.fixture(scope="module")
def evaluated(models, inputs, tmp_path_factory):
    directory = tmp_path_factory.mktemp("evaluate")
    progress = Counting()
    return evaluate_arms(models, inputs, directory, progress), directory, progress


def result_of(directory, name):
    return json.loads((directory / f"{name}.json").read_text())["result"]


def test_an_arm_is_the_mean_of_its_models(evaluated):
    manifest, directory, _ = evaluated
    assert list(manifest.arms) == ["base", "joint", "joint@0.5", "random", "merit"]
    assert list(manifest.branches) == ["merit-0", "merit-1", "merit-0.seed1", "merit-1.seed1"]
    for arm, names in {
        "joint": ("joint", "joint.seed1"),
        "joint@0.5": ("joint@0.5", "joint.seed1@0.5"),
        "merit": ("merit", "merit.seed1"),
    }.items():
        result = manifest.arms[arm]
        assert result.num_seeds == 2
        for key in ("loss", "exact_match", "text_loss", "chat_nll", "displacement"):
            values = [result_of(directory, name)[key] for name in names]
            assert getattr(result, key) == pytest.approx(mean(values))
            assert result.errors[key] == pytest.approx(stdev(values) / 2**0.5)
        for name, row in result.datasets.items():
            losses = [result_of(directory, of)["datasets"][name]["loss"] for of in names]
            assert row.loss == pytest.approx(mean(losses))
    assert (manifest.arms["base"].num_seeds, manifest.arms["base"].errors) == (1, {})
    joint = manifest.arms["joint"]
    assert (joint.train_s, joint.peak_memory_bytes, joint.steps) == (1.5, 2000, 5)


def test_the_gain_is_that_of_the_seeds_on_average(evaluated):
    manifest, directory, _ = evaluated
    gains = []
    for seed in ("", ".seed1"):
        losses = [result_of(directory, f"merit-{k}{seed}")["token_loss"] for k in (0, 1)]
        merged = result_of(directory, f"merit{seed}")["token_loss"]
        gains.append(0.25 * losses[0] + 0.75 * losses[1] - merged)
    assert manifest.merging_gain["merit"].gain == pytest.approx(mean(gains))


def test_comparisons_are_of_the_arms(evaluated):
    manifest, _, _ = evaluated
    for comparison in manifest.comparisons:
        first, second = (manifest.arms[arm] for arm in (comparison.first, comparison.second))
        expected = getattr(first, comparison.measure) - getattr(second, comparison.measure)
        assert comparison.difference == pytest.approx(expected, abs=1e-12)
        assert comparison.num_seeds == 2 and comparison.seed_error is not None
    same = next(c for c in manifest.comparisons if (c.first, c.second) == ("merit", "random"))
    assert (same.difference, same.item_error, same.seed_error) == (0.0, 0.0, 0.0)


def test_a_model_of_two_arms_is_measured_once_and_progress_ends_at_its_total(evaluated):
    manifest, directory, progress = evaluated
    assert manifest.arms["random"] == manifest.arms["merit"]
    measured = {file.name.removesuffix(".json") for file in directory.glob("*.json")}
    assert len(measured - {"evaluate", "base_answers"}) == 1 + 6 + 2 + 2
    assert progress.done == progress.total and progress.skipped == 0


@pytest.mark.parametrize("stopped_at", ["base", "joint@0.5", "merit"])
def test_an_interrupted_evaluation_resumes_to_the_same_bytes(
    models, inputs, evaluated, tmp_path, monkeypatch, stopped_at
):
    def write(manifest, path):
        if path.stem == stopped_at:
            raise KeyboardInterrupt
        write_manifest(manifest, path)

    with monkeypatch.context() as patch:
        patch.setattr(evaluator, "write_manifest", write)
        with pytest.raises(KeyboardInterrupt):
            evaluate_arms(models, inputs, tmp_path, SilentProgress())
    progress = Counting()
    evaluate_arms(models, inputs, tmp_path, progress)
    assert progress.done + progress.skipped == progress.total
    assert (progress.skipped > 0) == (stopped_at != "base")
    assert tree_bytes(tmp_path) == tree_bytes(evaluated[1])
