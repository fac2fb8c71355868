"""Messages keep what they came with: calls, tools, reasoning, names, from every shape of row."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.data.one_row import for_template, read, refusal
from support.data.rows import assistant, user, write

from merit_fast.data import DataConfig, DatasetConfig
from merit_fast.data.rows.reader import RowReader
from merit_fast.data.sources import Source, read_rows

WORDS = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="<"), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | WORDS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(WORDS, inner, max_size=2),
    max_leaves=4,
)
OBJECTS = st.dictionaries(WORDS, VALUES, max_size=3)
CALL = st.fixed_dictionaries(
    {
        "type": st.just("function"),
        "function": st.fixed_dictionaries({"name": WORDS, "arguments": OBJECTS}),
    },
    optional={"id": WORDS},
)
EXTRA = {
    "name": WORDS,
    "train": st.booleans(),
    "further": VALUES.filter(lambda value: value is not None),
}
SAYS = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user"]), "content": WORDS}, optional=EXTRA
)
ANSWERS = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": WORDS},
    optional={
        **EXTRA,
        "reasoning_content": WORDS,
        "thinking": WORDS,
        "refusal": st.none(),
        "weight": st.just(1),
        "train": st.just(True),
        "tool_calls": st.none() | st.lists(CALL, min_size=1, max_size=2),
    },
)
CALLS = st.fixed_dictionaries(
    {"role": st.just("assistant"), "tool_calls": st.lists(CALL, min_size=1, max_size=2)},
    optional={"content": st.none(), "reasoning": WORDS},
)
RESULTS = st.fixed_dictionaries(
    {"role": st.just("tool"), "content": WORDS}, optional={"tool_call_id": WORDS, "name": WORDS}
)
CHATS = st.lists(st.one_of(SAYS, ANSWERS, CALLS, RESULTS), max_size=6)


@settings(max_examples=80, deadline=None)
@given(CHATS, st.lists(OBJECTS, max_size=2), OBJECTS, st.booleans())
def test_chat_rows_reach_the_template_as_they_came(chat, parameters, kwargs, as_text):
    """Apart from nulls and marks for the loss; arguments may come as JSON text."""
    chat = [*chat, assistant("end")]
    tools = [
        {"type": "function", "function": {"name": "f", "parameters": schema}}
        for schema in parameters
    ]
    row = {"messages": copy.deepcopy(chat), "tools": tools, "chat_template_kwargs": kwargs}
    if as_text:
        for message in row["messages"]:
            for call in message.get("tool_calls") or []:
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
        row = {**row, "messages": json.dumps(row["messages"]), "tools": json.dumps(tools)}
    came = copy.deepcopy(row)
    conversation = read(row)
    assert row == came  # the reader changes nothing of the caller's
    expected = [
        {
            "content": None,
            **{k: v for k, v in message.items() if v is not None and k not in ("train", "weight")},
        }
        for message in chat
    ]
    assert for_template(conversation) == expected
    assert list(conversation.tools or ()) == tools
    assert conversation.template_arguments == {k: v for k, v in kwargs.items() if v is not None}


@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value")], ids="/".join)
@pytest.mark.parametrize("column", ["messages", "conversations"])
@pytest.mark.parametrize("as_text", [False, True])
def test_columns_keys_and_words_cross(column, keys, as_text):
    for words in (
        ("system", "user", "assistant", "tool"),
        ("developer", "human", "gpt", "function"),
        ("system", "human", "gpt", "observation"),
    ):
        turns = [{keys[0]: word, keys[1]: str(i)} for i, word in enumerate(words)]
        conversation = read({column: json.dumps(turns) if as_text else turns})
        assert for_template(conversation) == [
            {"role": role, "content": str(i)}
            for i, role in enumerate(("system", "user", "assistant", "tool"))
        ]


def test_arrow_rows_are_the_json_rows(tmp_path):
    """Arrow fills each row's keys, arguments and schemas into all others; lists keep nulls."""
    tools = [
        {"type": "function", "function": {"name": "a", "parameters": {"x": {"type": "int"}}}},
        {"type": "function", "function": {"name": "b", "parameters": {"y": {"type": "str"}}}},
    ]
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "a"}}]}
    rows = [
        {
            "messages": [
                user("q"),
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"function": {"name": "a", "arguments": {"x": 1}}, "id": "1"}],
                },
                {"role": "tool", "content": "r", "tool_call_id": "1"},
                {**assistant("z"), "reasoning_content": "why"},
            ],
            "tools": tools[:1],
            "system": None,
        },
        {
            "messages": [
                user("q"),
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [
                        {"function": {"name": "b", "arguments": {"y": "1", "l": [1, None]}}}
                    ],
                },
                {**assistant("z"), "name": "bob", "train": True},
            ],
            "tools": tools[1:],
        },
        {"messages": [user("q"), call, assistant("z")], "tools": None},
        {"messages": [user("q"), assistant("z")], "tools": None, "system": "s"},
    ]
    of = {
        suffix: [read(row) for _, row in read_rows(Source(write(tmp_path / f"rows{suffix}", rows)))]
        for suffix in (".jsonl", ".parquet")
    }
    for json_row, arrow_row in zip(of[".jsonl"], of[".parquet"], strict=True):
        assert for_template(arrow_row) == for_template(json_row)
        assert arrow_row.tools == json_row.tools
        assert arrow_row.key() == json_row.key()
    assert len({conversation.key() for conversation in of[".jsonl"]}) == len(rows)
    [_, called, *_] = for_template(of[".parquet"][1])
    assert called["tool_calls"][0]["function"]["arguments"] == {"y": "1", "l": [1, None]}


SYSTEM_ROWS = {
    "messages": {"messages": [user("q"), assistant("a")]},
    "sharegpt": {"conversations": [user("q"), assistant("a")]},
    "alpaca": {"instruction": "q", "output": "a"},
    "prompt": {"prompt": "q", "completion": "a"},
}


@pytest.mark.parametrize("name", ["system", "system_prompt"])
@pytest.mark.parametrize("shape", SYSTEM_ROWS)
def test_the_system_column_is_read_in_every_shape(shape, name):
    row = {**SYSTEM_ROWS[shape], name: "Be brief."}
    system = {"role": "system", "content": "Be brief."}
    assert for_template(read(row)) == [system, user("q"), assistant("a")]
    assert for_template(read({**row, name: ""})) == [user("q"), assistant("a")]


def test_a_system_message_wins_over_the_column_and_is_noted():
    reader = RowReader(DatasetConfig("d", "x"), DataConfig())
    turns = [{"role": "system", "content": "mine"}, user("q"), assistant("a")]
    for system in ("mine", "other", "third"):
        conversation = reader.read({"messages": turns, "system": system}, "here")
        assert for_template(conversation) == turns
    assert reader.notes() == ["2 rows with a system message, which wins over the column system"]


def test_text_parts_are_joined_and_other_parts_refused():
    parts = [{"type": "text", "text": "a", "path": None}, {"type": "text", "text": " b"}]
    assert for_template(read({"messages": [user(parts), assistant("c")]}))[0] == user("a b")
    for part, rule in {
        "video": "here: messages[0].content[0].type: must be text, image or image_url, got 'video'",
        "input_audio": "type: must be text, image or image_url, got 'input_audio'",
    }.items():
        assert rule in refusal({"messages": [user([{"type": part}]), assistant("c")]})
    marked = [{"type": "text", "text": "a", "train": False}]
    assert "content[0].train: must be absent" in refusal(
        {"messages": [user("q"), assistant(marked)]}
    )
    keyed = [{"type": "text", "text": "a", "cache": 1}]
    row = {"messages": [user(keyed), assistant("c")]}
    assert "content[0].cache: must be absent or listed under data.ignore_columns" in refusal(row)
    assert read(row, DataConfig(ignore_columns=("cache",))).messages[0].content == "a"


def test_parallel_calls_and_template_arguments_reach_the_template():
    row = {
        "messages": [user("q"), assistant("a")],
        "parallel_tool_calls": False,
        "chat_template_kwargs": {"enable_thinking": False, "filled": None},
    }
    expected = {"parallel_tool_calls": False, "enable_thinking": False}
    assert read(row).template_arguments == expected
    row["chat_template_kwargs"] = json.dumps({"enable_thinking": False})
    assert read(row).template_arguments == expected


BAD_MESSAGES = {
    "no call": (
        {"role": "assistant", "tool_calls": ["f"]},
        "messages[1].tool_calls[0]: must be a call {name, arguments}, got 'f'",
    ),
    "no name": (
        {"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]},
        "messages[1].tool_calls[0].function: must have the key name, got arguments",
    ),
    "arguments no json": (
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{city"}]},
        "messages[1].tool_calls[0].function.arguments: must be JSON where it is a string",
    ),
    "arguments no object": (
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]},
        "messages[1].tool_calls[0].function.arguments: must be an object or JSON text of one, "
        "got '[1]'",
    ),
    "two kinds of calls": (
        {"role": "assistant", "tool_calls": [{"name": "f"}], "function_call": {"name": "f"}},
        "messages[1].function_call: must be absent next to tool_calls",
    ),
    "call turn with calls": (
        {"from": "function_call", "value": '{"name": "f"}', "tool_calls": [{"name": "g"}]},
        "messages[1].tool_calls: must be absent where the content is a call, got [{'name': 'g'}]",
    ),
    "call turn of words": (
        {"from": "function_call", "value": "I call f"},
        "messages[1].value: must be JSON where it is a string",
    ),
    "no content": (assistant(None), "messages[1]: must have the key content, got role, content"),
    "content object": (assistant({"a": 1}), "messages[1].content: must be a string, got {'a': 1}"),
    "tool without content": (
        {"role": "tool", "content": None, "tool_calls": [{"name": "f"}]},
        "messages[1]: must have the key content",
    ),
    "weight": ({**assistant("a"), "weight": 0.5}, "messages[1].weight: must be 0 or 1, got 0.5"),
    "weight of a question": (
        {**user("a"), "weight": 1},
        "messages[1].weight: must be 0 or absent except on an assistant's message, got 1",
    ),
    "train": ({**assistant("a"), "train": 1}, "messages[1].train: must be true or false, got 1"),
    "train against weight": (
        {**assistant("a"), "train": True, "weight": 0},
        "messages[1].weight: must agree with train: True, got 0",
    ),
    "no object": ("Hi", "messages[1]: must be an object with the key role, got 'Hi'"),
    "no role": ({"content": "a"}, "messages[1]: must have the key role, got content"),
}


@pytest.mark.parametrize("name", BAD_MESSAGES)
def test_bad_messages_name_place_rule_and_value(name):
    message, rule = BAD_MESSAGES[name]
    text = refusal({"messages": [user("q"), message, assistant("z")]})
    assert text.startswith("here: ") and rule in text
