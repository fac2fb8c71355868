"""Columns: what nothing reads is refused, other names are mapped, rows may leave themselves out."""

import json

import pytest
from support.data.one_row import read, refusal
from support.data.rows import assistant, user

from merit_fast.data import DataConfig, DatasetConfig
from merit_fast.data.rows.reader import LeftOutRow, RowReader
from merit_fast.errors import InputError


def make_reader(data=None, **keys):
    return RowReader(DatasetConfig("d", "x", **keys), data or DataConfig())


def turns(row, data=None, **keys):
    conversation = read(row, data, **keys)
    return [(message.role, message.content) for message in conversation.messages]


QA = [("user", "q"), ("assistant", "a")]
CROSSINGS = {
    "gsm8k": {"question": "q", "answer": "a"},
    "input and output": {"input": "q", "output": "a"},
    "conversation": {"conversation": [user("q"), assistant("a")], "conversation_id": "7"},
    "flan": {"inputs": "q", "targets": "a"},
    "metamath": {"query": "q", "response": "a"},
    "orca": {"id": "niv.1", "question": "q", "response": "a", "system_prompt": ""},
    "dolly": {"instruction": "q", "context": "", "response": "a"},
    "empty input": {"instruction": "", "input": "q", "output": "a"},
    "messages as text": {"messages": json.dumps([user("q"), assistant("a")])},
    "one message": {"prompt": [user("q")], "completion": assistant("a")},
    "llava text row": {"id": "0", "image": None, "conversations": [user("q"), assistant("a")]},
}


@pytest.mark.parametrize("name", CROSSINGS)
def test_obvious_crossings_are_read(name):
    assert turns(CROSSINGS[name]) == QA


def test_dolly_and_alpaca_agree():
    dolly = {"instruction": "Sum", "context": "1 2", "response": "3", "category": "math"}
    alpaca = {"instruction": "Sum", "input": "1 2", "output": "3"}
    assert turns(dolly, DataConfig(ignore_columns=("category",))) == turns(alpaca)
    assert turns(alpaca) == [("user", "Sum\n1 2"), ("assistant", "3")]


BASES = {
    "messages": {"messages": [user("q"), assistant("a")]},
    "sharegpt": {"conversations": [user("q"), assistant("a")]},
    "alpaca": {"instruction": "q", "output": "a"},
    "prompt": {"prompt": "q", "completion": "a"},
}
UNREAD = {
    "category": "x",
    "score": 0.5,
    "text": "q a",
    "documents": ["x"],
    "metadata": {"a": 1},
    "id": {"a": 1},
    "source": "two\nlines",
    "source_id": "x" * 201,
    "image_id": 7,
    "videos": ["a.mp4"],
    "audio": "a.wav",
    "chosen": "a",
    "rejected": "a",
    "label": False,
    "keep_if": True,
}


@pytest.mark.parametrize("column", UNREAD)
@pytest.mark.parametrize("shape", BASES)
def test_what_nothing_reads_names_column_and_dataset(shape, column):
    reader = make_reader()
    reader.read(BASES[shape], "here:1")
    with pytest.raises(InputError) as caught:
        reader.read({**BASES[shape], column: UNREAD[column]}, "here:2")
    assert str(caught.value).startswith(
        f"here:2: column {column} of dataset d: must be named under columns or listed in "
        "data.ignore_columns, as nothing reads it, got "
    )
    listed = DataConfig(ignore_columns=(column,))
    assert turns({**BASES[shape], column: UNREAD[column]}, listed) == QA
    for empty in (None, "", [], {}):
        assert turns({**BASES[shape], column: empty}) == QA


def test_names_of_rows_are_noted():
    reader = make_reader()
    names = {"id": 7, "prompt_id": "b", "Source": "web", "idx": 0.0, "uuid": "c"}
    reader.read({"prompt": "q", "completion": "a", **names}, "here")
    assert reader.notes() == ["columns not used: Source, id, idx, prompt_id, uuid"]


def test_listing_a_column_forbids_nobody_to_read_it():
    data = DataConfig(ignore_columns=("prompt", "system"))
    row = {"prompt": "q", "completion": "a", "system": "s"}
    assert turns(row, data) == [("system", "s"), *QA]
    assert turns({"prompt": "q", "messages": [user("q"), assistant("a")]}, data) == QA


PREFERENCE = {"prompt": "q", "chosen": "a", "rejected": "b"}
WHOLE = {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}
REJECTED = DataConfig(ignore_columns=("rejected",))


def test_preferences_are_refused_or_read_as_asked():
    for row in (PREFERENCE, WHOLE, {"conversations": [user("q")], "chosen": assistant("a")}):
        assert "columns: {completion: chosen}" in refusal(row)
    columns = {"prompt": "prompt", "completion": "chosen"}
    assert "column rejected of dataset d" in refusal(PREFERENCE, columns=columns)
    assert turns(PREFERENCE, REJECTED, columns=columns) == QA
    listed = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    assert turns(listed, REJECTED, columns=columns) == QA
    assert turns(WHOLE, REJECTED, columns={"messages": "chosen"}) == QA
    ranked = {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
    }
    columns = {"prompt": "conversations", "completion": "chosen"}
    assert turns(ranked, REJECTED, columns=columns) == QA


def test_a_completion_that_repeats_its_prompt_is_refused():
    row = {"prompt": "q", **WHOLE}
    message = refusal(row, REJECTED, columns={"prompt": "prompt", "completion": "chosen"})
    assert "chosen: must begin behind the prompt" in message
    assert "columns: {messages: NAME}" in message


def test_rows_of_a_label_are_refused_or_left_out_as_asked():
    rows = [{"prompt": "q", "completion": "a", "label": label} for label in (True, False, True)]
    assert "columns: {keep_if: label}" in refusal(rows[0])
    reader = make_reader(columns={"keep_if": "label"})
    kept = 0
    for row in rows:
        try:
            reader.read(row, "here")
            kept += 1
        except LeftOutRow as error:
            assert str(error) == "here: label: must be true, got False"
    assert kept == 2 and reader.notes() == ["1 row left out, as label is false"]
    tagged = {**BASES["messages"], "kto_tag": 1}
    assert "columns: {keep_if: kto_tag}" in refusal(tagged)
    message = refusal(tagged, columns={"keep_if": "kto_tag"})
    assert message == "here: kto_tag: must be true or false, as columns: keep_if reads it, got 1"
    assert turns({**BASES["prompt"], "label": "positive"}, DataConfig(ignore_columns=("label",)))


def test_a_text_without_an_answer_is_refused():
    message = refusal({"text": "### Q: 1\n### A: 2"})
    assert message.startswith("here: unknown columns: must have one of (messages; ")
    assert "got text (a text without an answer of its own has nothing to train on" in message


MAPPED = {
    "strings": ({"problem": "q", "solution": "a"}, {"prompt": "problem", "completion": "solution"}),
    "of two formats, the mapped one": (
        {**BASES["messages"], "problem": "q", "solution": "a"},
        {"prompt": "problem", "completion": "solution"},
    ),
    "one of two": ({"problem": "q", "completion": "a"}, {"prompt": "problem"}),
    "alpaca": ({"task": "q", "result": "a"}, {"instruction": "task", "output": "result"}),
    "swapped": ({"output": "q", "input": "a"}, {"prompt": "output", "completion": "input"}),
    "turns": (
        {"dialog": [{"who": "user", "says": "q"}, {"who": "assistant", "says": "a"}]},
        {"messages": "dialog", "role": "who", "content": "says"},
    ),
    "a column and a key of one name": (
        {"text": [{"role": "user", "text": "q"}, {"role": "assistant", "text": "a"}]},
        {"messages": "text", "content": "text"},
    ),
    "keys of a turn that only some have": (
        {"messages": [user("q"), {**assistant("a"), "thoughts": None, "loss": True}]},
        {"reasoning_content": "thoughts", "train": "loss"},
    ),
}


@pytest.mark.parametrize("name", MAPPED)
def test_columns_map_other_names(name):
    row, columns = MAPPED[name]
    data = DataConfig(ignore_columns=("messages",))
    assert turns(row, data, columns=columns) == QA


def test_mapped_turn_keys_reach_message_and_mark():
    messages = [user("q"), {**assistant("a"), "thoughts": "why", "loss": False}, assistant("b")]
    columns = {"reasoning_content": "thoughts", "train": "loss"}
    conversation = make_reader(columns=columns).read({"messages": messages}, "here")
    answer = conversation.messages[1]
    assert dict(answer.fields) == {"reasoning_content": "why"} and answer.in_loss is False


def test_an_empty_name_reads_no_column():
    row = {"instruction": "q", "input": "more", "output": "a"}
    assert turns(row, columns={"input": ""}) == QA
    assert turns({**row, "system": "s"}, columns={"input": "", "system": ""}) == QA
    thinking = {"messages": [user("q"), {**assistant("a"), "reasoning_content": "why"}]}
    conversation = make_reader(columns={"reasoning_content": ""}).read(thinking, "here")
    assert not conversation.messages[1].fields


def test_a_mapped_column_shadows_the_usual_one():
    row = {"prompt": "old", "question": "q", "completion": "a"}
    columns = {"prompt": "question"}
    assert "column prompt of dataset d" in refusal(row, columns=columns)
    assert turns(row, DataConfig(ignore_columns=("prompt",)), columns=columns) == QA
    turn = {"messages": [{"role": "user", "text": "q"}, {**assistant("a"), "text": "b"}]}
    message = refusal(turn, columns={"content": "text"})
    assert "messages[1].content: must be absent, as columns reads text in its place" in message


def test_mapped_columns_that_no_row_has():
    message = refusal(BASES["prompt"], columns={"prompt": "problem"})
    assert message.startswith("here: unknown columns: must have one of (problem, completion)")
    reader = make_reader(columns={"images": "picture", "system": "sys"})
    reader.read({**BASES["prompt"]}, "here")
    assert reader.notes() == ["columns that no row has: picture, sys"]
    reader.read({**BASES["prompt"], "sys": "s", "picture": None}, "here")
    assert reader.notes() == []


ENTRIES = {
    "unknown name": ({"columns": {"promt": "a"}}, "columns: must name columns among "),
    "two formats": (
        {"columns": {"prompt": "a", "output": "b"}},
        "columns: must name columns of one format, got output, prompt",
    ),
    "one column twice": (
        {"columns": {"prompt": "a", "completion": "a"}},
        "columns: must read each column once, got 'a' 2 times",
    ),
    "media": ({"columns": {"videos": "clip"}}, "columns: must name columns among "),
    "misspelt role": (
        {"roles": {"asistant": ("bot",)}},
        "roles: must name roles such as assistant, got 'asistant'",
    ),
    "word of two roles": (
        {"roles": {"user": ("x",), "assistant": ("x",)}},
        "roles: must give each word one role, got 'x' for user and assistant",
    ),
    "train_on": (
        {"train_on": ("assistant", "usr")},
        "train_on: must be all, last or roles among assistant, function_call, system, tool, user, "
        "got 'usr'",
    ),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_entries_that_no_row_can_meet_are_refused_at_once(name):
    keys, rule = ENTRIES[name]
    with pytest.raises(InputError) as caught:
        make_reader(**keys)
    assert str(caught.value).startswith(f"mixture: d: {rule}")


def test_roles_add_words():
    chat = [
        {"role": "customer", "content": "q"},
        {"role": "bot", "content": "a"},
        {"role": "critic", "content": "no"},
        {"role": "gpt", "content": "b"},
    ]
    roles = {"user": ("customer",), "assistant": ("bot",), "critic": ("critic",)}
    read = turns({"messages": chat}, roles=roles)
    assert read == [*QA, ("critic", "no"), ("assistant", "b")]
    assert "messages[0].role: must be one of" in refusal({"messages": chat})
    swapped = {"user": ("gpt",), "assistant": ("human",)}
    row = {"conversations": [{"from": "gpt", "value": "q"}, {"from": "human", "value": "a"}]}
    assert turns(row, roles=swapped) == QA


def test_rows_of_two_formats_are_refused():
    reader = make_reader()
    reader.read(BASES["prompt"], "here:1")
    for row in (BASES["alpaca"], BASES["messages"]):
        with pytest.raises(InputError, match="here:2: must be of the kind of the rows before it"):
            reader.read(row, "here:2")
