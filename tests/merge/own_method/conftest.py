"""Registered methods, models, and a package that offers methods."""

import pytest
import torch
from support.merge.own_methods import PACKAGE, POWER, largest, power_mean
from support.tiny import make_model

from merit_fast.merge import (
    register_method,
)
from merit_fast.merge.registry import unregister_method


@pytest.fixture(autouse=True)
def methods():
    """The two methods, for one test."""
    register_method("power_mean", power_mean, parameters=[POWER])
    register_method("largest", largest, needs_base=False, takes_weights=False)
    yield
    for name in ("power_mean", "largest"):
        unregister_method(name)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three models and their base, in bf16."""
    root = tmp_path_factory.mktemp("own")
    paths = [root / name for name in ("a", "b", "c", "base")]
    for seed, path in enumerate(paths):
        make_model(path, dtype=torch.bfloat16, shard="60KB", seed=seed)
    return paths


@pytest.fixture
def site(tmp_path):
    """A folder for sys.path with a distribution that offers three methods; one works."""
    site = tmp_path / "site"
    info = site / "offers-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: offers\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[merit_fast.merge_methods]\n"
        "offered = offers_merging\nabsent = offers_merging\nbroken = offers_broken\n"
    )
    (site / "offers_merging.py").write_text(PACKAGE)
    (site / "offers_broken.py").write_text("raise RuntimeError('no licence\\nfound')\n")
    return site
