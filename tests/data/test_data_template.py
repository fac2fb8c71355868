"""Rows of every shape to tokens: formats, chat templates, and masks read back by decoding."""

import pytest
from support.data.rows import (
    CHATML,
    FORMATS,
    GOOD,
    THINKING,
    TRIMMING,
    assistant,
    fails,
    load,
    load_row,
    make_tokenizer,
    targets,
    text,
    user,
    write,
)

from merit_fast.data.tree import expand


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", FORMATS)
def test_formats_agree(tmp_path, tokenizer, name, suffix):
    dataset = load(write(tmp_path / f"rows{suffix}", [FORMATS[name]]), tokenizer)
    [example] = dataset.examples
    expected = (
        "<|im_start|>user\ncapital of France?<|im_end|>\n<|im_start|>assistant\nParis<|im_end|>"
    )
    assert text(tokenizer, example.input_ids) == expected
    assert targets(tokenizer, example) == ["Paris<|im_end|>"]
    assert dataset.notes == ()


def test_alpaca_with_everything(tmp_path, tokenizer):
    row = {
        "instruction": "Sum",
        "input": "1 2",
        "output": "3",
        "system": "Be brief.",
        "history": [["Hi", "Hello"]],
    }
    example = load_row(tmp_path, tokenizer, row)
    roles = [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "Sum\n1 2"),
        ("assistant", "3"),
    ]
    expected = "\n".join(f"<|im_start|>{role}\n{content}<|im_end|>" for role, content in roles)
    assert text(tokenizer, example.input_ids) == expected
    assert targets(tokenizer, example) == ["Hello<|im_end|>", "3<|im_end|>"]


def test_every_answer_counts_and_the_last_target_ends_the_row(tmp_path, tokenizer):
    messages = [
        {"role": "system", "content": "assistant"},
        user("Hi"),
        assistant("Hello"),
        {"role": "tool", "content": "42"},
        assistant("It is 42.\n\n```\nx\n```"),
        user("Thanks"),
    ]
    example = load_row(tmp_path, tokenizer, {"messages": messages})
    assert targets(tokenizer, example) == ["Hello<|im_end|>", "It is 42.\n\n```\nx\n```<|im_end|>"]
    assert "Thanks" not in text(tokenizer, example.input_ids)


AWKWARD = [
    "",
    " Paris",
    "Paris  \n ",
    "a  b   c",
    "  \n\n  ",
    "naïve 🦜🏽 日本語",
    "\u2028\u00a0x\u0085",
    "{{ messages }} {% raw %}",
    "user\nassistant\n",
    "1" * 300,
]


@pytest.mark.parametrize("trim_offsets", [True, False], ids=["trimmed", "untrimmed"])
@pytest.mark.parametrize("answer", AWKWARD)
def test_mask_is_exact_for_awkward_answers(tmp_path, answer, trim_offsets):
    tokenizer = make_tokenizer(trim_offsets=trim_offsets)
    example = load_row(tmp_path, tokenizer, {"prompt": "q ", "completion": answer})
    assert targets(tokenizer, example) == [answer + "<|im_end|>"]


def test_token_ids_are_those_of_the_whole_text(tmp_path, tokenizer):
    example = load_row(tmp_path, tokenizer, GOOD)
    whole = tokenizer.apply_chat_template(
        [user(GOOD["prompt"]), assistant("Paris")], tokenize=False
    )
    newline = len(tokenizer("\n", add_special_tokens=False)["input_ids"])
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    assert (
        example.input_ids.tolist() == backend.encode(whole, add_special_tokens=False).ids[:-newline]
    )


def test_token_across_the_border_is_a_target(tmp_path):
    tokenizer = make_tokenizer(
        "{% for m in messages %}{{ m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    example = load_row(tmp_path, tokenizer, {"prompt": "of Fra", "completion": "nce?"})
    assert text(tokenizer, example.input_ids) == "of France?<|im_end|>"
    assert targets(tokenizer, example) == [" France?<|im_end|>"]  # " France" is one token


@pytest.mark.parametrize("bos", [None, "<s>"], ids=["no_bos", "bos"])
def test_plain_template(tmp_path, bos):
    tokenizer = make_tokenizer(template=None, bos=bos)
    row = {
        "messages": [
            {"role": "system", "content": "S"},
            user("Hi"),
            assistant("Hello"),
            user("2"),
            assistant("3 "),
        ]
    }
    example = load_row(tmp_path, tokenizer, row, chat_template="plain")
    assert (
        text(tokenizer, example.input_ids) == (bos or "") + "S\nHi\nHello<|im_end|>2\n3 <|im_end|>"
    )
    assert targets(tokenizer, example) == ["Hello<|im_end|>", "3 <|im_end|>"]


def test_template_from_a_file(tmp_path, tokenizer):
    file = tmp_path / "chat.jinja"
    file.write_text(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}\n"
    )
    example = load_row(tmp_path, tokenizer, GOOD, chat_template=str(file))
    # " Paris" is one token, whose space the template wrote
    assert targets(tokenizer, example) == [" Paris<|im_end|>"]
    expected = "[user] capital of France?<|im_end|>\n[assistant] Paris<|im_end|>"
    assert text(tokenizer, example.input_ids) == expected


def test_template_that_trims(tmp_path):
    tokenizer = make_tokenizer(TRIMMING)
    messages = [user(" Hi "), assistant(" Hello\n"), user("2"), assistant("  3 ")]
    example = load_row(tmp_path, tokenizer, {"messages": messages})
    assert targets(tokenizer, example) == ["Hello<|im_end|>", "3<|im_end|>"]


def test_template_that_rewrites_earlier_turns_shows_each_answer_its_own_history(tmp_path):
    tokenizer = make_tokenizer(THINKING)
    rows = [
        {"messages": [user("1"), assistant("one"), user("2"), assistant("two")]},
        {"messages": [user("3"), assistant("x")]},
    ]
    dataset = load(write(tmp_path / "rows.jsonl", rows), tokenizer)
    block = "<think>\n\n</think>\n\n"
    apart = [expand(example) for example in dataset.examples]
    assert [[targets(tokenizer, one) for one in texts] for texts in apart] == [
        [[f"{block}one<|im_end|>"], [f"{block}two<|im_end|>"]],
        [[f"{block}x<|im_end|>"]],
    ]
    shown = text(tokenizer, apart[0][1].input_ids)
    assert "assistant\none<|im_end|>" in shown  # history as the template shows it
    assert dataset.notes == (
        "1 row shows each answer behind a history of its own "
        "because the chat template rewrites earlier turns",
    )
    assert fails(tmp_path, tokenizer, rows, max_length=2, too_long="error").startswith(
        "bad.jsonl:1: "
    )


TEMPLATE_ERRORS = {
    "not_a_prefix": (
        CHATML.replace("assistant\n{% endif", "assistant\n<plan>{% endif"),
        "bad.jsonl:1: the chat template must render messages[:1] "
        "with add_generation_prompt as a prefix of "
        "messages[:2], got '<plan>' against 'Paris<|im_end|>\\n'",
    ),
    "ignores_the_flag": (
        CHATML.replace("add_generation_prompt", "false"),
        "bad.jsonl:1: the chat template must render messages[:1] "
        "with add_generation_prompt up to where the answer "
        "begins, but it ignores that flag; got '<|im_start|>assistant\\nParis<",
    ),
    "leaves_the_answer_out": (
        CHATML.replace("{{ m.content }}", "{% if m.role == 'user' %}{{ m.content }}{% endif %}"),
        "bad.jsonl:1: the chat template must render the content of messages[1], got '<|im_end|>",
    ),
    "refuses": (
        "{{ raise_exception('No user role, please') }}",
        "bad.jsonl:1: the chat template refuses this row: No user role, please",
    ),
    "fails": (
        "{{ 'a' + 1 }}",
        "bad.jsonl:1: the chat template refuses this row: can only concatenate str",
    ),
    "ends_no_answer": (
        CHATML.replace("<|im_end|>", ""),
        "bad.jsonl:1: the chat template must end an answer with a control token of the tokenizer, "
        "such as eos_token, got ",
    ),
    "end_is_no_token": (
        CHATML.replace("<|im_end|>", "<|eot_id|>"),
        "bad.jsonl:1: the chat template must end an answer with a control token of the tokenizer",
    ),
    "writes_no_answer": ("{{ messages[0].content }}", "bad.jsonl:1: the chat template must render"),
    "not_jinja": ("{% for %}", "chat template, line 1: must be Jinja: "),
    "none": (None, "the tokenizer has no chat template; set data.chat_template: plain"),
    "none_named_default": ({"rag": CHATML}, "data.chat_template: must be set for this tokenizer: "),
}


@pytest.mark.parametrize("name", TEMPLATE_ERRORS)
def test_template_errors(tmp_path, name):
    template, message = TEMPLATE_ERRORS[name]
    assert fails(tmp_path, make_tokenizer(template), [GOOD]).startswith(message)


def test_chat_template_setting_errors(tmp_path, tokenizer):
    no_end = fails(tmp_path, make_tokenizer(eos=None), [GOOD], chat_template="plain")
    assert (
        no_end == "data.chat_template: plain needs an end token, but the tokenizer has no eos_token"
    )
    missing = fails(tmp_path, tokenizer, [GOOD], chat_template=str(tmp_path / "no.jinja"))
    assert missing.startswith(
        "data.chat_template: must be plain or the path of a Jinja file, got 'no.jinja'"
    )
