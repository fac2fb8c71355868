"""Any JSON object is read as a conversation, or refused in one line that names its place."""

import copy
from collections.abc import Iterator
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from merit_fast.data import DataConfig, DatasetConfig
from merit_fast.data.rows.columns import COMMON
from merit_fast.data.rows.formats import FORMATS
from merit_fast.data.rows.messages import TURN_KEYS
from merit_fast.data.rows.reader import RowReader
from merit_fast.errors import InputError

CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": [1]}'}}
CHAT = [
    {"role": "system", "content": "s"},
    {
        "role": "user",
        "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "q"}],
    },
    {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "r"},
    {"role": "tool", "content": "t", "tool_call_id": "c"},
    {"role": "assistant", "content": "a", "weight": 1, "train": True},
]
TURNS = [
    {"from": "human", "value": "<image>\nq"},
    {"from": "function_call", "value": '<think>w</think>{"name": "f", "arguments": {}}'},
    {"from": "observation", "value": "t"},
    {"from": "gpt", "value": "a"},
]
GOOD = [
    {"messages": CHAT, "tools": [{"type": "function", "function": {"name": "f"}}], "id": 1},
    {"conversations": TURNS, "image": "a.png", "tools": '[{"name": "f"}]', "system": "s"},
    {"instruction": "q", "input": "i", "output": "a", "history": [["x", "y"]], "label": True},
    {"prompt": CHAT[:2], "completion": CHAT[2:], "chat_template_kwargs": {"x": 1}},
    {"question": "q", "answer": "a", "images": [{"bytes": None, "path": "a.png"}]},
]
NAMES = [
    *(n for f in FORMATS for column in f.columns for n in (column.name, *column.aliases)),
    *(n for column in COMMON for n in (column.name, *column.aliases)),
    *TURN_KEYS,
    *("from", "value", "function_call", "type", "text", "path", "url", "bytes", "further"),
]
TEXTS = ("user", "gpt", "function_call", "<image>", "", "[", "[]", "{}", '{"name": "f"}', "image")
LEAVES = st.sampled_from((None, True, False, 0, 1, 0.5, *TEXTS))
VALUES = (
    LEAVES
    | st.lists(LEAVES, max_size=2)
    | st.dictionaries(st.sampled_from(NAMES), LEAVES, max_size=2)
    | st.sampled_from((*CHAT, *TURNS, CHAT, TURNS, CALL, [CALL]))
)
COLUMNS = st.sampled_from(
    ({}, {"keep_if": "label"}, {"images": ""}, {"prompt": "question"}, {"content": "value"})
)


def holders(value: Any) -> Iterator[Any]:
    """Every object and list within a value, the outer ones first."""
    if isinstance(value, dict | list):
        yield value
        for item in value.values() if isinstance(value, dict) else value:
            yield from holders(item)


@st.composite
def changed_rows(draw):
    """A good row in which up to two values are removed, replaced or added."""
    row = copy.deepcopy(draw(st.sampled_from(GOOD)))
    for _ in range(draw(st.integers(0, 2))):
        holder = draw(st.sampled_from(list(holders(row))))
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if isinstance(holder, dict) and (not keys or draw(st.booleans())):
            holder[draw(st.sampled_from(NAMES))] = copy.deepcopy(draw(VALUES))
        elif keys:
            key = draw(st.sampled_from(keys))
            if draw(st.booleans()):
                del holder[key]
            else:
                holder[key] = copy.deepcopy(draw(VALUES))
    return row


@settings(max_examples=400, deadline=None)
@given(changed_rows(), COLUMNS)
def test_any_row_is_read_or_refused_in_one_line(row, columns):
    data = DataConfig(ignore_columns=("label",))
    reader = RowReader(DatasetConfig("d", "x", columns=columns), data)
    came = copy.deepcopy(row)
    try:
        conversation = reader.read(row, "here")
    except InputError as error:
        assert str(error).startswith("here: ") and "\n" not in str(error)
        return
    finally:
        assert row == came
    shown = 0
    for message in conversation.messages:
        assert isinstance(message.role, str) and not {"role", "content"} & set(message.fields)
        assert all(value is not None for value in message.fields.values())
        if not isinstance(message.content, str | None):
            shown += sum(part["type"] == "image" for part in message.content)
            assert all(set(part) <= {"type", "text"} for part in message.content)
    assert shown == len(conversation.images)
    assert len(conversation.key()) == 16


def test_the_good_rows_are_good():
    for row in GOOD:
        data = DataConfig(ignore_columns=("label",))
        RowReader(DatasetConfig("d", "x"), data).read(row, "here")
