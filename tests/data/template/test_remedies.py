"""Remedies where a template cannot show a row as it came, and what is refused."""

import re

import numpy as np
import pytest
from support.data import families
from support.data.rows import CHATML, THINKING, make_tokenizer, targets, text

from merit_fast.data.config import DataConfig
from merit_fast.data.conversation import Conversation, Message
from merit_fast.data.template import ChatEncoder, check_stops, end_token_ids
from merit_fast.data.tree import expand
from merit_fast.errors import InputError

INSTRUCT = (  # as Mistral's: the system message stands in the last turn, if that is the user's
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = m.content %}"
    "{% elif m.role == 'user' %}[INST] "
    "{% if loop.last and ns.system %}{{ ns.system }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
DATED = CHATML.replace("{% for m", "Today is {{ strftime_now('%d %B %Y') }}. {% for m", 1)
SWITCHED = CHATML.replace(
    "assistant\n{% endif", "assistant\n{% if quiet %}<quiet>{% endif %}{% endif"
).replace(
    "{{ m.content }}", "{% if quiet and m.role == 'assistant' %}<quiet>{% endif %}{{ m.content }}"
)


def user(content):
    return Message("user", content)


def answer(content, in_loss=None, **fields):
    return Message("assistant", content, in_loss, fields)


def system(content):
    return Message("system", content)


def encode(tokenizer, *messages, tools=None, arguments=None, train_on="all", **data):
    conversation = Conversation("a:1", messages, tools, arguments or {})
    [encoded] = ChatEncoder(tokenizer, DataConfig(**data)).encode([conversation], train_on)
    return encoded


def shown(tokenizer, encoded):
    [example] = encoded.examples
    return text(tokenizer, example.input_ids)


TURNS = (user("1"), answer("one"), user("2"), answer("two"))
SYSTEMS = [
    (
        (system("Be brief."), *TURNS),
        "[INST] Be brief.\n\n1[/INST] one<|im_end|>[INST] 2[/INST] two",
    ),
    (
        (system("Be brief."), system("Be kind."), *TURNS),
        "[INST] Be brief.\n\nBe kind.\n\n1[/INST] one<|im_end|>[INST] 2[/INST] two",
    ),
    (
        (*TURNS[:2], system("Be kind."), *TURNS[2:]),
        "[INST] 1[/INST] one<|im_end|>[INST] Be kind.\n\n2[/INST] two",
    ),
    ((Message("developer", "Be brief."), *TURNS[:2]), "[INST] Be brief.\n\n1[/INST] one"),
    ((system(""), *TURNS[:2]), "[INST] 1[/INST] one"),
]


@pytest.mark.parametrize(("messages", "expected"), SYSTEMS)
def test_a_system_message_that_the_template_loses_is_put_before_the_next_question(
    messages, expected
):
    tokenizer = make_tokenizer(INSTRUCT)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[INST]", "[/INST]"]})
    if messages[0].role == "developer":  # else the template takes it for an answer
        tokenizer.chat_template = INSTRUCT.replace("{% else %}", "{% elif m.role != 'developer' %}")
    encoded = encode(tokenizer, *messages)
    assert not encoded.error
    assert shown(tokenizer, encoded) == f"{expected}<|im_end|>"
    assert encoded.outcomes == (() if messages[0].content == "" else ("folded",))


def test_a_system_message_without_a_question_behind_it_is_refused():
    encoded = encode(families.tokenizer("gemma"), *TURNS, system("Be kind."), answer("three"))
    assert "the chat template refuses this row" in str(encoded.error)


def test_the_day_is_that_of_the_configuration():
    tokenizer = make_tokenizer(DATED)
    for date, words in (("2024-07-26", "26 July 2024"), ("2025-01-02", "02 January 2025")):
        assert f"Today is {words}. " in shown(tokenizer, encode(tokenizer, *TURNS, date=date))
        encoder = ChatEncoder(tokenizer, DataConfig(date=date))
        assert encoder.notes() == [f"the chat template reads the date, which is {date} (data.date)"]
    assert ChatEncoder(make_tokenizer(), DataConfig()).notes() == []
    llama = families.tokenizer("llama3_2")
    assert "Today Date: 02 Jan 2025" in shown(llama, encode(llama, *TURNS, date="2025-01-02"))


def test_arguments_of_the_template():
    tokenizer = make_tokenizer(SWITCHED)
    encoded = encode(tokenizer, *TURNS, template_arguments={"quiet": True})
    assert targets(tokenizer, encoded.examples[0]) == ["one<|im_end|>", "two<|im_end|>"]
    assert "assistant\n<quiet>one" in shown(tokenizer, encoded)
    own = encode(tokenizer, *TURNS, arguments={"quiet": False}, template_arguments={"quiet": True})
    assert "<quiet>" not in shown(tokenizer, own)
    unread = encode(tokenizer, *TURNS, arguments={"loud": 1})
    assert str(unread.error) == (
        "a:1: template arguments: must be arguments that the chat template reads (quiet), got loud"
    )
    assert not encode(tokenizer, *TURNS, arguments={"loud": 1}, ignore_columns=("loud",)).error
    assert not encode(tokenizer, *TURNS, arguments={"parallel_tool_calls": False}).error
    with pytest.raises(InputError, match=r"^data.template_arguments: must be .* \(quiet\), got x$"):
        ChatEncoder(tokenizer, DataConfig(template_arguments={"x": 1}))


def test_thinking_that_is_switched_off_is_a_part_of_the_prompt():
    tokenizer = families.tokenizer("qwen3")
    encoded = encode(tokenizer, *TURNS[:2], template_arguments={"enable_thinking": False})
    assert targets(tokenizer, encoded.examples[0]) == ["one<|im_end|>"]


CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
OTHER = {"id": "2", "type": "function", "function": {"name": "add", "arguments": {"x": 2}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {}}}
UNREAD = [  # family, messages, tools, the key that the error names
    (None, (user("1"), answer("one", reasoning_content="because")), None, "reasoning_content"),
    (None, (user("1"), answer("one", thinking="because")), None, "reasoning"),
    (None, (user("1"), answer("ok", tool_calls=[CALL])), None, "tool_calls"),
    (None, (user("1"), answer("one")), (TOOL,), "tools"),
    (None, (Message("user", "1", fields={"name": "ann"}), answer("one")), None, "name"),
    (None, (user("1"), answer("one", refusal="no")), None, "refusal"),
    ("phi3", (user("1"), Message("tool", "4"), answer("one")), None, "content"),
    ("gptoss", (user("1"), answer(None, tool_calls=[CALL, OTHER])), None, "tool_calls"),
]


@pytest.mark.parametrize(("family", "messages", "tools", "key"), UNREAD)
def test_what_leaves_no_trace_is_refused_by_name(family, messages, tools, key):
    tokenizer = families.tokenizer(family) if family else make_tokenizer()
    encoded = encode(tokenizer, *messages, tools=tools)
    assert re.match(rf"a:1: .*{key}.* leaves? (it )?out", str(encoded.error)), encoded.error
    if key not in ("content", "reasoning_content", "reasoning") and family is None:
        assert not encode(tokenizer, *messages, tools=tools, ignore_columns=(key,)).error


def test_ignored_reasoning_may_be_left_out():
    messages = (user("1"), answer("one", reasoning_content="because"))
    encoded = encode(make_tokenizer(), *messages, ignore_columns=("reasoning_content",))
    assert targets(make_tokenizer(), encoded.examples[0]) == ["one<|im_end|>"]


def test_roles_in_the_loss():
    tokenizer = make_tokenizer()
    encoded = encode(tokenizer, system("s"), *TURNS, train_on=("user", "assistant"))
    runs = targets(tokenizer, encoded.examples[0])
    assert runs == ["1<|im_end|>", "one<|im_end|>", "2<|im_end|>", "two<|im_end|>"]
    marked = encode(tokenizer, user("1"), answer("one", False), user("2"), answer("two"))
    assert targets(tokenizer, marked.examples[0]) == ["two<|im_end|>"]
    nothing = encode(tokenizer, user("1"), answer("one", False))
    assert str(nothing.error) == "a:1: must have an answer of the assistant, found none"


def test_ten_turns_of_a_template_that_rewrites_history_cost_half_a_text_more():
    words = ["the", "capital", "of", "France", "is", "Paris", "and", "this", "is", "an", "answer"]
    turns = [
        m
        for i in range(10)
        for m in (user(" ".join([*words, str(i)] * 5)), answer(" ".join([str(i), *words] * 5)))
    ]
    for family in ("qwen3", "phi3", "gptoss", "deepseek_r1_distill", "llama3", "glm4moe"):
        encoded = encode(families.tokenizer(family), *turns, max_length=100_000)
        [example] = encoded.examples
        longest = max(len(one.input_ids) for one in expand(example))
        assert len(example.input_ids) <= 1.5 * longest
        assert ("rewritten" in encoded.outcomes) == (example.tree is not None)


@pytest.mark.parametrize("policy", ["truncate", "drop", "error"])
def test_lengths_count_for_each_text_and_for_the_tree(policy):
    tokenizer = make_tokenizer(THINKING)
    whole = encode(tokenizer, *TURNS, max_length=100)
    [tree] = whole.examples
    longest = max(len(one.input_ids) for one in expand(tree))
    apart = encode(tokenizer, *TURNS, max_length=longest, too_long=policy)
    assert longest < len(tree.input_ids) and len(apart.examples) == 2
    assert all(len(one.input_ids) <= longest for one in apart.examples)
    cut = encode(tokenizer, *TURNS, max_length=longest - 1, too_long=policy)
    if policy == "error":
        rule = f"must have at most data.max_length = {longest - 1} tokens, got {longest}"
        assert str(cut.error) == f"a:1: {rule}"
    elif policy == "drop":
        assert (cut.examples, cut.outcomes) == ((), ("rewritten", "dropped"))
    else:
        assert cut.outcomes == ("rewritten", "truncated")
        kept = [one for example in cut.examples for one in expand(example)]
        assert targets(tokenizer, kept[1])[0] == "<think>\n\n</think>\n\ntwo"


ENDS = {
    "llama3": ["<|eot_id|>"],
    "glm4moe": ["<|user|>", "<|observation|>"],
    "gptoss": ["<|return|>", "<|call|>"],
    "phi3": ["<|end|>"],
    "qwen3": ["<|im_end|>"],
}


@pytest.mark.parametrize("family", ENDS)
def test_end_tokens_are_those_that_answers_end_in(family):
    tokenizer = families.tokenizer(family)
    ids = end_token_ids(tokenizer, DataConfig())
    assert tokenizer.convert_ids_to_tokens(ids) == ENDS[family]
    encoded = encode(tokenizer, *TURNS)
    assert check_stops(tokenizer, ids, encoded.examples, 2048) == ids[:1]
    with pytest.raises(InputError, match="^every answer must end in a token at which the model"):
        check_stops(tokenizer, (0,), encoded.examples, 2048)
    single = encode(tokenizer, *TURNS[:2]).examples[0]
    limit = len(single.input_ids) - 1
    cut = encode(tokenizer, *TURNS[:2], max_length=limit)
    assert check_stops(tokenizer, ids, cut.examples, limit) == ()


def test_rows_of_one_call_do_not_touch_each_other():
    tokenizer = make_tokenizer()
    rows = [TURNS, (user("x"), answer("\ud800")), (user("naïve"), answer("日本"))]
    conversations = [Conversation(f"a:{i}", row) for i, row in enumerate(rows)]
    encoded = ChatEncoder(tokenizer, DataConfig()).encode(conversations, "all")
    assert str(encoded[1].error).startswith("a:1: must be valid Unicode")
    for i in (0, 2):
        [example] = encode(tokenizer, *rows[i]).examples
        assert np.array_equal(example.input_ids, encoded[i].examples[0].input_ids)
        assert np.array_equal(example.labels, encoded[i].examples[0].labels)


@pytest.mark.parametrize("reasoning", [{}, {"reasoning_content": "So."}], ids=["bare", "reasoned"])
def test_an_answer_stands_behind_the_reasoning_of_the_calls_before_it(reasoning):
    """gpt-oss drops that reasoning once the answer is there; the model sees it as it answers."""
    tokenizer = families.tokenizer("gptoss")
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        user("1?"),
        answer(None, tool_calls=[call], reasoning_content="I add."),
        Message("tool", "2"),
        answer("Two.", **reasoning),
    ]
    tools = ({"type": "function", "function": {"name": "add", "description": "Adds."}},)
    encoded = encode(tokenizer, *messages, tools=tools)
    asked = [message.for_template() for message in messages[:3]]
    asked[1]["thinking"] = "I add."
    prompt = tokenizer.apply_chat_template(
        asked, tools=list(tools), add_generation_prompt=True, tokenize=False
    )
    prompt = re.sub(r"Current date: [\d-]+", "Current date: 2024-07-26", prompt)
    assert "I add." in prompt
    thought = "<|channel|>analysis<|message|>So.<|end|><|start|>assistant" if reasoning else ""
    last = f"{thought}<|channel|>final<|message|>Two.<|return|>"
    assert shown(tokenizer, encoded) == prompt + last
    called, answered = targets(tokenizer, encoded.examples[0])
    assert called.startswith("<|channel|>analysis<|message|>I add.") and called.endswith("<|call|>")
    assert answered == last


def test_empty_keys_of_messages_hold_nothing_that_could_be_lost():
    asked = Message("user", "1", fields={"name": "", "annotations": []})
    answered = answer("one", refusal="", tool_calls=[])
    empty = encode(make_tokenizer(), asked, answered)
    plain = encode(make_tokenizer(), user("1"), answer("one"))
    assert np.array_equal(empty.examples[0].labels, plain.examples[0].labels)
    lost = encode(make_tokenizer(), Message("user", "1", fields={"name": "bob"}), answer("one"))
    assert "messages[0].name: must be read by the chat template" in str(lost.error)
