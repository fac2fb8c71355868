"""Rows and configurations of ms-swift: what it reads, and what it would do otherwise."""

import json

import pytest
import yaml
from export.test_export_forms import IMAGE_ROW, TOOL, TOOL_ROW, exported, rows_of

from merit_fast.data import DataConfig
from merit_fast.errors import InputError
from merit_fast.export.stacks.swift import swift_forms


def swift_form(found, names):
    return swift_forms([found])[found.name]


def test_calls_results_and_thoughts_are_turns_of_their_own(tmp_path):
    [row], _ = exported(tmp_path, rows_of(tmp_path, [TOOL_ROW]), swift_form)
    roles = [turn["role"] for turn in row["messages"]]
    assert roles == ["user", "assistant", "tool_call", "tool", "assistant"]
    assert [turn["loss"] for turn in row["messages"]] == [None, True, True, None, True]
    assert row["messages"][1]["content"] == "<think>\nadd\n</think>\n\n"
    call = json.loads(row["messages"][2]["content"])
    assert call == {"name": "add", "arguments": {"a": [1, 2]}}
    assert json.loads(row["tools"]) == [TOOL]


def test_columns_that_swift_takes_for_its_own_stay_behind(tmp_path):
    row = {"prompt": "2+2?", "completion": "4", "label": False, "solution": "x", "channel": "y"}
    data = DataConfig(ignore_columns=("label", "solution", "channel"))
    [row], _ = exported(tmp_path, rows_of(tmp_path, [row], data=data), swift_form)
    assert row.keys() == {"dataset", "id", "messages", "channel"}
    assert row["channel"] == "d"
    assert [turn["content"] for turn in row["messages"]] == ["2+2?", "4"]


def test_images_have_a_mark_in_the_text_and_absolute_paths(tmp_path):
    rows = rows_of(tmp_path, [IMAGE_ROW], media=str(tmp_path / "pictures"))
    [row], _ = exported(tmp_path, rows, swift_form)
    assert row["images"] == [str(tmp_path / "pictures" / "a.png")]
    assert row["messages"][0]["content"] == "<image>\nWhat is it?"


USER, CALLS, RESULT, ANSWER = TOOL_ROW["messages"]


@pytest.mark.parametrize(
    "row, data, rule",
    [
        ([USER, USER, ANSWER], {}, "d.jsonl:1: user and assistant must alternate for ms-swift"),
        ([USER, ANSWER, ANSWER], {}, "got assistant before assistant"),
        ([USER, CALLS, RESULT, USER, ANSWER], {}, "got tool before user"),
        ([{**USER, "name": "Ann"}, ANSWER], {}, "d.jsonl:1: name: ms-swift has no place for it"),
        (
            [{**USER, "train": True}, {**ANSWER, "train": True}],
            {},
            "ms-swift trains answers only, and these rows put turns of user into the loss",
        ),
        (
            [USER, ANSWER, USER, {**ANSWER, "train": False}],
            {},
            "the last answer must be in the loss for ms-swift",
        ),
    ],
)
def test_rows_that_swift_would_train_otherwise_are_refused(tmp_path, row, data, rule):
    rows = rows_of(tmp_path, [{"messages": row}], data=DataConfig(**data))
    with pytest.raises(InputError, match=rule):
        exported(tmp_path, rows, swift_form)


def test_arguments_of_a_jinja_template_are_refused(tmp_path):
    row = {"messages": [USER, ANSWER], "chat_template_kwargs": {"thinking": True}}
    with pytest.raises(InputError, match="chat_template_kwargs: ms-swift's templates take none"):
        exported(tmp_path, rows_of(tmp_path, [row]), swift_form)


def test_marks_of_single_answers_are_exported(export, marked_run):
    out, report = export(marked_run, "swift")
    marks = []
    for group in report["groups"]:
        config = yaml.safe_load((out / group["config"]).read_text())
        assert config["dataset"] == [str(out / name) for name in group["train"]]
        assert config["add_version"] is False and config["strict"] is True
        for line in (out / group["train"][0]).read_text().splitlines():
            row = json.loads(line)
            answers = [turn["loss"] for turn in row["messages"] if turn["role"] == "assistant"]
            if row["channel"] == "marked":
                marks.append(answers)
            else:
                assert all(answers)
    assert marks and all(each == [True, False, True] for each in marks)


def test_a_users_choice_of_turns_gives_way_to_the_rows_marks(export, plain_run, tmp_path):
    own = tmp_path / "own.yml"
    own.write_text(yaml.safe_dump({"loss_scale": "all+hermes", "columns": {"a": "b"}, "seed": 3}))
    out, report = export(plain_run, "swift", "--extend", str(own))
    config = yaml.safe_load((out / report["groups"][0]["config"]).read_text())
    assert config["loss_scale"] == "hermes" and config["seed"] == 3 and "columns" not in config
