"""Branches of the tiny model and a quadratic loss, for the tests of tune."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from merit_fast.data import DataConfig, DatasetConfig, Example, load_mixture, load_tokenizer
from merit_fast.manifests.io import write_manifest
from merit_fast.manifests.schemas import BranchManifest, TuneManifest
from merit_fast.merge import MergeConfig
from merit_fast.progress import SilentProgress
from merit_fast.tune.search import TuneInputs, starting_weights, tune_merge, tuning_sentence

TOKENS = (100, 200, 100)
Setting = tuple[TuneInputs, list[Example]]


def make_branch(
    folder: Path, like: Path, tensors: dict[str, Tensor], name: str, group: int, tokens: int
) -> Path:
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


def make_branches(root: Path, tiny_model: Path, size: float = 0.3) -> list[Path]:
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


def quadratic(
    minimum: Sequence[float], curvature: Sequence[Sequence[float]], at: float = 1.0
) -> Callable[[Sequence[float], float], float]:
    """A loss of (weights, scale): quadratic around ``minimum`` and around the scale ``at``."""

    def loss(weights: Sequence[float], scale: float) -> float:
        away = torch.tensor(weights, dtype=torch.float64) - torch.tensor(
            minimum, dtype=torch.float64
        )
        bend = torch.tensor(curvature, dtype=torch.float64)
        return float(1.0 + 0.5 * away @ bend @ away + 0.25 * (scale - at) ** 2)

    return loss


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def make_setting(
    root: Path, tiny_model: Path, tiny_mixture: Sequence[Mapping[str, Any]]
) -> Setting:
    """The inputs of a search over three branches of the tiny model, and all held-out rows."""
    configs = [DatasetConfig(**entry) for entry in tiny_mixture]
    rows = load_mixture(configs, load_tokenizer(str(tiny_model)), DataConfig(), part="eval")
    paths = make_branches(root, tiny_model)
    start = starting_weights(paths, MergeConfig(weights="fit"))
    inputs = TuneInputs(paths, ("a", "b", "c"), start, tiny_model)
    return inputs, [example for dataset in rows for example in dataset.examples]


def tune(
    setting: Setting, directory: Path | None = None, **options: Any
) -> tuple[TuneManifest, str]:
    """Returns the chosen numbers and the sentence about them."""
    inputs, examples = setting
    tuned = tune_merge(inputs, examples, 1, 4, MergeConfig(**options), directory, SilentProgress())
    return tuned, tuning_sentence(tuned)
