"""Masks of real chat templates, against the marks of trl's training templates and the prompts."""

import functools
import re

import numpy as np
import pytest
from support.data import families

from merit_fast.data.config import DataConfig
from merit_fast.data.conversation import Conversation, Message
from merit_fast.data.template import ChatEncoder
from merit_fast.data.tree import expand

FAMILIES = [
    "cohere",
    "cohere2",
    "deepseek_r1_distill",
    "deepseekv3",
    "gemma",
    "gemma3",
    "glm4moe",
    "gptoss",
    "lfm2_v2",
    "llama3",
    "muse_glimmer",
    "nemotron_3_nano",
    "phi3",
    "phi3_5",
    "qwen2_5",
    "qwen2_5_vl",
    "qwen3",
    "qwen3_5_think",
    "qwen3_instruct_2507",
    "smolvlm",
]
CALL = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "add", "arguments": {"numbers": [1, 3]}},
}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds numbers.",
        "parameters": {
            "type": "object",
            "properties": {"numbers": {"type": "array", "description": "what to add"}},
            "required": ["numbers"],
        },
    },
}


def user(text):
    return Message("user", text)


def answer(text, in_loss=None, **fields):
    return Message("assistant", text, in_loss, fields)


TURNS = [user("One and three?"), answer("Four."), user("And five?"), answer("Nine.")]
SHAPES = {  # messages, the words of each trained answer, and what is trained
    "single": (TURNS[:2], ["Four."], "all"),
    "multi": (TURNS, ["Four.", "Nine."], "all"),
    "system": ([Message("system", "Be brief."), *TURNS], ["Four.", "Nine."], "all"),
    "tools": (
        [
            user("One and three?"),
            answer(None, tool_calls=[CALL]),
            Message("tool", "4", fields={"name": "add", "tool_call_id": "call00001"}),
            answer("Four."),
        ],
        ["add", "Four."],
        "all",
    ),
    "reasoning": (
        [user("One and three?"), answer("Four.", reasoning_content="Add them.")],
        ["Add them. Four."],
        "all",
    ),
    "assistant_first": ([answer("Hello."), *TURNS], ["Four.", "Nine."], "all"),
    "empty_system": ([Message("system", ""), *TURNS[:2]], ["Four."], "all"),
    "weight_0": ([user("One?"), answer("Two.", False), *TURNS[2:]], ["Nine."], "all"),
    "unicode": (
        [user("naïve 🦜🏽 日本語  "), answer("  Straße\u00a0👍🏽\n\n  end 中 ")],
        ["Straße\u00a0👍🏽\n\n  end 中"],
        "all",
    ),
    "last_only": (TURNS, ["Nine."], "last"),
}
NO_TOOLS = {"cohere", "cohere2", "gemma", "gemma3", "llama3", "phi3", "phi3_5", "qwen2_5_vl"}
NO_REASONING = {*NO_TOOLS, "lfm2_v2", "qwen2_5", "qwen3_instruct_2507", "smolvlm"}
REFUSED = {
    "tools": {*NO_TOOLS, "smolvlm"},
    "reasoning": NO_REASONING,
    "assistant_first": {"cohere", "cohere2", "gemma", "gemma3"},
}
REASONS_FIRST = ("deepseek_r1_distill", "deepseekv3")  # the prompt ends in <think>
OPENS_REASONING = ("nemotron_3_nano", "qwen3_5_think")  # likewise, and history shows reasoning
FOLDED = {("gemma", "system"), ("gemma", "empty_system")}


@functools.cache
def encoder(family):
    return ChatEncoder(families.tokenizer(family), DataConfig())


def encode(family, shape):
    messages, _, train_on = SHAPES[shape]
    tools = (TOOL,) if shape == "tools" else None
    [encoded] = encoder(family).encode([Conversation("a:1", tuple(messages), tools)], train_on)
    return encoded


def runs(tokenizer, ids, mask):
    """The runs of trained tokens, decoded."""
    edges = np.flatnonzero(np.diff(np.array(mask, int), prepend=0, append=0))
    pieces = zip(edges[::2], edges[1::2], strict=True)
    return [
        tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False)
        for start, end in pieces
    ]


def given(shape, parts=False):
    """The messages as transformers takes them."""
    messages = []
    for message in SHAPES[shape][0]:
        plain = message.for_template()
        if parts:
            plain["content"] = [{"type": "text", "text": plain["content"]}]
        messages.append({key: value for key, value in plain.items() if value is not None})
    return messages


CASES = [
    (family, shape)
    for family in FAMILIES
    for shape in SHAPES
    if family not in REFUSED.get(shape, ())
]
NO_REFERENCE = {  # transformers drops the empty content that the template asks for; trl's reasoning
    ("deepseek_r1_distill", "tools"),
    ("deepseekv3", "tools"),
    ("deepseekv3", "reasoning"),
}


@pytest.mark.parametrize(("family", "shape"), CASES)
def test_an_answer_is_trained_behind_the_prompt_that_the_model_sees(family, shape):
    tokenizer = families.tokenizer(family)
    encoded = encode(family, shape)
    assert not encoded.error
    found = []
    texts = [text for example in encoded.examples for text in expand(example)]
    for text in texts:
        mask = text.labels != -100
        assert np.array_equal(text.labels[mask], text.input_ids[mask])
        found += runs(tokenizer, text.input_ids, mask)
    wanted = SHAPES[shape][1]
    assert len(found) == len(wanted)
    for run, words in zip(found, wanted, strict=True):
        assert all(word in run for word in words.split(" ")), run
        ends = tuple(token for token in tokenizer.all_special_tokens if run.endswith(token))
        assert ends or run.endswith(("<|user|>", "<｜tool▁call▁end｜>")), run  # it stops
    if (family, shape) in FOLDED or family in REASONS_FIRST:
        return  # transformers cannot render what the remedies render
    last = len(SHAPES[shape][0]) - 1
    prompt = tokenizer.apply_chat_template(
        given(shape, family == "smolvlm")[:last],
        tools=[TOOL] if shape == "tools" else None,
        add_generation_prompt=True,
        tokenize=False,
    )
    shown = tokenizer.decode(texts[-1].input_ids, clean_up_tokenization_spaces=False)
    if "Current date" in prompt:
        prompt = re.sub(r"Current date: [\d-]+", "Current date: 2024-07-26", prompt)
    assert shown.startswith(prompt)
    assert shown[len(prompt) :] == found[-1]


@pytest.mark.parametrize(("family", "shape"), [case for case in CASES if case not in NO_REFERENCE])
def test_masks_are_those_of_the_training_template(family, shape):
    tokenizer = families.tokenizer(family)
    messages = given(shape, family == "smolvlm")
    if (family, shape) in FOLDED:
        words = messages[0]["content"]
        messages = messages[1:]
        if words:
            messages[0]["content"] = f"{words}\n\n{messages[0]['content']}"
    if shape == "reasoning" and family in REASONS_FIRST:  # reads reasoning in the content only
        reasoning = messages[1].pop("reasoning_content")
        messages[1]["content"] = f"<think>\n{reasoning}\n</think>\n\n{messages[1]['content']}"
    reference = tokenizer.apply_chat_template(
        messages,
        tools=[TOOL] if shape == "tools" else None,
        chat_template=families.template(f"{family}_training"),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    marked = runs(tokenizer, reference["input_ids"], reference["assistant_masks"])
    marked = [_without_known_differences(family, run) for run in marked]
    if shape == "assistant_first":
        marked = marked[1:]
    if shape in ("weight_0", "last_only"):
        marked = marked[-1:]
    if family == "gptoss":  # history ends answers in another way than the model does
        marked = [re.sub(r"<\|end\|>$", "<|return|>", run) for run in marked]
    encoded = encode(family, shape)
    texts = [text for example in encoded.examples for text in expand(example)]
    ours = [r for text in texts for r in runs(tokenizer, text.input_ids, text.labels != -100)]
    if family in REASONS_FIRST or family in OPENS_REASONING:
        ours = [run.removeprefix("\n</think>\n\n") for run in ours]
    assert ours == marked


def _without_known_differences(family, run):
    """The marked text without white space behind the end, and without the header of the turn.

    Where the prompt opens the reasoning, the opening is not trained: the model sees it. Phi's last
    turn ends in <|endoftext|>, which its history does not have.
    """
    run = re.sub(r"\s*<\|endoftext\|>$", "", run).rstrip()
    headers = {"gptoss": "<|start|>assistant", "muse_glimmer": "<|start|>assistant"}
    headers |= {name: "<｜Assistant｜>" for name in REASONS_FIRST}
    headers |= {"qwen2_5": "\n", "qwen2_5_vl": "\n"}
    run = run.removeprefix(headers.get(family, ""))
    if family in REASONS_FIRST or family in OPENS_REASONING:
        run = run.removeprefix("<think></think>").removeprefix("<think>\n")
        run = run.removeprefix("\n</think>\n\n")
    return run.lstrip("\n") if family in OPENS_REASONING else run


@pytest.mark.parametrize(
    ("shape", "family"), [(shape, name) for shape in REFUSED for name in sorted(REFUSED[shape])]
)
def test_what_a_template_cannot_show_is_refused(family, shape):
    encoded = encode(family, shape)
    assert not encoded.examples
    message = str(encoded.error)
    assert message.startswith("a:1: ")
    wanted = {
        "tools": "tools|tool_calls|content of messages|refuses this row",
        "reasoning": r"messages\[1\].reasoning_content: must be read",
        "assistant_first": "refuses this row: Conversation roles must alternate",
    }
    assert re.search(wanted[shape], message)
