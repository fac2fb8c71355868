"""Strict options: what is misspelt, missing or of the wrong kind is named, with the file, the key and the rule."""

import json

import pytest
import yaml

from merit_fast.errors import InputError
from merit_fast.manifests.io import (
    StageManifest,
    fingerprint,
    is_complete,
    output_directory,
    read_manifest,
    stage_manifest,
    write_manifest,
)
from merit_fast.manifests.schemas import BranchManifest
from merit_fast.options.fields import override, parse, to_plain
from merit_fast.pipeline.config import RunConfig, read_run_config, write_run_config
from merit_fast.split.config import SplitConfig
from merit_fast.train.config import TrainConfig

GOOD = {"model": "m", "mixture": [{"name": "a", "path": "a.jsonl"}]}


def write(tmp_path, values):
    file = tmp_path / "run.yml"
    file.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return file


@pytest.mark.parametrize(
    "change,message",
    [
        ({"splitt": {}}, r"run.yml: splitt: unknown key; did you mean split\?"),
        ({"split": {"group": 4}}, r"run.yml: split.group: unknown key; did you mean groups\?"),
        (
            {"mixture": [{"name": "a", "path": "b", "weight": 2}]},
            r"mixture\[0\].weight: unknown key",
        ),
        ({"mixture": [{"name": "a"}]}, r"mixture\[0\].path: is required"),
        ({"mixture": []}, "mixture: must be a list of at least one dataset"),
        ({"mixture": "a.jsonl"}, "mixture: must be a list, got 'a.jsonl'"),
        (
            {"split": {"groups": "four"}},
            "split.groups: must be an integer or one of auto, got 'four'",
        ),
        (
            {"split": {"groups": 5, "preset": "paper"}},
            "groups: must be a power of two with method pca-median, got 5",
        ),
        ({"split": {"groups": True}}, "split.groups: must be an integer or one of auto, got True"),
        ({"split": [1]}, "split: must be a mapping"),
        ({"train": {"learning_rate": -1}}, "train.learning_rate: must be positive, got -1"),
        (
            {"train": {"arms": ["joint", "rnadom"]}},
            r"train.arms\[1\]: must be one of joint, random, iid, got 'rnadom'",
        ),
        ({"train": {"dtype": "fp8"}}, "train.dtype: must be one of auto, bf16, fp32, got 'fp8'"),
        (
            {"merge": {"weights": "token"}},
            "merge.weights: must be one of tokens, samples, uniform, fit or a list",
        ),
        ({"merge": {"weights": [1, "x"]}}, "merge.weights: must be"),
        (
            {"evaluate": {"interpolate": [2]}},
            "evaluate.interpolate: must be between 0 and 1, got 2",
        ),
        ({"model": None}, "model: must be a string, got None"),
        ({"threads": 0}, "threads: must be at least 1, got 0"),
    ],
)
def test_bad_values_are_named(tmp_path, change, message):
    with pytest.raises(InputError, match=message) as error:
        read_run_config(write(tmp_path, {**GOOD, **change}))
    assert "\n" not in str(error.value) and "run.yml" in str(error.value)


@pytest.mark.parametrize(
    "text,message",
    [
        ("model: [", r"run.yml:\d: is not valid YAML"),
        ("model: a\nmodel: b\n", "key 'model' stands twice"),
        ("- 1", "must be a mapping of keys, got list"),
        ("", "model: is required"),
        ("model: m", "mixture: is required"),
    ],
)
def test_bad_files_are_named(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        read_run_config(write(tmp_path, text))
    with pytest.raises(InputError, match="nowhere.yml: does not exist"):
        read_run_config(tmp_path / "nowhere.yml")


def test_overrides_win_and_are_checked(tmp_path):
    file = write(tmp_path, {**GOOD, "split": {"groups": 4, "seed": 1}})
    config = read_run_config(
        file, ["split.groups=2", "train.learning_rate=3e-5", "train.arms=[joint]"]
    )
    assert (config.split.groups, config.split.seed) == (2, 1)
    assert (config.train.learning_rate, config.train.arms) == (3e-5, ("joint",))
    with pytest.raises(InputError, match="must have the form section.key=value"):
        override({}, ["split.groups"])
    with pytest.raises(InputError, match="split.groups.x: groups is not a section"):
        override({"split": {"groups": 1}}, ["split.groups.x=1"])


def test_paths_beside_the_yaml_are_found(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "m").mkdir()
    monkeypatch.chdir("/")
    config = read_run_config(write(tmp_path, GOOD))
    assert config.mixture[0].path == str(tmp_path / "a.jsonl") and config.model == str(
        tmp_path / "m"
    )
    hub = {"model": "org/m", "mixture": [{"name": "a", "path": "org/a"}]}
    assert read_run_config(write(tmp_path, hub)).mixture[0].path == "org/a"


def test_the_resolved_config_replays(tmp_path):
    values = {
        **GOOD,
        "merge": {"weights": [1, 2.5]},
        "train": {"arms": ["random"]},
        "split": {"groups": 8},
    }
    config = read_run_config(write(tmp_path, values))
    write_run_config(config, tmp_path / "resolved.yml")
    assert read_run_config(tmp_path / "resolved.yml") == config
    assert parse(RunConfig, to_plain(config), "again") == config


def test_every_option_has_a_help_text():
    import dataclasses

    for section in (SplitConfig, TrainConfig):
        for field in dataclasses.fields(section):
            assert len(field.metadata["help"]) > 5, field.name


# ---- manifests
MANIFEST = BranchManifest("merit-0", "merit", 0, ("a", "b"), 10, 100, 500, 5, 0, "f")


def test_manifest_round_trip_and_same_bytes(tmp_path):
    write_manifest(MANIFEST, tmp_path / "branch.json")
    first = (tmp_path / "branch.json").read_bytes()
    assert read_manifest(BranchManifest, tmp_path / "branch.json") == MANIFEST
    write_manifest(MANIFEST, tmp_path / "branch.json")
    assert (tmp_path / "branch.json").read_bytes() == first
    assert [file.name for file in tmp_path.iterdir()] == ["branch.json"]


@pytest.mark.parametrize(
    "change,message",
    [
        ({"steps": "many"}, "steps: must be an integer"),
        ({"schema_version": 99}, "schema_version: must be 1, got 99"),
        ({"stepz": 1}, "stepz: unknown key; did you mean steps"),
    ],
)
def test_damaged_manifests_are_named(tmp_path, change, message):
    file = tmp_path / "branch.json"
    file.write_text(json.dumps({**to_plain(MANIFEST), **change}))
    with pytest.raises(InputError, match=f"branch.json: {message}"):
        read_manifest(BranchManifest, file)
    file.write_text("{")
    with pytest.raises(InputError, match="not readable JSON"):
        read_manifest(BranchManifest, file)


def test_fingerprint_depends_on_content_only():
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    one, other = (stage_manifest("train", TrainConfig(seed=s), {"base": "x"}) for s in (0, 1))
    assert one.fingerprint != other.fingerprint
    assert (
        one.fingerprint == stage_manifest("train", TrainConfig(seed=0), {"base": "x"}).fingerprint
    )


def test_an_output_directory_appears_whole_or_not_at_all(tmp_path):
    stage, path = stage_manifest("split", SplitConfig(), {}), tmp_path / "split"
    with pytest.raises(RuntimeError), output_directory(path, stage) as directory:
        (directory / "half").write_text("x")
        raise RuntimeError
    assert not path.exists() and not is_complete(path, stage.fingerprint)
    with output_directory(path, stage) as directory:
        assert (directory / "half").exists()  # the same stage resumes from what was left
        (directory / "whole").write_text("y")
    assert is_complete(path, stage.fingerprint)
    assert sorted(file.name for file in path.iterdir()) == ["half", "stage.json", "whole"]
    assert read_manifest(StageManifest, path / "stage.json") == stage


def test_another_stage_does_not_resume_from_what_was_left(tmp_path):
    path = tmp_path / "split"
    first, second = (stage_manifest("split", SplitConfig(seed=s), {}) for s in (0, 1))
    with pytest.raises(RuntimeError), output_directory(path, first) as directory:
        (directory / "half").write_text("x")
        raise RuntimeError
    with output_directory(path, second) as directory:
        assert not (directory / "half").exists()
    with output_directory(path, first):
        assert is_complete(
            path, second.fingerprint
        )  # the old output stays until the new one is whole
    assert is_complete(path, first.fingerprint)
    assert [file.name for file in tmp_path.iterdir()] == ["split"]


def test_an_output_that_cannot_be_written_is_bad_input(tmp_path):
    (tmp_path / "file").write_text("")
    stage = stage_manifest("split", SplitConfig(), {})
    with (
        pytest.raises(InputError, match="cannot be written"),
        output_directory(tmp_path / "file" / "x", stage),
    ):
        pass


def test_an_output_that_was_whole_when_the_crash_came_only_gets_its_name(tmp_path, monkeypatch):
    from merit_fast.manifests import io as manifest

    stage, path = stage_manifest("split", SplitConfig(), {}), tmp_path / "split"
    with monkeypatch.context() as patch:
        patch.setattr(manifest.os, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt), output_directory(path, stage) as directory:
            (directory / "split.json").write_text("{}")
    assert not path.exists()
    manifest.recover_directory(path, "of another stage")
    assert not path.exists()
    manifest.recover_directory(path, stage.fingerprint)
    assert is_complete(path, stage.fingerprint)
    assert sorted(file.name for file in path.iterdir()) == ["split.json", "stage.json"]
    assert [file.name for file in tmp_path.iterdir()] == ["split"]
