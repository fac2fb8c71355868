"""README.md of a merged model, and the summary that the command prints."""

import re
import shlex
import shutil

import pytest
import torch
import yaml
from support.tiny import make_model

from merit_fast.manifests.io import write_manifest
from merit_fast.manifests.schemas import BranchManifest
from merit_fast.merge import merge_models


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("cards")
    names = ("start", "left", "right")
    for k, name in enumerate(names):
        make_model(root / name, seed=k, dtype=torch.bfloat16, shard="60KB")
        (root / name / "README.md").write_text("# another model's card\n")
    for k, name in enumerate(names[1:]):
        manifest = BranchManifest(
            name, "merit", k, (f"{name}-data", "more"), 12, 300 * (k + 1), 900, 7, 0, "x", "x"
        )
        write_manifest(manifest, root / name / "branch.json")
    return [root / name for name in names]


def front_matter(card):
    _, front, body = card.split("---\n", 2)
    return yaml.safe_load(front), body


def test_a_card_names_base_models_weights_method_and_data(models, tmp_path):
    start, *branches = models
    options = {"method": "ties", "density": 0.25, "scale": 0.5}
    merge_models(branches, base=start, out=tmp_path / "out", **options)
    front, body = front_matter((tmp_path / "out/README.md").read_text())
    assert front == {
        "base_model": ["start"],
        "library_name": "transformers",
        "tags": ["merge", "merit"],
    }
    assert "| `left` | 0.333333 | left-data, more | 12 | 300 | 7 |" in body
    assert "| `right` | 0.666667 | right-data, more | 12 | 600 | 7 |" in body
    assert "- `density`: 0.25" in body and "- `scale`: 0.5" in body and "Yadav" in body
    assert "- dtype: bf16 (the models' own)" in body
    command = "merit-fast merge OUT --model left --model right --base start --weights tokens"
    assert f"{command} --method ties --scale 0.5 --density 0.25\n" in body
    assert str(tmp_path) not in body and "another model" not in body
    assert "merit_fast 0" in body


def test_the_command_of_a_card_makes_the_same_model(models, tmp_path, call, monkeypatch):
    _, *branches = models
    settings = [{"weight": 1.0}, {"weight": [0.5, 2.0]}]
    merge_models(branches, out=tmp_path / "out", dtype="float32", normalize=False, models=settings)
    body = (tmp_path / "out/README.md").read_text()
    monkeypatch.chdir(models[0].parent)
    (command,) = re.findall(r"^merit-fast (.*)$", body, flags=re.M)
    words = [str(tmp_path / "again") if word == "OUT" else word for word in shlex.split(command)]
    code, _, err = call(*words)
    assert code == 0, err
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_a_card_without_base_or_counts_names_the_models(models, tmp_path):
    for name in ("left", "right"):
        shutil.copytree(models[0], tmp_path / "deep" / name / "model")
    pair = [tmp_path / "deep" / name / "model" for name in ("left", "right")]
    merge_models(pair, [3, 1], out=tmp_path / "out")
    front, body = front_matter((tmp_path / "out/README.md").read_text())
    assert front["base_model"] == ["left/model", "right/model"]
    assert "| `left/model` | 0.75 |" in body and "target tokens" not in body
    assert "--model left/model:3.0 --model right/model:1.0" in body


def test_threads_and_shares_write_the_same_card(models, tmp_path):
    _, *branches = models
    merge_models(branches, out=tmp_path / "one", threads=1)
    merge_models(branches, out=tmp_path / "two", threads=3, chunk_kib=4, share=(1, 2))
    merge_models(branches, out=tmp_path / "two", threads=2, share=(2, 2), max_memory="1M")
    cards = [(tmp_path / name / "README.md").read_bytes() for name in ("one", "two")]
    assert cards[0] == cards[1]


def test_the_summary_speaks_of_models_weights_and_units(models, tmp_path, call):
    start, *branches = models
    flags = [word for path in branches for word in ("--model", path)]
    ties = ("--base", start, "--method", "ties", "--density", "0.5")
    code, out, err = call("merge", tmp_path / "out", *flags, *ties)
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0] == f"{tmp_path / 'out'}: done: ties of 2 models"
    assert lines[1] == f"  weight 0.333333   {branches[0]}"
    assert lines[3].split() == ["base", str(start)]
    assert lines[4] == "  weights: token counts of each branch.json"
    assert "MiB read" in out and "KiB written" in out and "free on disk" in out
    assert "per tensor" not in out
    same = [f"{branches[0]}:{weight}" for weight in (1, 3)]
    twice = ("--model", same[0], "--model", same[1], "--dry-run")
    code, out, err = call("merge", tmp_path / "twice", *twice)
    assert code == 0 and "coefficient" not in out and "weight 0.750000" in out, err
    code, out, err = call("merge", tmp_path / "slerp", *flags, "--method", "slerp")
    assert code == 0 and f"  model {branches[0]}" in out, err
    assert "weights: none: method slerp takes no weights" in out


def test_a_merge_that_names_too_little_says_what_is_missing(tmp_path, call, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = call("merge")
    assert code == 2 and "needs OUT and --model A --model B" in err and "--dataset" not in err
    code, _, err = call("merge", "outx")
    assert code == 2 and "outx is no CONFIG.yml; to merge into it, add --model A" in err
    (tmp_path / "folder").mkdir()
    code, _, err = call("merge", "folder")
    assert code == 2 and "folder is a directory and no CONFIG.yml" in err
    assert len(err.strip().splitlines()) == 1
