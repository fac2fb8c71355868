"""stage.json holds the hash of every file of a merge, taken while the file was written."""

import json

import pytest
import torch
from support.merge.merges import write

from merit_fast.manifests.hashes import checksum
from merit_fast.merge import MergeConfig, merge_models


@pytest.mark.parametrize(
    ("base", "options"),
    [
        (None, dict(shard_size="20K")),
        (None, dict(shard_size="20K", threads=5, chunk_kib=4)),
        ("base", dict(shard_size="20K", method="ties", density=0.5, stats=True)),
        ("base", dict(shard_size="20K", method="nuslerp", vectors="column")),
        (None, dict(shard_size="20K", method="karcher")),
        (None, dict(dtype="fp64")),
        (None, dict(form="distcp")),
    ],
    ids=str,
)
def test_the_recorded_hash_of_every_file_is_that_of_its_content(tmp_path, base, options):
    """Files are hashed while they are written, in any order."""
    for name in ("base", "m0", "m1"):
        write(tmp_path / name, {f"layers.{i}.w": torch.randn(30, 50 + 7 * i) for i in range(8)})
    models = [tmp_path / f"m{k}" for k in range(2)]
    config = MergeConfig(**dict(weights="uniform") | options)
    merge_models(models, base=base and tmp_path / base, out=tmp_path / "out", config=config)
    recorded = json.loads((tmp_path / "out/stage.json").read_text())["files"]
    assert len(recorded) >= 2
    for name, (size, digest) in recorded.items():
        file = tmp_path / "out" / name
        assert (size, digest) == (file.stat().st_size, checksum(file))
