"""Calls, reasoning, images and marks reach the form of each stack, or are refused by name."""

import json

import pytest

from merit_fast.data import DataConfig, DatasetConfig
from merit_fast.errors import InputError
from merit_fast.export.form import free_names
from merit_fast.export.rows import PartRows
from merit_fast.export.stacks.axolotl import axolotl_form
from merit_fast.export.stacks.llamafactory import llamafactory_form, needs_mask
from merit_fast.export.stacks.trl import trl_forms
from merit_fast.export.survey import survey
from merit_fast.export.write import joined, write_rows

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": [1, 2]}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
TOOL_ROW = {
    "messages": [
        {"role": "user", "content": "1+2?"},
        {"role": "assistant", "content": None, "reasoning_content": "add", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
        {"role": "assistant", "content": "It is 3."},
    ],
    "tools": [TOOL],
}
IMAGE_ROW = {
    "image": "a.png",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A cat."},
    ],
}


def rows_of(tmp_path, rows, name="d", data=None, **keys):
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = DatasetConfig(name, str(path), **keys)
    return PartRows(entry, data or DataConfig(), "train", tuple(range(len(rows))))


def exported(tmp_path, rows, form_of):
    """The written rows, and the form."""
    found = survey([rows])
    names = free_names([found])
    form = form_of(found, names)
    count = write_rows(tmp_path / "out.jsonl", [(rows, form)], names, tmp_path / "images")
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(written) == count == len(rows.numbers)
    return written, form


def trl_form(found, names):
    return trl_forms([found])[found.name]


def test_axolotl_and_trl_read_calls_as_they_came(tmp_path):
    for form_of in (axolotl_form, trl_form):
        [row], form = exported(tmp_path, rows_of(tmp_path, [TOOL_ROW]), form_of)
        assert form.extra is None
        assert row == {**TOOL_ROW, "dataset": "d", "id": "d-0"}


def test_llamafactory_gets_calls_and_results_as_turns(tmp_path):
    [row], form = exported(tmp_path, rows_of(tmp_path, [TOOL_ROW]), llamafactory_form)
    assert row["messages"] == TOOL_ROW["messages"]
    assert form.entry["columns"] == {"messages": "merit_messages", "tools": "merit_tools"}
    assert json.loads(row["merit_tools"]) == [TOOL]
    roles = [turn["role"] for turn in row["merit_messages"]]
    assert roles == ["user", "function_call", "observation", "assistant"]
    thought, _, call = row["merit_messages"][1]["content"].rpartition("\n\n")
    assert thought == "<think>\nadd\n</think>"
    assert json.loads(call) == [{"name": "add", "arguments": {"a": [1, 2]}}]


def test_images_become_absolute_paths(tmp_path):
    rows = rows_of(tmp_path, [IMAGE_ROW], media=str(tmp_path / "pictures"))
    picture = str(tmp_path / "pictures" / "a.png")
    [row], form = exported(tmp_path, rows, llamafactory_form)
    assert row["images"] == [picture] and form.entry["columns"]["images"] == "images"
    assert row["messages"][0]["content"].count("<image>") == 1
    [row], _ = exported(tmp_path, rows, axolotl_form)
    parts = row["messages"][0]["content"]
    assert [part for part in parts if part["type"] == "image"] == [
        {"type": "image", "path": picture}
    ]
    assert row["image"] == "a.png"
    [row], form = exported(tmp_path, rows, trl_form)
    assert row["images"] == [picture] and form.entry["columns"] == [*row][4:]
    assert row["prompt"][0]["content"][0] == {"type": "image"}


def test_last_answers_only_become_a_key_or_a_completion(tmp_path):
    rows = rows_of(
        tmp_path,
        [{"messages": TOOL_ROW["messages"][:1] + TOOL_ROW["messages"][3:]} for _ in range(2)]
        + [{"messages": [*TOOL_ROW["messages"][::3] * 2]}],
        data=DataConfig(train_on="last"),
    )
    assert needs_mask([survey([rows])])
    written, form = exported(tmp_path, rows, trl_form)
    assert form.entry["columns"] == ["prompt", "completion"]
    assert [len(row["prompt"]) for row in written] == [1, 1, 3]
    assert all(row["completion"] == [TOOL_ROW["messages"][3]] for row in written)
    every = rows_of(tmp_path, [{"messages": [*TOOL_ROW["messages"][::3] * 2]}], "every")
    with pytest.raises(InputError, match="every: every answer is in the loss, but in d the last"):
        needs_mask([survey([rows]), survey([every])])


def test_what_a_stack_drops_is_refused(tmp_path):
    user, _, _, answer = TOOL_ROW["messages"]
    twice = rows_of(tmp_path, [{"messages": [user, user, answer]}])
    with pytest.raises(InputError, match="d.jsonl:1: user and assistant must alternate"):
        exported(tmp_path, twice, llamafactory_form)
    arguments = {"messages": [user, answer], "chat_template_kwargs": {"thinking": True}}
    rows = rows_of(tmp_path, [arguments])
    for form_of in (axolotl_form, llamafactory_form):
        with pytest.raises(InputError, match="chat_template_kwargs: .* reads none from a row"):
            exported(tmp_path, rows, form_of)


def test_keys_are_added_before_the_closing_brace():
    text = b'{"a": "}", "b": {} }'
    assert joined(text, {"id": "\u00e9"}) == b'{"a": "}", "b": {} , "id": "\xc3\xa9"}'


def test_repeated_rows_are_written_as_often_as_they_are_trained(tmp_path):
    rows = rows_of(tmp_path, [{"prompt": str(i), "completion": "x"} for i in range(3)])
    repeated = PartRows(rows.config, rows.data_config, "train", (0, 2, 2))
    assert [row.number for row in repeated] == [0, 2, 2]
