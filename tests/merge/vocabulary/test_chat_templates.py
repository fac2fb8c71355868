"""`chat_template:` by name, by text and by majority, as AutoTokenizer renders it."""

import json

import pytest
from support.merge.vocabulary.models import make_model
from transformers import AutoTokenizer

from merit_fast.errors import InputError
from merit_fast.merge import merge_models

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]


def read(file):
    return json.loads(file.read_text())


@pytest.mark.parametrize(
    "name,text",
    [
        (
            "chatml",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        (
            "llama3",
            "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (
            "mistral",
            "<s> [INST] Be brief.\n\nHi [/INST] Hello</s> [INST] Bye [/INST]",
        ),
        (
            "alpaca",
            "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello\n\n### Instruction:\nBye"
            "\n\n### Response:\n",
        ),
        (
            "exaone",
            "[|system|]Be brief.[|endofturn|]\n[|user|]Hi\n[|assistant|]Hello[|endofturn|]\n"
            "[|user|]Bye\n[|assistant|]",
        ),
    ],
)
def test_built_in_templates(tmp_path, name, text):
    model = make_model(tmp_path / "model")
    merge_models([model.path], out=tmp_path / "out", chat_template=name)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    rendered = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert rendered == text


def test_a_jinja_text_replaces_every_other_template(tmp_path):
    model = make_model(tmp_path / "model")
    config = read(model.path / "tokenizer_config.json") | {"chat_template": "{{ 'old' }}"}
    (model.path / "tokenizer_config.json").write_text(json.dumps(config))
    (model.path / "chat_template.json").write_text('{"chat_template": "old"}')
    (model.path / "additional_chat_templates").mkdir()
    (model.path / "additional_chat_templates/tools.jinja").write_text("{{ 'old' }}")
    text = "{% generation %}{{ messages[0].content }}{% endgeneration %}"
    merge_models([model.path], out=tmp_path / "out", chat_template=text)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == text
    assert (tmp_path / "out/chat_template.jinja").read_text() == text
    assert not (tmp_path / "out/additional_chat_templates").exists()


def test_auto_takes_the_most_common_template(tmp_path):
    templates = ["{{ 'a' }}", "{{ 'b' }}\n", None, "{{ 'b' }}", None]
    paths = []
    for number, template in enumerate(templates):
        model = make_model(tmp_path / str(number), seed=number)
        paths.append(model.path)
        if template:
            (model.path / "chat_template.jinja").write_text(template)
    merge_models(paths, out=tmp_path / "out", chat_template="auto")
    assert (tmp_path / "out/chat_template.jinja").read_text() == "{{ 'b' }}"
    merge_models(paths[2::2], out=tmp_path / "none", chat_template="auto")
    assert not (tmp_path / "none/chat_template.jinja").exists()


@pytest.mark.parametrize(
    "template,message",
    [
        ("chatlm", "chat_template: must be auto, alpaca, chatml, .* or a Jinja text, got 'chatlm'"),
        ("{% if %}", "chat_template: is no Jinja: "),
        ("chatml", "chat_template: must be absent, .*model holds no tokenizer"),
    ],
)
def test_templates_that_cannot_be_written(tmp_path, template, message):
    model = make_model(tmp_path / "model")
    if template == "chatml":
        for file in model.path.glob("tokenizer*"):
            file.unlink()
    with pytest.raises(InputError, match=message):
        merge_models([model.path], out=tmp_path / "out", chat_template=template)
