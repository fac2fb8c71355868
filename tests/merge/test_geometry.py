"""geometry.json: the Gram matrix of the branches' deltas against plain fp64 tensor math."""

import json

import numpy as np
import pytest
import torch
from support.checks import run_at_level
from support.merge.merges import load, write
from support.tiny import make_model

from merit_fast.errors import InputError
from merit_fast.kernels import dispatch
from merit_fast.manifests.io import read_manifest
from merit_fast.merge import MergeConfig, merge_branches
from merit_fast.merge.combine.combination import combine
from merit_fast.merge.engine.geometry import Geometry, cut_pieces
from merit_fast.merge.engine.plan import Segment
from merit_fast.progress import SilentProgress

WEIGHTS = [0.2, 0.3, 0.5]
CONFIG = MergeConfig(stats=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and three branches near it."""
    root = tmp_path_factory.mktemp("geometry")
    base = make_model(root / "base", dtype=torch.bfloat16, shard="60KB", seed=0)
    for k in range(3):
        branch = make_model(root / f"b{k}", dtype=torch.bfloat16, shard="60KB", seed=0)
        torch.manual_seed(k + 1)
        with torch.no_grad():
            for parameter in branch.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.01 * (k + 1))
        branch.save_pretrained(root / f"b{k}", max_shard_size="60KB")
    del base
    return root / "base", [root / f"b{k}" for k in range(3)]


def merged_geometry(models, out, config=CONFIG, weights=WEIGHTS):
    base, branches = models
    out.mkdir(exist_ok=True)
    merge_branches(branches, weights, base, out, config, SilentProgress())
    return read_manifest(Geometry, out / "geometry.json")


def exact_deltas(models):
    base, branches = models
    start = load(base)
    names = sorted(start)
    return names, [{n: load(b)[n].double() - start[n].double() for n in names} for b in branches]


def test_numbers_equal_tensor_math(models, tmp_path):
    geometry = merged_geometry(models, tmp_path / "out")
    names, deltas = exact_deltas(models)
    flat = torch.stack([torch.cat([delta[n].flatten() for n in names]) for delta in deltas])
    gram = (flat @ flat.T).numpy()
    assert np.allclose(geometry.gram, gram, rtol=1e-12)
    assert np.allclose(geometry.norms, flat.norm(dim=1), rtol=1e-12)
    mean = torch.tensor(WEIGHTS, dtype=torch.float64) @ flat
    assert geometry.displacement == pytest.approx(float(mean.norm()), rel=1e-12)
    spread = sum(w * float(d @ d) for w, d in zip(WEIGHTS, flat, strict=True))
    assert geometry.contraction == pytest.approx(float(mean @ mean) / spread, rel=1e-12)
    assert np.allclose(np.diag(geometry.cosines), 1.0) and geometry.branches == ("b0", "b1", "b2")
    assert sorted(geometry.tensors) == names
    for name in names:
        flat = torch.stack([delta[name].flatten() for delta in deltas])
        assert np.allclose(
            geometry.tensors[name], (flat @ flat.T).numpy(), rtol=1e-12, atol=1e-18
        ), name


def test_the_merge_itself_does_not_change(models, tmp_path):
    merged_geometry(models, tmp_path / "with")
    merged_geometry_free = tmp_path / "without"
    merged_geometry_free.mkdir()
    merge_branches(
        models[1], WEIGHTS, models[0], merged_geometry_free, MergeConfig(), SilentProgress()
    )
    for file in merged_geometry_free.iterdir():
        assert file.read_bytes() == (tmp_path / "with" / file.name).read_bytes(), file.name
    extra = {f.name for f in (tmp_path / "with").iterdir()} - {
        f.name for f in merged_geometry_free.iterdir()
    }
    assert extra == {"geometry.json"}


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_no_bit_and_numpy_gives_the_same(models, tmp_path, threads, monkeypatch):
    first = merged_geometry(
        models, tmp_path / "a", MergeConfig(stats=True, threads=threads, chunk_kib=16)
    )
    monkeypatch.setattr(dispatch, "native_module", lambda: None)
    assert merged_geometry(models, tmp_path / "b") == first


ISA_SCRIPT = """
import sys
from pathlib import Path
from merit_fast.merge import MergeConfig, merge_branches
from merit_fast.progress import SilentProgress
out, base, *branches = map(Path, {paths!r})
out.mkdir(exist_ok=True)
merge_branches(branches, [.2, .3, .5], base, out, MergeConfig(stats=True), SilentProgress())
print((out / "geometry.json").read_text())
"""


def test_every_isa_level_gives_the_same_bits(models, tmp_path, native_levels):
    base, branches = models
    texts = set()
    for level in native_levels:
        paths = [str(path) for path in (tmp_path / level, base, *branches)]
        texts.add(run_at_level(ISA_SCRIPT.format(paths=paths), level))
    assert len(texts) == 1


def test_an_interrupted_merge_keeps_the_parts_of_finished_shards(models, tmp_path, monkeypatch):
    from merit_fast.merge.write import shards

    whole = merged_geometry(models, tmp_path / "whole")
    out = tmp_path / "out"
    original = shards.write_shard
    calls = []

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(shards, "write_shard", stopping)
    with pytest.raises(KeyboardInterrupt):
        merged_geometry(models, out)
    assert len(list(out.glob("*.gram.json"))) == 2
    assert merged_geometry(models, out) == whole
    assert not list(out.glob("*.gram.json"))


def test_scaled_and_equal_branches(models, tmp_path):
    base, branches = models
    half = merged_geometry(models, tmp_path / "half", MergeConfig(stats=True, scale=0.5))
    full = merged_geometry(models, tmp_path / "full")
    assert half.displacement == pytest.approx(full.displacement / 2)
    assert half.contraction == pytest.approx(full.contraction) and half.gram == full.gram
    same = merged_geometry((base, [branches[1]] * 2), tmp_path / "same", weights=[0.5, 0.5])
    assert same.contraction == pytest.approx(1.0) and same.displacement == pytest.approx(
        same.norms[0]
    )
    still = merged_geometry((base, [base] * 2), tmp_path / "still", weights=[0.5, 0.5])
    assert still.displacement == 0.0 and still.contraction == 1.0 and still.norms == (0.0, 0.0)


def test_what_stats_need_is_said(models, tmp_path):
    base, branches = models
    with pytest.raises(InputError, match="merge: stats needs? a base model; give --base"):
        combine(branches, WEIGHTS, None, CONFIG)
    config = MergeConfig(stats=True, normalize=False)
    with pytest.raises(InputError, match="stats need coefficients of sum 1, got 6; normalize"):
        merged_geometry(models, tmp_path / "out", config, [1.0, 2.0, 3.0])
    with pytest.raises(InputError, match="stats need coefficients of sum 1, got 0.5"):
        config = MergeConfig(stats=True, method="passthrough", scale=0.5)
        merged_geometry((base, branches[:1]), tmp_path / "out", config, [1.0])


def test_pieces_end_at_tensors_and_chunks():
    segments = [Segment(("a", "b"), (5, 12), "F32", 0, ()), Segment(("c",), (8,), "F32", 0, ())]
    assert cut_pieces(segments, 8).tolist() == [[0, 0, 5], [0, 5, 3], [0, 8, 4], [1, 0, 8]]


def test_pipeline_writes_it_on_demand(tmp_path, tiny_model, tiny_mixture, monkeypatch):
    import yaml
    from support.runs import run_values

    import merit_fast

    monkeypatch.chdir(tmp_path)
    values = run_values(tiny_model, tiny_mixture)
    values["train"]["controls"] = {}
    values["merge"] = {"stats": True}
    (tmp_path / "run.yml").write_text(yaml.safe_dump(values))
    summary = merit_fast.run("run.yml", "evaluate.max_new_tokens=2")
    geometry = json.loads((tmp_path / summary["merged"] / "geometry.json").read_text())
    assert geometry["branches"] == ["merit-0", "merit-1"]
    assert geometry["displacement"] == pytest.approx(
        summary["arms"]["merit"]["displacement"], rel=1e-3
    )


@pytest.mark.parametrize("method", ["ties", "dare_linear", "della", "sce"])
def test_thinned_deltas_are_measured_whole(tmp_path, method):
    """Rows that divide no chunk, in a tensor of several chunks: the numbers stay the same."""
    tensors = [torch.randn(2000, 100) for _ in range(3)]
    paths = [write(tmp_path / f"m{k}", {"w": tensor}) for k, tensor in enumerate(tensors)]
    options = {} if method == "sce" else {"density": 0.5}
    config = MergeConfig(method=method, stats=True, threads=3, **options)
    geometry = merged_geometry((paths[2], paths[:2]), tmp_path / "out", config, [0.5, 0.5])
    deltas = torch.stack(
        [(tensor.double() - tensors[2].double()).flatten() for tensor in tensors[:2]]
    )
    assert np.allclose(geometry.gram, (deltas @ deltas.T).numpy(), rtol=1e-12)
    assert geometry.displacement is None and geometry.contraction is None
