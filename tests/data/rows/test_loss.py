"""Messages in the loss: the rule of the mixture, and the marks of a row, which win."""

import pytest
from support.data.rows import assistant, user

from merit_fast.data import DataConfig, DatasetConfig
from merit_fast.data.rows.loss import messages_in_loss, train_on_of
from merit_fast.data.rows.reader import RowReader
from merit_fast.errors import InputError

CHAT = [
    {"role": "system", "content": "s"},
    user("q"),
    assistant("a"),
    {"role": "tool", "content": "t"},
    assistant("b"),
    user("end"),
]


def in_loss(row, train_on="all", own=None):
    config = DatasetConfig("d", "x", train_on=own)
    data = DataConfig(train_on=train_on)
    conversation = RowReader(config, data).read(row, "here")
    chosen = messages_in_loss(conversation, train_on_of(config, data))
    assert len(chosen) == len(conversation.messages)
    return [
        m.content for m, is_chosen in zip(conversation.messages, chosen, strict=True) if is_chosen
    ]


def marked(**marks):
    """The chat with marks: content -> keys of that message."""
    return {"messages": [{**message, **marks.get(message["content"], {})} for message in CHAT]}


RULES = {
    "all": ("all", {}, ["a", "b"]),
    "last": ("last", {}, ["b"]),
    "roles": (("user", "tool"), {}, ["q", "t", "end"]),
    "one role": (("assistant",), {}, ["a", "b"]),
    "weight 0": ("all", {"a": {"weight": 0}}, ["b"]),
    "weight 0.0, as Arrow widens it": ("all", {"a": {"weight": 0.0}, "b": {"weight": 1.0}}, ["b"]),
    "train false": ("all", {"b": {"train": False}}, ["a"]),
    "a mark wins over last": ("last", {"a": {"train": True}}, ["a", "b"]),
    "the last answer itself may be out": ("last", {"a": {"weight": 1}, "b": {"weight": 0}}, ["a"]),
    "a mark on a question": ("all", {"q": {"train": True}}, ["q", "a", "b"]),
    "a mark against the roles": (("user",), {"q": {"train": False}}, ["end"]),
    "null is no mark": ("all", {"a": {"train": None, "weight": None}}, ["a", "b"]),
}


@pytest.mark.parametrize("name", RULES)
def test_rules_and_marks(name):
    train_on, marks, expected = RULES[name]
    assert in_loss(marked(**marks), train_on) == expected


def test_an_entry_has_its_own_rule():
    assert in_loss(marked(), "all", own="last") == ["b"]
    assert in_loss(marked(), "last", own=("tool",)) == ["t"]


def test_a_call_of_a_tool_is_an_answer():
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}
    row = {"conversations": [user("q"), call, {"from": "observation", "value": "1"}]}
    assert in_loss(row) == [None]


def test_earlier_answers_of_a_prompt_are_history():
    prompt = [user("q"), assistant("a"), user("r")]
    row = {"prompt": prompt, "completion": [assistant("b"), user("s"), assistant("c")]}
    assert in_loss(row) == ["b", "c"]
    row["prompt"] = [user("q"), {**assistant("a"), "train": True}, user("r")]
    assert in_loss(row) == ["a", "b", "c"]
    assert in_loss(row, ("user",)) == ["q", "a", "r", "s"]


def test_pairs_of_a_history_are_trained():
    row = {"instruction": "q", "output": "b", "history": [["x", "a"]]}
    assert in_loss(row) == ["a", "b"]
    assert in_loss(row, "last") == ["b"]


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        ({"messages": [user("q")]}, "must have an answer of the assistant, found none"),
        (
            marked(a={"weight": 0}, b={"train": False}),
            "must have a message in the loss, by train_on or its own mark, found none",
        ),
    ],
)
def test_a_row_without_a_message_in_the_loss_is_bad(row, rule):
    with pytest.raises(InputError, match=f"here: {rule}"):
        in_loss(row)
