"""Merging and reading back, for the tests of the merge."""

from safetensors import safe_open

from merit_fast.merge import MergeConfig, merge_branches
from merit_fast.progress import SilentProgress

WEIGHTS = [0.1, 0.2, 0.3, 0.4]


def merge(models, weights, out, config=None):
    out.mkdir()
    merge_branches(models, weights, config or MergeConfig(), out, SilentProgress())


def load(directory):
    tensors = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors
