"""Options of `train.engine`: every wrong one ends the command before a stack is started."""

import json
import re
import sys
from dataclasses import fields

import pytest
import yaml

from merit_fast.engines import options
from merit_fast.train.config import TrainConfig


@pytest.fixture
def bare_python(tmp_path):
    """An interpreter without any installed package."""
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    script.chmod(0o755)
    return script


@pytest.mark.parametrize(
    "words, rule",
    [
        (["train.engine=peft"], "train.engine: must be one of builtin, trl"),
        (["train.engine_command='x {out}'"], "engine_command: must be absent with engine builtin"),
        (["train.engine=command"], "engine_command: must be given with engine command, got None"),
        (
            ["train.engine=command", "train.engine_command='run {rows}'"],
            r"engine_command: must be a command with \{out\}",
        ),
        (
            ["train.engine=command", "train.engine_command='run {out}'"],
            r"engine_command: must be a command with \{rows\} or \{config\}",
        ),
        (
            ["train.engine=command", "train.engine_command='run {rows} {out} {lr}'"],
            r"must be a command with placeholders of rows, .*, got '\{lr\}'",
        ),
        (
            ["train.engine=command", "train.engine_command='run {rows} {out'"],
            "must have its braces in pairs",
        ),
        (
            ["train.engine=command", "train.engine_command='no-such-program {rows} {out}'"],
            "must begin with a program, no-such-program is none",
        ),
        (
            ["train.engine=trl", "train.engine_command='x {out}'"],
            "engine_command: must be absent with engine trl",
        ),
        (["train.engine=trl", "train.engine_config=none.yml"], "none.yml is not there"),
        (["train.engine=trl", "train.freeze=[lm_head]"], "train.freeze: must be absent"),
        (["train.engine=trl", "train.optimizer=adamw-8bit"], "train.optimizer: must be absent"),
        (["train.engine=trl", "train.kernels=eager"], "train.kernels: must be absent"),
        (["train.engine=trl", "train.update_in_backward=previous"], "update_in_backward: must be"),
        (["train.engine=trl", "train.shard=full"], "train.shard: must be absent with engine trl"),
        (["train.engine=trl", "train.budget=equal-steps"], "train.budget: must be absent"),
        (
            ["train.engine=trl", "train.adapter={kind: lora, save: merged}"],
            "train.adapter.save: must be adapter with engine trl, got merged",
        ),
        (
            ["train.engine=trl", "train.controls={joint_short: true}"],
            "joint_short: must be absent with engine trl",
        ),
        (
            ["train.engine=llamafactory", "train.engine_python={bare}"],
            "llamafactory needs llamafactory in the environment of .*: pip install llamafactory",
        ),
        (
            ["train.engine=axolotl", "train.engine_python=/no/python"],
            "engine_python: must be an interpreter that runs, got /no/python",
        ),
        (["train.engine=trl", "data.chat_template=plain"], "must be a chat template"),
    ],
)
def test_wrong_options_end_the_command_before_anything_is_trained(
    call, split_run, bare_python, words, rule
):
    words = [word.replace("{bare}", str(bare_python)) for word in words]
    code, _, error = call("train", split_run, *words)
    line = error.splitlines()[-1]
    assert code == 2 and re.search(rule, line), error
    assert not list((split_run.parent / "out").glob("branches/*"))


def test_every_option_of_train_reaches_a_stack_or_is_refused():
    of_the_plan = {"seed", "seeds", "mix", "controls"}  # which branches there are, on which rows
    of_the_engine = {"engine", "engine_config", "engine_command", "engine_python"}
    names = [*options.BUILTIN_ONLY, *options.OF_RECIPE, *options.OF_USER]
    assert len(names) == len(set(names))
    known = {*names, *of_the_plan, *of_the_engine}
    assert known == {field.name for field in fields(TrainConfig)}


def test_the_stacks_own_configuration_must_train_the_model_of_the_run(call, split_run, tmp_path):
    own = tmp_path / "mine.yml"
    own.write_text("model_name_or_path: some/other\nlearning_rate: 1.0e-4\n")
    words = ["train.engine=trl", f"train.engine_config={own}"]
    code, _, error = call("train", split_run, *words)
    assert code == 2 and "mine.yml: model_name_or_path: must be the run's model" in error
    own.write_text("use_peft: true\n")
    code, _, error = call("train", split_run, *words, "train.adapter.kind=lora")
    assert code == 2 and "train.adapter: must be absent with engine_config" in error
    own.write_text("- a\n")
    code, _, error = call("train", split_run, *words)
    assert code == 2 and "mine.yml: must be a mapping of keys, got list" in error


def test_rows_that_a_stack_cannot_take_end_the_command(call, split_run, tmp_path):
    values = yaml.safe_load(split_run.read_text())
    turns = [
        {"role": role, "content": text, **({"train": False} if text == "no" else {})}
        for pair in (("a", "one"), ("b", "no"), ("c", "two"))
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    marked = tmp_path / "marked.jsonl"
    marked.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(4)))
    values["mixture"].append({"name": "marked", "path": str(marked)})
    values["output"] = "other"
    split_run.write_text(yaml.safe_dump(values))
    code, _, error = call("run", split_run, "train.engine=trl")
    assert code == 2 and "mixture: marked: trl trains every answer" in error, error
    assert not (split_run.parent / "other" / "sketch").exists()  # before the first heavy step
