"""Links in a model's folder: the hub's cache and linked folders work, foreign files are refused."""

import os
import re
import shutil

import pytest
import torch
from support.merge.merges import load, write

from merit_fast.errors import InputError
from merit_fast.merge import merge_models

CONFIG = '{"model_type": "llama"}'


@pytest.fixture
def models(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name, {"w": torch.full((3, 5), 2.0)})
        (tmp_path / name / "config.json").write_text(CONFIG)
        (tmp_path / name / "tokenizer.json").write_text("{}")
    (tmp_path / "secret").write_text('{"secret": 1}')
    return tmp_path


def merge(root, *names):
    return merge_models([root / name for name in names], [1, 1], out=root / "out")


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "config.json", "model.safetensors", "additional_chat_templates"]
)
@pytest.mark.parametrize("relative", [True, False])
def test_a_link_out_of_the_folder_is_refused_by_name_and_target(models, name, relative):
    target = models / "elsewhere" / name
    target.parent.mkdir()
    place = models / "a" / name
    if name == "additional_chat_templates":
        target.mkdir()
        (target / "x.jinja").write_text("secret")
    else:
        shutil.move(place, target)
    place.symlink_to(os.path.relpath(target, place.parent) if relative else target)
    rule = f"{place}: must lie in its folder or in the folder's hub cache, is a link to {target}"
    with pytest.raises(InputError, match=f"^{re.escape(rule)}$"):
        merge(models, "a", "b")
    assert not (models / "out").exists() and not (models / "out.tmp").exists()


def test_a_folder_whose_name_only_begins_like_the_models_is_elsewhere(models):
    (models / "a-secret").mkdir()
    (models / "a-secret" / "t").write_text("{}")
    (models / "a" / "tokenizer.json").unlink()
    (models / "a" / "tokenizer.json").symlink_to("../a-secret/t")
    with pytest.raises(InputError, match="tokenizer.json: must lie in its folder"):
        merge(models, "a", "b")


def test_links_within_the_folder_and_to_the_folder_are_followed(models):
    (models / "a" / "real").mkdir()
    shutil.move(models / "a" / "tokenizer.json", models / "a" / "real" / "t")
    (models / "a" / "tokenizer.json").symlink_to("real/t")
    (models / "linked").symlink_to(models / "a")
    merge(models, "linked", "b")
    assert torch.equal(load(models / "out")["w"], torch.full((3, 5), 2.0))
    assert (models / "out" / "tokenizer.json").read_text() == "{}"


def test_the_hubs_cache_may_link_into_the_blobs_of_its_own_repository_only(models):
    cache = models / "hub"
    for name in ("models--x--a", "models--x--b"):
        snapshot = cache / name / "snapshots" / "0123"
        blobs = cache / name / "blobs"
        snapshot.mkdir(parents=True)
        blobs.mkdir()
        for file in (models / name[-1]).iterdir():
            shutil.move(file, blobs / f"hash-{file.name}")
            (snapshot / file.name).symlink_to(f"../../blobs/hash-{file.name}")
    paths = [f"hub/models--x--{name}/snapshots/0123" for name in ("a", "b")]
    merge(models, *paths)
    assert (models / "out" / "tokenizer.json").read_text() == "{}"
    tokenizer = models / paths[0] / "tokenizer.json"
    tokenizer.unlink()
    tokenizer.symlink_to("../../../models--x--b/blobs/hash-tokenizer.json")
    with pytest.raises(InputError, match="tokenizer.json: must lie in its folder"):
        merge(models, *paths)
