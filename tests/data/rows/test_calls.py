"""Calls and tools have one form, whatever shape of row they came in."""

import json

import pytest
from support.data.one_row import for_template, read, refusal
from support.data.rows import assistant, user

ARGUMENTS = {"city": "Paris", "days": None}
CALLED = {"type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
CALL_SHAPES = {
    "object": {"role": "assistant", "content": None, "tool_calls": [CALLED]},
    "json arguments": {
        "role": "assistant",
        "tool_calls": [
            {
                "type": "function",
                "function": {"name": "weather", "arguments": json.dumps(ARGUMENTS)},
            }
        ],
    },
    "json calls": {"role": "assistant", "content": None, "tool_calls": json.dumps([CALLED])},
    "without wrapper": {"role": "assistant", "tool_calls": [CALLED["function"]]},
    "older key": {
        "role": "assistant",
        "content": None,
        "function_call": {"name": "weather", "arguments": json.dumps(ARGUMENTS)},
    },
    "sharegpt": {"from": "function_call", "value": json.dumps(CALLED["function"])},
    "sharegpt list": {"from": "function_call", "value": json.dumps([CALLED["function"]])},
}


@pytest.mark.parametrize("shape", CALL_SHAPES)
def test_a_call_has_one_form_whatever_it_came_in(shape):
    row = {
        "conversations": [
            {"from": "human", "value": "weather?"},
            CALL_SHAPES[shape],
            {"from": "observation", "value": "sunny"},
            {"from": "gpt", "value": "It is sunny."},
        ],
        "tools": json.dumps([{"name": "weather", "parameters": {"type": "object"}}]),
    }
    conversation = read(row)
    assert for_template(conversation) == [
        user("weather?"),
        {"role": "assistant", "content": None, "tool_calls": [CALLED]},
        {"role": "tool", "content": "sunny"},
        assistant("It is sunny."),
    ]
    [tool] = conversation.tools
    assert tool == {
        "type": "function",
        "function": {"name": "weather", "parameters": {"type": "object"}},
    }


def test_thinking_words_of_a_call_are_kept():
    thought = "<think>\nwhich {city}?\n</think>"
    value = f'{thought}\n\n{{"name": "f", "arguments": {{}}}}'
    row = {"conversations": [user("a"), {"from": "function_call", "value": value}]}
    [_, call] = for_template(read(row))
    assert call["content"] == thought
    assert call["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {}}}]


@pytest.mark.parametrize(
    ("tools", "rule"),
    [
        ("[", "tools: must be JSON where it is a string"),
        ({"name": "f"}, "tools: must be a non-empty list, got {'name': 'f'}"),
        (["f"], "tools[0]: must be a tool with a name, got 'f'"),
        ([{"parameters": {}}], "tools[0]: must have the key function, got parameters"),
        ([{"function": {}}], "tools[0].function: must have the key name, got no keys"),
    ],
)
def test_bad_tools_are_refused(tools, rule):
    assert rule in refusal({"prompt": "q", "completion": "a", "tools": tools})
