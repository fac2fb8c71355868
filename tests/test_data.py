"""Rows of every shape to tokens, with masks read back by decoding; and every way in which input can be wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from merit_fast.config import parse
from merit_fast.data import (
    DataConfig,
    Dataset,
    DatasetConfig,
    Example,
    collate,
    count_target_tokens,
    load_mixture,
    load_tokenizer,
    mixture_fingerprint,
)
from merit_fast.data.sources import read_rows
from merit_fast.errors import InputError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMMING = CHATML.replace("m.content", "m.content | trim")  # as Llama 3
THINKING = CHATML.replace(  # as Qwen3: the last answer gets a block that earlier ones lose
    "{{ m.content }}",
    "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}",
)
CORPUS = [
    "What is the capital of France? Paris is the capital of France.",
    "Translate to German: good morning. Guten Morgen! <think></think>",
    "system user assistant Answer briefly. 1 2 3 4 5 6 7 8 9 0",
]


def make_tokenizer(template=CHATML, eos="<|im_end|>", bos=None, trim_offsets=True):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", "<s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    byte_level = processors.ByteLevel(trim_offsets=trim_offsets)
    if bos:
        pair = [(bos, tokenizer.token_to_id(bos))]
        adds_bos = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=pair)
        tokenizer.post_processor = processors.Sequence([byte_level, adds_bos])
    else:
        tokenizer.post_processor = byte_level
    tokenizer.enable_truncation(4)  # as some tokenizer.json files carry it; must not be obeyed
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token=eos, bos_token=bos)
    fast.chat_template = template
    return fast


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def write(path, rows):
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(path, tokenizer, part="train", data=None, **keys) -> Dataset:
    """The one dataset of a mixture; keyword arguments are split into `mixture:` and `data:` keys."""
    [dataset] = load_mixture([DatasetConfig("d", str(path), **keys)], tokenizer, data or DataConfig(), part=part)
    return dataset


def load_row(tmp_path, tokenizer, row, **data) -> Example:
    dataset = load(write(tmp_path / "row.jsonl", [row]), tokenizer, data=DataConfig(**data))
    assert dataset.num_examples == 1
    return dataset.examples[0]


def text(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def targets(tokenizer, example):
    """The runs of target tokens, decoded."""
    assert example.input_ids.dtype == example.labels.dtype == np.int32
    in_loss = example.labels != -100
    assert np.array_equal(example.labels[in_loss], example.input_ids[in_loss])
    assert in_loss[-1] and not in_loss[0]
    edges = np.flatnonzero(np.diff(in_loss.astype(int))) + 1
    runs = np.split(example.input_ids, edges)[1::2]
    return [text(tokenizer, run) for run in runs]


def fails(tmp_path, tokenizer, rows, **data) -> str:
    """The message for a file of these rows (str: the file's text; bytes: its content)."""
    path = tmp_path / "bad.jsonl"
    if isinstance(rows, list):
        write(path, rows)
    else:
        path.write_bytes(rows if isinstance(rows, bytes) else rows.encode())
    with pytest.raises(InputError) as caught:
        load(path, tokenizer, data=DataConfig(**data))
    message = str(caught.value)
    assert "\n" not in message and not message.endswith(".")
    return message.replace(str(tmp_path) + "/", "")


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


GOOD = {"prompt": "capital of France?", "completion": "Paris"}

FORMATS = {
    "messages": {"messages": [user("capital of France?"), assistant("Paris")]},
    "text_parts": {
        "messages": [
            user([{"type": "text", "text": "capital "}, {"type": "text", "text": "of France?"}]),
            assistant([{"type": "text", "text": "Paris"}]),
        ]
    },
    "prompt_completion": GOOD,
    "prompt_completion_lists": {"prompt": [user("capital of France?")], "completion": [assistant("Paris")]},
    "alpaca": {"instruction": "capital of France?", "output": "Paris"},
    "alpaca_empty": {
        "instruction": "capital of France?",
        "input": "",
        "output": "Paris",
        "system": None,
        "history": [],
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": "capital of France?"}, {"from": "gpt", "value": "Paris"}]
    },
    "sharegpt_openai_names": {
        "conversations": [{"from": "user", "value": "capital of France?"}, {"from": "assistant", "value": "Paris"}]
    },
}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", FORMATS)
def test_formats_agree(tmp_path, tokenizer, name, suffix):
    dataset = load(write(tmp_path / f"rows{suffix}", [FORMATS[name]]), tokenizer)
    [example] = dataset.examples
    expected = "<|im_start|>user\ncapital of France?<|im_end|>\n<|im_start|>assistant\nParis<|im_end|>"
    assert text(tokenizer, example.input_ids) == expected
    assert targets(tokenizer, example) == ["Paris<|im_end|>"]
    assert dataset.notes == ()


def test_alpaca_with_everything(tmp_path, tokenizer):
    row = {"instruction": "Sum", "input": "1 2", "output": "3", "system": "Be brief.", "history": [["Hi", "Hello"]]}
    example = load_row(tmp_path, tokenizer, row)
    roles = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Sum\n1 2"), ("assistant", "3")]
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
    whole = tokenizer.apply_chat_template([user(GOOD["prompt"]), assistant("Paris")], tokenize=False)
    newline = len(tokenizer("\n", add_special_tokens=False)["input_ids"])
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    assert example.input_ids.tolist() == backend.encode(whole, add_special_tokens=False).ids[:-newline]


def test_token_across_the_border_is_a_target(tmp_path):
    tokenizer = make_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}")
    example = load_row(tmp_path, tokenizer, {"prompt": "of Fra", "completion": "nce?"})
    assert text(tokenizer, example.input_ids) == "of France?"
    assert targets(tokenizer, example) == [" France?"]  # " France" is one token


@pytest.mark.parametrize("bos", [None, "<s>"], ids=["no_bos", "bos"])
def test_plain_template(tmp_path, bos):
    tokenizer = make_tokenizer(template=None, bos=bos)
    row = {"messages": [{"role": "system", "content": "S"}, user("Hi"), assistant("Hello"), user("2"), assistant("3 ")]}
    example = load_row(tmp_path, tokenizer, row, chat_template="plain")
    assert text(tokenizer, example.input_ids) == (bos or "") + "S\nHi\nHello<|im_end|>2\n3 <|im_end|>"
    assert targets(tokenizer, example) == ["Hello<|im_end|>", "3 <|im_end|>"]


def test_template_from_a_file(tmp_path, tokenizer):
    file = tmp_path / "chat.jinja"
    file.write_text(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}\n"
    )
    example = load_row(tmp_path, tokenizer, GOOD, chat_template=str(file))
    assert targets(tokenizer, example) == [" Paris"]  # one token, whose space the template wrote
    assert text(tokenizer, example.input_ids) == "[user] capital of France?\n[assistant] Paris"


def test_template_that_trims(tmp_path):
    tokenizer = make_tokenizer(TRIMMING)
    messages = [user(" Hi "), assistant(" Hello\n"), user("2"), assistant("  3 ")]
    example = load_row(tmp_path, tokenizer, {"messages": messages})
    assert targets(tokenizer, example) == ["Hello<|im_end|>", "3<|im_end|>"]


def test_template_that_rewrites_earlier_turns_gives_one_example_per_answer(tmp_path):
    tokenizer = make_tokenizer(THINKING)
    rows = [
        {"messages": [user("1"), assistant("one"), user("2"), assistant("two")]},
        {"messages": [user("3"), assistant("x")]},
    ]
    dataset = load(write(tmp_path / "rows.jsonl", rows), tokenizer)
    block = "<think>\n\n</think>\n\n"
    expected = [[f"{block}one<|im_end|>"], [f"{block}two<|im_end|>"], [f"{block}x<|im_end|>"]]
    assert [targets(tokenizer, example) for example in dataset.examples] == expected
    assert "assistant\none<|im_end|>" in text(
        tokenizer, dataset.examples[1].input_ids
    )  # history as the template shows it
    assert dataset.notes == ("1 row became one example per answer because the chat template rewrites earlier turns",)
    assert fails(tmp_path, tokenizer, rows, max_length=2, too_long="error").startswith("bad.jsonl:1: ")


TEMPLATE_ERRORS = {
    "not_a_prefix": (
        CHATML.replace("assistant\n{% endif", "assistant\n<think>{% endif"),
        "bad.jsonl:1: the chat template must render messages[:1] with add_generation_prompt as a prefix of "
        "messages[:2], got '<think>' against 'Paris<|im_end|>\\n'",
    ),
    "ignores_the_flag": (
        CHATML.replace("add_generation_prompt", "false"),
        "bad.jsonl:1: the chat template must render messages[:1] with add_generation_prompt up to where the answer "
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
    "fails": ("{{ 'a' + 1 }}", "bad.jsonl:1: the chat template refuses this row: can only concatenate str"),
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
    assert no_end == "data.chat_template: plain needs an end token, but the tokenizer has no eos_token"
    missing = fails(tmp_path, tokenizer, [GOOD], chat_template=str(tmp_path / "no.jinja"))
    assert missing.startswith("data.chat_template: must be plain or the path of a Jinja file, got 'no.jinja'")


ROW_ERRORS = {
    "json": ('{"prompt": "a"\n', "bad.jsonl:1: must be one JSON object: Expecting ',' delimiter at column 15"),
    "json_later": (json.dumps(GOOD) + "\n\n{]", "bad.jsonl:3: must be one JSON object: "),
    "array": ("[\n{}\n]", "bad.jsonl:1: must be one JSON object: "),
    "array_hint": ("[\n", "one object per line is needed, not an array"),
    "not_object": ("[1, 2]", "bad.jsonl:1: must be a JSON object {...}, got list"),
    "nesting": ("[" * 100_000, "bad.jsonl:1: must be one JSON object: "),
    "utf8": (b'{"prompt": "\xff"}', "bad.jsonl:1: must be UTF-8 text, got byte 0xff at byte 13 of the line"),
    "utf16": ('{"a": 1}'.encode("utf-16"), "bad.jsonl:1: must be UTF-8 text, got byte 0xff at byte 1"),
    "surrogate": (json.dumps({**GOOD, "prompt": "\ud800"}), "bad.jsonl:1: must be valid Unicode"),
    "empty": ("\n \n", "bad.jsonl: dataset d: must have at least one row, found none"),
    "columns": (
        [{"question": "a", "answer": "b"}],
        "bad.jsonl:1: unknown columns: must have one of (messages; conversations; prompt, completion; instruction, "
        "output), got question, answer",
    ),
    "no_columns": ([{}], "bad.jsonl:1: unknown columns: "),
    "other_kind": (
        [GOOD, FORMATS["alpaca"]],
        "bad.jsonl:2: must be of the kind of the rows before it (prompt and completion: prompt, completion), "
        "got instruction, output",
    ),
    "role": (
        [{"messages": [{"role": "bot", "content": "a"}]}],
        "bad.jsonl:1: messages[0].role: must be one of system, user, assistant, tool, got 'bot'",
    ),
    "from": (
        [{"conversations": [{"from": "bing", "value": "a"}]}],
        "bad.jsonl:1: conversations[0].from: must be one of human, gpt, system, user, assistant, got 'bing'",
    ),
    "no_messages": ([{"messages": []}], "bad.jsonl:1: messages: must be a non-empty list, got []"),
    "no_content": ([{"messages": [{"role": "user"}]}], "bad.jsonl:1: messages[0]: must have the key content, got role"),
    "message": ([{"messages": ["Hi"]}], "bad.jsonl:1: messages[0]: must be an object with the key role, got 'Hi'"),
    "image": (
        [{"messages": [user([{"type": "image", "url": "x"}])]}],
        "bad.jsonl:1: messages[0].content[0].type: must be text, got 'image'",
    ),
    "calls": (
        [{"messages": [user("a"), {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]}],
        "bad.jsonl:1: messages[1].tool_calls: must be absent",
    ),
    "null": ([{"prompt": "a", "completion": None}], "bad.jsonl:1: completion: must be a string or a list of messages"),
    "number": ([{"instruction": "a", "output": 3}], "bad.jsonl:1: output: must be a string, got 3"),
    "history": ([{**FORMATS["alpaca"], "history": [["a"]]}], "bad.jsonl:1: history[0]: must be a pair"),
    "no_answer": ([{"messages": [user("a")]}], "bad.jsonl:1: must have an answer of the assistant, found none"),
    "answer_first": ([{"messages": [assistant("a")]}], "bad.jsonl:1: messages[0]: must be a system or user message"),
}


@pytest.mark.parametrize("name", ROW_ERRORS)
def test_row_errors_name_file_and_line(tmp_path, tokenizer, name):
    rows, message = ROW_ERRORS[name]
    assert message in fails(tmp_path, tokenizer, rows)


def test_answer_without_tokens(tmp_path):
    tokenizer = make_tokenizer("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    message = fails(tmp_path, tokenizer, [GOOD, {"prompt": "a", "completion": " "}])
    assert message == "bad.jsonl:2: must have an answer of the assistant with at least one token, found none"


def test_bom_empty_lines_and_crlf_are_tolerated(tmp_path, tokenizer):
    line = json.dumps(GOOD).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n  \n" + line)
    assert [where for where, _ in read_rows(str(tmp_path / "a.jsonl"), "train")] == [
        f"{tmp_path}/a.jsonl:1",
        f"{tmp_path}/a.jsonl:4",
    ]
    assert load(tmp_path / "a.jsonl", tokenizer).num_examples == 2


def test_line_separators_inside_strings_do_not_end_lines(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [{"prompt": "a\u2028b\x85c", "completion": "d"}, GOOD])
    assert load(path, tokenizer).num_examples == 2


def same(a: Dataset, b: Dataset) -> bool:
    return [(e.input_ids.tolist(), e.labels.tolist()) for e in a.examples] == [
        (e.input_ids.tolist(), e.labels.tolist()) for e in b.examples
    ]


def test_jsonl_parquet_directory_and_hub_agree(tmp_path, tokenizer, monkeypatch):
    import datasets

    rows = [{"messages": [user(f"{i}?"), assistant(f"{i}")]} for i in range(150)]
    whole = load(write(tmp_path / "rows.jsonl", rows), tokenizer)
    assert whole.num_examples == 150 and targets(tokenizer, whole.examples[149]) == ["149<|im_end|>"]
    assert same(whole, load(write(tmp_path / "rows.parquet", rows), tokenizer))
    parts = tmp_path / "parts"
    parts.mkdir()
    write(parts / "b.parquet", rows[70:])
    write(parts / "a.jsonl", rows[:70])
    (parts / "README.md").write_text("not data")
    (parts / "._a.jsonl").write_bytes(b"\xff")
    assert same(whole, load(parts, tokenizer))
    assert load(parts, tokenizer, max_examples=80).num_examples == 80

    hub = tmp_path / "hub"
    hub.mkdir()
    write(hub / "train-0.jsonl", rows)
    write(hub / "test-0.jsonl", rows[:3])
    really_load = datasets.load_dataset
    asked = []

    def load_dataset(path, *, split):
        asked.append((path, split))
        return really_load(str(hub), split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert same(whole, load("owner/name", tokenizer))
    assert load("owner/name", tokenizer, part="eval", eval_split="test", max_examples=1).num_examples == 3
    assert asked == [("owner/name", "train"), ("owner/name", "test")]


def test_paths_that_hold_nothing(tmp_path, tokenizer, monkeypatch):
    import datasets

    def message(path):
        with pytest.raises(InputError) as caught:
            load(path, tokenizer)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    monkeypatch.chdir(tmp_path)
    assert (
        message("data/no.jsonl") == "data/no.jsonl: is neither a file, nor a directory, nor a Hugging Face dataset id"
    )
    assert message("/no/such").startswith("/no/such: is neither")
    Path("empty").mkdir()
    assert message("empty") == "empty: the directory must hold .jsonl or .parquet files, found none"
    write(Path("short.parquet"), [GOOD])
    os.truncate("short.parquet", 60)
    assert message("short.parquet").startswith("short.parquet: is not readable Parquet after row 0: ")
    write(Path("bad.parquet"), [GOOD, GOOD, {"prompt": "a", "completion": None}])
    assert message("bad.parquet").startswith("bad.parquet: row 3: completion: must be")

    def load_dataset(path, *, split):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert message("owner/name") == (
        "owner/name: is neither a file nor a directory, and split 'train' of a Hugging Face dataset of this name "
        "could not be loaded: offline (HF_HUB_OFFLINE) and not in the cache"
    )
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    assert message("owner/name").endswith("could not be loaded: no route")


def test_unused_columns_are_noted(tmp_path, tokenizer):
    rows = [{**GOOD, "id": 1, "label": None}, {**GOOD, "category": "x"}]
    assert load(write(tmp_path / "a.jsonl", rows), tokenizer).notes == ("columns not used: category, id",)


def test_mixture_order_eval_part_and_rules(tmp_path, tokenizer):
    a, b = write(tmp_path / "a.jsonl", [GOOD, GOOD]), write(tmp_path / "b.jsonl", [GOOD])
    configs = [DatasetConfig("z", b), DatasetConfig("a", a, eval_path=b, max_examples=1)]
    train = load_mixture(configs, tokenizer, DataConfig(), part="train")
    assert [(dataset.name, dataset.num_examples) for dataset in train] == [("z", 1), ("a", 1)]
    held_out = load_mixture(configs, tokenizer, DataConfig(), part="eval")
    assert [(dataset.name, dataset.num_examples) for dataset in held_out] == [("a", 1)]

    def rule(*configs):
        with pytest.raises(InputError) as caught:
            load_mixture(configs, tokenizer, DataConfig(), part="train")
        return str(caught.value)

    assert rule(configs[0], configs[0]) == "mixture: name: must differ between datasets, got 'z' 2 times"
    shared = rule(DatasetConfig("d", str(tmp_path), eval_path=a))
    assert shared == f"mixture: d: eval_path: must hold other files than path, got {a} in both"
    assert "d: split: must be absent for local files" in rule(DatasetConfig("d", a, split="test"))
    assert "d: eval_split: must be absent" in rule(DatasetConfig("d", a, eval_split="test"))
    assert "d: eval_split: must be absent" in rule(DatasetConfig("d", "o/n", eval_path=a, eval_split="test"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "a/b"}, "m.yaml: mixture[0].name: must be a file name of"),
        ({"name": ".."}, "m.yaml: mixture[0].name: must be a file name of"),
        ({"name": "a\n"}, "m.yaml: mixture[0].name: must be a file name of"),
        ({"max_examples": 0}, "m.yaml: mixture[0].max_examples: must be at least 1, got 0"),
        ({"eval_split": "train"}, "m.yaml: mixture[0].eval_split: must be another split"),
        ({"path": ""}, "m.yaml: mixture[0].path: must be a file, directory or dataset id, got ''"),
        ({"pth": "x"}, "m.yaml: mixture[0].pth: unknown key; did you mean path?"),
    ],
)
def test_dataset_config_rules(keys, message):
    with pytest.raises(InputError) as caught:
        parse(DatasetConfig, {"name": "d", "path": "p.jsonl"} | keys, "m.yaml", "mixture[0]")
    assert str(caught.value).startswith(message)


def test_too_long(tmp_path, tokenizer):
    long = {"messages": [user("1"), assistant("one two three"), user("x" * 50), assistant("never reached")]}
    good, unanswered = FORMATS["messages"], {"messages": [user("y" * 200), assistant("z")]}
    path = write(tmp_path / "a.jsonl", [long, good, long, unanswered])
    whole = load(path, tokenizer)
    limit = 60
    dataset = load(path, tokenizer, data=DataConfig(max_length=limit))
    assert [targets(tokenizer, example) for example in dataset.examples] == [
        ["one two three<|im_end|>"],
        ["Paris<|im_end|>"],
        ["one two three<|im_end|>"],
    ]
    cut = len(dataset.examples[0].input_ids)
    assert np.array_equal(dataset.examples[0].input_ids, whole.examples[0].input_ids[:cut])
    assert dataset.notes == (
        "2 rows longer than 60 tokens were truncated",
        "1 row longer than 60 tokens was dropped because truncation would leave no answer",
    )
    dropped = load(path, tokenizer, data=DataConfig(max_length=limit, too_long="drop"))
    assert dropped.num_examples == 1 and dropped.notes == ("3 rows longer than 60 tokens were dropped",)
    error = fails(tmp_path, tokenizer, [good, long], max_length=limit, too_long="error")
    length = len(whole.examples[0].input_ids)
    assert error == f"bad.jsonl:2: must have at most data.max_length = 60 tokens, got {length}"
    exact = DataConfig(max_length=length, too_long="error")
    assert load(write(tmp_path / "b.jsonl", [long]), tokenizer, data=exact).num_examples == 1
    none = fails(tmp_path, tokenizer, [long, long], max_length=2)
    assert none.startswith("bad.jsonl: dataset d: must have a row with an answer within data.max_length = 2 tokens")


def test_counts_are_after_the_shift(tmp_path, tokenizer):
    import torch

    assert count_target_tokens(np.array([5, -100, 5, 5])) == 2
    assert count_target_tokens(torch.tensor([[5, 5], [5, -100]])) == 1
    dataset = load(write(tmp_path / "a.jsonl", [GOOD, GOOD]), tokenizer)
    per_row = len(tokenizer("Paris<|im_end|>", add_special_tokens=False, truncation=False)["input_ids"])
    assert dataset.num_target_tokens == 2 * per_row
    assert dataset.num_tokens == 2 * len(dataset.examples[0].input_ids)
    first = load_row(
        tmp_path,
        make_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}"),
        {"prompt": "", "completion": "of the"},
    )
    assert first.labels[0] == -100  # nothing predicts it


def example(ids, labels) -> Example:
    return Example(np.array(ids, np.int32), np.array(labels, np.int32))


def test_collate_pads_left_and_masks_by_position(tokenizer):
    import torch

    end = tokenizer.eos_token_id
    assert end == tokenizer.pad_token_id  # the trap
    short, long = example([end, 7, end], [-100, -100, end]), example([5, 6, end, 8, end], [5, -100, end, -100, end])
    batch = collate([short, long], [3, 1], end, pad_to_multiple_of=4)
    n = -100
    assert batch.input_ids.tolist() == [[end] * 5 + [end, 7, end], [end] * 3 + [5, 6, end, 8, end]]
    assert batch.labels.tolist() == [[n] * 7 + [end], [n, n, n, n, n, end, n, end]]
    assert batch.attention_mask.tolist() == [[0] * 5 + [1] * 3, [0] * 3 + [1] * 5]
    assert batch.position_ids.tolist() == [[0] * 5 + [0, 1, 2], [0] * 3 + [0, 1, 2, 3, 4]]
    assert batch.dataset_ids.tolist() == [3, 1]
    assert {tensor.dtype for tensor in vars(batch).values()} == {torch.int64}
    assert batch.num_target_tokens == 3
    assert batch.logits_to_keep == 4  # label at column 5 of 8, predicted by column 4
    assert collate([short], [0], end, pad_to_multiple_of=1).input_ids.shape == (1, 3)
    with pytest.raises(ValueError, match="one dataset id per example"):
        collate([short], [], end)


@pytest.mark.parametrize("seed", range(20))
def test_logits_to_keep_is_the_smallest_that_predicts_every_target(seed):
    rng = np.random.default_rng(seed)
    examples = []
    for length in rng.integers(2, 20, size=3):
        ids = rng.integers(0, 50, length)
        labels = np.where((rng.random(length) < 0.2) | (np.arange(length) == length - 1), ids, -100)
        examples.append(example(ids, labels))
    batch = collate(examples, [0, 0, 0], 0)

    def predicted(n):  # targets among the labels that the last n positions predict
        width = batch.labels.shape[1]
        return int((batch.labels[:, width - n + 1 :] != -100).sum()) if n else 0

    total = sum(count_target_tokens(e.labels) for e in examples)
    assert batch.num_target_tokens == total == predicted(batch.logits_to_keep)
    assert predicted(batch.logits_to_keep - 1) < total


def test_batch_without_targets():
    assert collate([example([1, 2], [-100, -100])], [0], 0).logits_to_keep == 0


def test_fingerprint_follows_content_alone(tmp_path, tokenizer):
    rows = [GOOD, FORMATS["prompt_completion"]]
    train, held_out = write(tmp_path / "t.jsonl", rows), write(tmp_path / "e.jsonl", rows[:1])
    model = tmp_path / "model"
    tokenizer.save_pretrained(model)

    def mark(data=None, names=("d",), part=None, model=model, **keys):
        keys = {"path": train, "eval_path": held_out} | keys
        configs = [DatasetConfig(name, **keys) for name in names]
        return mixture_fingerprint(configs, data or DataConfig(), str(model), part=part)

    base, base_train = mark(), mark(part="train")
    moved = write(tmp_path / "moved.jsonl", rows)
    (tmp_path / "folder").mkdir()
    template, same_template = tmp_path / "c.jinja", tmp_path / "d.jinja"
    template.write_text(CHATML)
    same_template.write_text(CHATML)
    with_template = mark(DataConfig(chat_template=str(template)))
    (model / "model.safetensors").write_bytes(b"weights")
    os.utime(train, (0, 0))
    write(tmp_path / "folder" / "any.jsonl", rows)
    equal = [mark(), mark(path=moved), mark(path=str(tmp_path / "folder"))]
    assert set(equal) == {base} and len(base) == 32
    assert mark(DataConfig(chat_template=str(same_template))) == with_template
    changed = [
        mark(names=("e",)),
        mark(names=("d", "e")),
        mark(names=("e", "d")),
        mark(max_examples=1),
        mark(path=held_out, eval_path=moved),
        mark(eval_path=None),
        mark(DataConfig(max_length=7)),
        mark(DataConfig(too_long="drop")),
        mark(DataConfig(chat_template="plain")),
        with_template,
        mark(path="owner/name"),
        mark(path="owner/name", split="test"),
        mark(model="owner/name"),
        base_train,
    ]
    assert len({base, *changed}) == len(changed) + 1
    template.write_text(TRIMMING)
    assert mark(DataConfig(chat_template=str(template))) != with_template
    write(Path(held_out), rows)
    assert mark() != base and mark(part="train") == base_train
    make_tokenizer(TRIMMING).save_pretrained(model)
    assert mark(part="train") != base_train
    with pytest.raises(InputError, match="must differ between datasets"):
        mark(names=("d", "d"))


def test_load_tokenizer(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "model")
    loaded = load_tokenizer(str(tmp_path / "model"))
    example = load_row(tmp_path, loaded, GOOD)
    assert targets(loaded, example) == ["Paris<|im_end|>"]
    for name, content in (("missing", None), ("empty", ""), ("broken", "{")):
        folder = tmp_path / name
        if content is not None:
            folder.mkdir()
            (folder / "tokenizer.json").write_text(content)
        with pytest.raises(InputError) as caught:
            load_tokenizer(str(folder))
        assert str(caught.value).startswith(f"{folder}: no tokenizer could be loaded: ")
        assert "\n" not in str(caught.value)


def test_slow_tokenizer_is_refused(tmp_path):
    from transformers import ByT5Tokenizer

    message = fails(tmp_path, ByT5Tokenizer(), [GOOD])
    assert message.startswith("ByT5Tokenizer: needs a fast tokenizer (tokenizer.json)")


def test_import_is_light():
    code = "import merit_fast.data, sys; print(*{'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
