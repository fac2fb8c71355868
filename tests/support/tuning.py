"""Branches of the tiny model for the tests of what held-out rows choose, and a loss in the place of a model's."""

import json

import torch
from safetensors.torch import load_file, save_file

from merit_fast.data import DataConfig, DatasetConfig, load_mixture, load_tokenizer
from merit_fast.manifests.io import write_manifest
from merit_fast.manifests.schemas import BranchManifest
from merit_fast.merge import MergeConfig
from merit_fast.progress import SilentProgress
from merit_fast.tune.search import TuneInputs, starting_weights, tune_merge, tuning_sentence

TOKENS = (100, 200, 100)


def make_branch(folder, like, tensors, name, group, tokens):
    folder.mkdir(parents=True)
    for file in like.iterdir():
        if "safetensors" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    write_manifest(
        BranchManifest(name, "merit", group, ("d",), 1, tokens, tokens, 1, 0, "f", "f"),
        folder / "branch.json",
    )
    return folder


def make_branches(root, tiny_model, size=0.3):
    """Three branches at random distances from the tiny model, with TOKENS target tokens."""
    base = {
        n: v
        for file in sorted(tiny_model.glob("*.safetensors"))
        for n, v in load_file(file).items()
    }
    numbers = torch.Generator().manual_seed(0)
    paths = []
    for k, tokens in enumerate(TOKENS):
        moved = {
            n: v + size * v.abs() * torch.randn(v.shape, generator=numbers) for n, v in base.items()
        }
        paths.append(
            make_branch(
                root / "branches" / f"merit-{k}", tiny_model, moved, f"merit-{k}", k, tokens
            )
        )
    return paths


def quadratic(minimum, curvature, at=1.0):
    """Loss of (weights, scale): a quadratic around ``minimum`` in the weights, plus one around the scale ``at``."""

    def loss(weights, scale):
        away = torch.tensor(weights, dtype=torch.float64) - torch.tensor(
            minimum, dtype=torch.float64
        )
        bend = torch.tensor(curvature, dtype=torch.float64)
        return float(1.0 + 0.5 * away @ bend @ away + 0.25 * (scale - at) ** 2)

    return loss


def read(path):
    return json.loads(path.read_text())


def make_setting(root, tiny_model, tiny_mixture):
    """Three branches around the tiny model as candidates, and all held-out rows."""
    configs = [DatasetConfig(**entry) for entry in tiny_mixture]
    rows = load_mixture(configs, load_tokenizer(str(tiny_model)), DataConfig(), part="eval")
    paths = make_branches(root, tiny_model)
    start = starting_weights(paths, MergeConfig(weights="fit"))
    candidates = TuneInputs(paths, ("a", "b", "c"), start, tiny_model)
    return candidates, [example for dataset in rows for example in dataset.examples]


def tune(setting, directory=None, **options):
    """What is chosen, and the sentence that says so."""
    candidates, examples = setting
    found = tune_merge(
        candidates, examples, 1, 4, MergeConfig(**options), directory, SilentProgress()
    )
    return found, tuning_sentence(found)
