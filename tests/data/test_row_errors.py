"""Errors in rows name file and line, rule and value."""

import json

import pytest
from support.data.rows import (
    FORMATS,
    GOOD,
    assistant,
    fails,
    make_tokenizer,
    user,
)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


ROW_ERRORS = {
    "json": (
        '{"prompt": "a"\n',
        "bad.jsonl:1: must be one JSON object: Expecting ',' delimiter at column 15",
    ),
    "json_later": (json.dumps(GOOD) + "\n\n{]", "bad.jsonl:3: must be one JSON object: "),
    "array_item": (
        f"[\n{json.dumps(GOOD)},\n3]",
        "bad.jsonl: row 2: must be a JSON object {...}, got int",
    ),
    "array_cut": ("[\n", "bad.jsonl: row 1: must be valid JSON: Expecting value in line 2"),
    "not_object": ("[1, 2]", "bad.jsonl: row 1: must be a JSON object {...}, got int"),
    "not_object_later": (
        json.dumps(GOOD) + "\n[1, 2]",
        "bad.jsonl:2: must be a JSON object {...}, got list",
    ),
    "nesting": ("[" * 100_000, "bad.jsonl: row 1: must be valid JSON: "),
    "nesting_in_row": ('{"a":' + "[" * 100_000, "bad.jsonl:1: must be one JSON object: "),
    "utf8": (
        b'{"prompt": "\xff"}',
        "bad.jsonl:1: must be UTF-8 text, got byte 0xff at byte 13 of the line",
    ),
    "utf16": (
        '{"a": 1}'.encode("utf-16"),
        "bad.jsonl:1: must be UTF-8 text, got byte 0xff at byte 1",
    ),
    "surrogate": (json.dumps({**GOOD, "prompt": "\ud800"}), "bad.jsonl:1: must be valid Unicode"),
    "empty": ("\n \n", "bad.jsonl: dataset d: must have at least one row, found none"),
    "columns": (
        [{"frage": "a", "answer": "b"}],
        "bad.jsonl:1: unknown columns: must have one of "
        "(messages; conversations; instruction, output; prompt, completion), "
        "got frage, answer",
    ),
    "no_columns": ([{}], "bad.jsonl:1: unknown columns: "),
    "other_kind": (
        [GOOD, FORMATS["alpaca"]],
        "bad.jsonl:2: must be of the kind of the rows before it "
        "(prompt and completion: prompt, completion), got instruction, output",
    ),
    "role": (
        [{"messages": [{"role": "bot", "content": "a"}]}],
        "bad.jsonl:1: messages[0].role: must be one of system, developer, user, human, assistant, "
        "gpt, tool, function, observation, function_call, or listed under the entry's roles, "
        "got 'bot'",
    ),
    "from": (
        [{"conversations": [{"from": "bing", "value": "a"}]}],
        "bad.jsonl:1: conversations[0].from: must be one of system, developer, user, human, ",
    ),
    "no_messages": ([{"messages": []}], "bad.jsonl:1: messages: must be a non-empty list, got []"),
    "no_content": (
        [{"messages": [{"role": "user"}]}],
        "bad.jsonl:1: messages[0]: must have the key content, got role",
    ),
    "message": (
        [{"messages": ["Hi"]}],
        "bad.jsonl:1: messages[0]: must be an object with the key role, got 'Hi'",
    ),
    "image": (
        [{"messages": [user([{"type": "video", "url": "x"}])]}],
        "bad.jsonl:1: messages[0].content[0].type: must be text, image or image_url, got 'video'",
    ),
    "calls": (
        [
            {
                "messages": [
                    user("a"),
                    {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]},
                ]
            }
        ],
        "bad.jsonl:1: messages[1].tool_calls[0].function: must have the key name, got no keys",
    ),
    "null": (
        [{"prompt": "a", "completion": None}],
        "bad.jsonl:1: completion: must be a string or a list of messages",
    ),
    "number": ([{"instruction": "a", "output": 3}], "bad.jsonl:1: output: must be a string, got 3"),
    "history": (
        [{**FORMATS["alpaca"], "history": [["a"]]}],
        "bad.jsonl:1: history[0]: must be a pair",
    ),
    "no_answer": (
        [{"messages": [user("a")]}],
        "bad.jsonl:1: must have an answer of the assistant, found none",
    ),
    "answer_first": (
        [{"messages": [assistant("a")]}],
        "bad.jsonl:1: must have an answer of the assistant behind a turn of the user, found none",
    ),
}


@pytest.mark.parametrize("name", ROW_ERRORS)
def test_row_errors_name_file_and_line(tmp_path, tokenizer, name):
    rows, message = ROW_ERRORS[name]
    assert message in fails(tmp_path, tokenizer, rows)
