"""Options: errors name the file, the key and the rule; a resolved config replays."""

import dataclasses
from dataclasses import replace

import pytest
import yaml

from merit_fast.data.config import DataConfig, DatasetConfig
from merit_fast.errors import InputError
from merit_fast.evaluate.config import EvaluateConfig
from merit_fast.merge.config import MergeConfig
from merit_fast.options.parser import override, parse, to_plain
from merit_fast.pipeline.config import RunConfig, read_run_config, write_run_config
from merit_fast.sketch.config import SketchConfig
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
            {"mixture": [{"name": "a", "path": "b", "wait": 2}]},
            r"mixture\[0\].wait: unknown key",
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
            {"train": {"arms": ["joint", "random"]}},
            r"train.arms: is now train.controls, such as \{joint: true, random: 1\}; got",
        ),
        (
            {"train": {"controls": {"rnadom": 1}}},
            r"train.controls.rnadom: unknown key; did you mean random\?",
        ),
        ({"train": {"controls": ["joint"]}}, "train.controls: must be a mapping of keys"),
        ({"train": {"controls": {"joint": 1}}}, "train.controls.joint: must be true or false"),
        ({"train": {"controls": {"random": -1}}}, "train.controls.random: must be at least 0"),
        ({"train": {"controls": {"iid": -1}}}, "train.controls.iid: must be at least 0, got -1"),
        (
            {"train": {"controls": {"joint_low": 2}}},
            "train.controls.joint_low: must be a factor above 0 and below 1, got 2",
        ),
        ({"train": {"seeds": 0}}, "train.seeds: must be at least 1, got 0"),
        (
            {"train": {"controls": None, "epochs": 0}},
            "train.epochs: must be at least 1, got 0",
        ),
        ({"train": {"dtype": "fp8"}}, "train.dtype: must be one of auto, bf16, fp32, got 'fp8'"),
        (
            {"merge": {"weights": "token"}},
            "merge.weights: must be one of auto, tokens, samples, uniform, fit or a list",
        ),
        ({"merge": {"weights": [1, "x"]}}, "merge.weights: must be"),
        (
            {"evaluate": {"interpolate": [2]}},
            "evaluate.interpolate: must be between 0 and 1, got 2",
        ),
        ({"model": None}, "model: is empty; it must be a model's folder or a hub id"),
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
        ("model: a\nmodel: b\n", "key 'model' appears twice"),
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
        file, ["split.groups=2", "train.learning_rate=3e-5", "train.controls.joint=true"]
    )
    assert (config.split.groups, config.split.seed) == (2, 1)
    assert (config.train.learning_rate, config.train.controls.joint) == (3e-5, True)
    with pytest.raises(InputError, match="must have the form section.key=value"):
        override({}, ["split.groups"])
    with pytest.raises(InputError, match="split.groups.x: groups is not a section"):
        override({"split": {"groups": 1}}, ["split.groups.x=1"])


def test_paths_of_a_yaml_count_from_its_folder(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "m").mkdir()
    (tmp_path / "t.jinja").write_text("")
    values = {**GOOD, "data": {"chat_template": "t.jinja"}, "output": "runs/x"}
    values["mixture"] = [{"name": "a", "path": "a.jsonl", "eval_path": "no/b.jsonl"}]
    file = write(tmp_path, values)
    monkeypatch.chdir("/")
    config = read_run_config(file)
    (entry,) = config.mixture
    assert entry.path == str(tmp_path / "a.jsonl") and config.model == str(tmp_path / "m")
    assert entry.eval_path == str(tmp_path / "no/b.jsonl")  # where it was looked for
    assert config.data.chat_template == str(tmp_path / "t.jinja")
    assert read_run_config(file, ["data.max_length=9", "train.seed=1"]).data == replace(
        config.data, max_length=9
    )
    assert config.output == str(tmp_path / "runs/x")
    assert read_run_config(write(tmp_path, GOOD)).output == str(tmp_path / "runs/merit")
    hub = {"model": "org/m", "mixture": [{"name": "a", "path": "org/a"}]}
    assert read_run_config(write(tmp_path, hub)).mixture[0].path == "org/a"
    (tmp_path / "org").mkdir()
    assert read_run_config(write(tmp_path, hub)).model == str(tmp_path / "org/m")


def test_paths_on_the_command_line_count_from_the_current_directory(tmp_path, monkeypatch):
    folder = tmp_path / "sub"
    folder.mkdir()
    file = write(folder, GOOD)
    monkeypatch.chdir(tmp_path)
    flags = {"model": "n", "mixture": [{"name": "b", "path": "b.jsonl"}]}
    config = read_run_config(file, ["output=out", "data.chat_template=c.jinja"], flags)
    assert (config.model, config.mixture[0].path) == ("n", "b.jsonl")
    assert (config.output, config.data.chat_template) == ("out", "c.jinja")
    assert read_run_config(file, ["model=other"]).mixture[0].path == str(folder / "a.jsonl")


def test_a_path_that_is_only_in_the_current_directory_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "sub"
    folder.mkdir()
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "out" / "sketch").mkdir(parents=True)
    file = write(folder, GOOD)
    monkeypatch.chdir(tmp_path)
    rule = (
        r"mixture\[0\].path: a.jsonl is not in {} but in {}; paths in a YAML count from its folder"
    )
    with pytest.raises(InputError, match=rule.format(folder, tmp_path) + "$"):
        read_run_config(file)
    (folder / "a.jsonl").write_text("{}")
    file = write(folder, {**GOOD, "output": "out"})
    with pytest.raises(InputError, match=f"output: out is not in {folder} but in {tmp_path}; "):
        read_run_config(file)
    assert read_run_config(file, ["output=out"]).output == "out"
    (folder / "out").mkdir()
    assert read_run_config(file).output == str(folder / "out")


def test_the_resolved_config_replays_from_any_directory(tmp_path, monkeypatch):
    values = {
        **GOOD,
        "merge": {"weights": [1, 2.5]},
        "train": {"controls": {"random": 2}, "seeds": 2},
        "split": {"groups": 8},
        "data": {"chat_template": "t.jinja"},
        "output": "out",
    }
    for name in ("a.jsonl", "t.jinja"):
        (tmp_path / name).write_text("{}")
    file = write(tmp_path, values)
    monkeypatch.chdir(tmp_path)
    config = read_run_config(file.relative_to(tmp_path))
    assert (config.mixture[0].path, config.output, config.model) == ("a.jsonl", "out", "m")
    resolved = tmp_path / "out" / "sketch" / "config.yml"
    resolved.parent.mkdir(parents=True)
    write_run_config(config, resolved)
    monkeypatch.chdir("/")
    assert read_run_config(resolved) == read_run_config(file)
    assert read_run_config(resolved).output == str(tmp_path / "out")
    assert parse(RunConfig, to_plain(config), "again") == config


def test_every_option_has_a_help_text():
    sections = (SketchConfig, SplitConfig, TrainConfig, MergeConfig, EvaluateConfig)
    for section in (*sections, DataConfig, DatasetConfig):
        for field in dataclasses.fields(section):
            assert len(field.metadata["help"]) > 5, field.name
