"""Work that a template and a tokenizer need once is done once, and stays right."""

import pytest
from support.data.rows import make_tokenizer

from merit_fast.data.config import DataConfig
from merit_fast.data.conversation import Conversation, Message
from merit_fast.data.template import ChatEncoder, tokens
from merit_fast.data.template.jinja import Refusal, Template

MESSAGES = [{"role": "user", "content": "a"}]


def test_a_vocabulary_is_counted_once_for_all_datasets(monkeypatch):
    counted = []
    real = tokens._count_bytes
    monkeypatch.setattr(tokens, "_count_bytes", lambda given: counted.append(1) or real(given))
    tokenizer = make_tokenizer()
    row = Conversation("rows:1", (Message("user", "q"), Message("assistant", "a<new>b")))
    before = ChatEncoder(tokenizer, DataConfig()).encode([row], "all")
    ChatEncoder(tokenizer, DataConfig())
    assert len(counted) == 1
    tokenizer.add_tokens(["<new>"])
    after = ChatEncoder(tokenizer, DataConfig()).encode([row], "all")
    assert len(counted) == 2
    (old,), (new,) = before[0].examples, after[0].examples
    assert len(new.input_ids) < len(old.input_ids)
    assert tokenizer.decode(new.input_ids) == tokenizer.decode(old.input_ids)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ messages[0].update({}) }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ messages[0].content.__class__.__base__ }}",
    ],
)
def test_a_template_stays_in_its_sandbox(source):
    template = Template(source, {}, "2024-07-26")
    for _ in range(2):
        with pytest.raises(Refusal, match="unsafe"):
            template.render(MESSAGES, None, {}, add_generation_prompt=False)
    assert MESSAGES == [{"role": "user", "content": "a"}]
