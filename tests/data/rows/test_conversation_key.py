"""The key of a conversation: equal for what a model reads alike, different for all else."""

import json

import pytest
from support.data.rows import assistant, user

from merit_fast.data import DataConfig, DatasetConfig
from merit_fast.data.rows.reader import RowReader


def key(row, place="here", **keys):
    return RowReader(DatasetConfig("d", "x", **keys), DataConfig()).read(row, place).key()


CALL = {"name": "f", "arguments": {"a": 1, "b": "x"}}
CALLED = [
    user("q"),
    {"role": "assistant", "content": "a", "tool_calls": [{"type": "function", "function": CALL}]},
]
ALIKE = {
    "formats": [
        {"prompt": "q", "completion": "a"},
        {"instruction": "q", "input": "", "output": "a", "id": 3},
        {"messages": [user("q"), assistant("a")]},
        {"conversations": [{"from": "human", "value": "q"}, {"value": "a", "from": "gpt"}]},
        {"messages": [user([{"type": "text", "text": "q"}]), assistant("a")], "tools": []},
        {"messages": [user("q"), {**assistant("a"), "weight": 1, "name": None}]},
    ],
    "calls": [
        {"messages": CALLED},
        {"messages": json.dumps(CALLED)},
        {"messages": [user("q"), {**assistant("a"), "tool_calls": [CALL]}]},
        {
            "messages": [
                user("q"),
                {
                    **assistant("a"),
                    "function_call": {"arguments": '{"b": "x", "a": 1}', "name": "f"},
                },
            ]
        },
        {
            "messages": [
                user("q"),
                {
                    **assistant("a"),
                    "tool_calls": [{"name": "f", "arguments": {"c": None, **CALL["arguments"]}}],
                },
            ]
        },
    ],
    "images": [
        {"prompt": "<image>q", "completion": "a", "image": {"bytes": b"1", "path": "x.png"}},
        {"prompt": "q", "completion": "a", "images": ["data:image/png;base64,MQ=="]},
    ],
}
BASE = {"messages": [user("q"), assistant("a")]}
DIFFERENT = [
    BASE,
    {"messages": [user("q "), assistant("a")]},
    {"messages": [{"role": "tool", "content": "q"}, assistant("a")]},
    {"messages": [user("q"), assistant("a"), user("b"), assistant("c")]},
    {"messages": [user("q"), {**assistant("a"), "reasoning_content": "r"}]},
    {"messages": [user("q"), {**assistant("a"), "name": "r"}]},
    {**BASE, "system": "s"},
    {**BASE, "tools": [{"name": "f"}]},
    {**BASE, "chat_template_kwargs": {"x": 1}},
    {**BASE, "image": "a.png"},
    {**BASE, "image": "b.png"},
    {**BASE, "image": b"a.png"},
    {"messages": [user("q<image>"), assistant("a")], "image": "a.png"},
    *(rows[0] for rows in list(ALIKE.values())[1:]),
]


@pytest.mark.parametrize("name", ALIKE)
def test_equal_conversations_have_equal_keys(name):
    keys = {key(row, place=str(i)) for i, row in enumerate(ALIKE[name])}
    assert len(keys) == 1
    assert len(keys.pop()) == 16


def test_different_conversations_have_different_keys():
    assert len({key(row) for row in DIFFERENT}) == len(DIFFERENT)


def test_any_text_has_a_key():
    for text in ("\ud800", "\x00", "🦜", ""):
        assert len(key({"prompt": text, "completion": "a"})) == 16
