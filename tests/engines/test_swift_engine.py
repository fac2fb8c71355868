"""`merit-fast train --engine swift`: a package stands in for ms-swift; test_real_swift has it."""

import json
import sys

import pytest
import yaml
from support.paths import ROOT, TESTS

from merit_fast.integrations.swift import PLUGIN_FILE

FAKE = TESTS / "support" / "stacks" / "fake_swift"


@pytest.fixture
def python(tmp_path):
    """An interpreter of an environment with the package."""
    script = tmp_path / "python"
    path = f"{FAKE}:{ROOT}:{TESTS}"
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{path}" exec "{sys.executable}" "$@"\n')
    script.chmod(0o755)
    return script


@pytest.fixture
def train(call, split_run, python, tmp_path):
    """Trains by ms-swift with a configuration of these keys."""

    def run(keys, *more):
        own = tmp_path / "swift.yml"
        own.write_text(yaml.safe_dump(keys))
        config = [f"train.engine_config={own}"] if keys is not None else []
        words = ["train.engine=swift", f"train.engine_python={python}", *config, *more]
        return call("train", split_run, *words)

    return run


def test_branches_are_pinned_to_a_kind_and_get_our_plugin_next_to_the_users(train, split_run):
    keys = {"model_type": "llama", "template": "chatml", "callbacks": "early_stop"}
    code, _, error = train(keys, "train.seeds=2")
    assert code == 0, error
    folder = split_run.parent / "out" / "branches"
    for name, seed in (("merit-0", 0), ("merit-0.seed1", 1)):
        record = json.loads((folder / name / "engine.json").read_text())
        config = record["config"]
        assert (config["model_type"], config["template"]) == ("llama", "chatml")
        assert config["callbacks"] == ["early_stop", "merit"]
        assert config["external_plugins"] == [str(PLUGIN_FILE)]
        assert config.get("seed", 0) == seed
        assert config.get("data_seed", 42) == 42 + seed
        assert "swift.cli.main sft" in record["command"]
        assert (folder / name / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "keys, words, rule",
    [
        ({"template": "chatml"}, [], "model_type and template: ms-swift: Multiple possible types"),
        ({"model_type": "llama"}, [], "swift.yml: template: must name the template of"),
        (
            {"model_type": "llama", "template": "dummy"},
            [],
            "swift does not know, got 'dummy'",
        ),
        ({"packin": True}, [], "swift.yml: packin: swift has no such key; did you mean packing?"),
        ({"save_strategy": "no"}, [], "save_strategy: must be steps or epoch, got 'no'"),
        ({"model": "another"}, [], "swift.yml: model: must be the run's model"),
        (None, [], "train.engine_config: model_type and template: ms-swift: Multiple possible"),
        (None, ["train.packing=true"], "train.packing: must be false with engine swift on a CPU"),
    ],
)
def test_what_swift_would_guess_drop_or_not_save_ends_the_command(
    train, split_run, monkeypatch, keys, words, rule
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, _, error = train(keys, *words)
    assert code == 2 and rule in error, error
    assert not list((split_run.parent / "out").glob("branches/*"))
