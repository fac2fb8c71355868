"""Rows, tokenizers and datasets for the tests of the data stage."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest

from merit_fast.data import (
    DataConfig,
    Dataset,
    DatasetConfig,
    Example,
    load_mixture,
)
from merit_fast.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

Row = dict[str, Any]

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


def make_tokenizer(
    template: str = CHATML,
    eos: str = "<|im_end|>",
    bos: str | None = None,
    trim_offsets: bool = True,
) -> "PreTrainedTokenizerFast":
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
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token=eos, pad_token=eos, bos_token=bos
    )
    fast.chat_template = template
    return fast


def write(path: Path, rows: Sequence[Row]) -> str:
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    else:
        path.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
    return str(path)


def load(
    path: Path | str,
    tokenizer: "PreTrainedTokenizerBase",
    part: Literal["train", "eval"] = "train",
    data: DataConfig | None = None,
    **keys: Any,
) -> Dataset:
    """Loads a mixture of one dataset; ``keys`` belong to `mixture:`, ``data`` is `data:`."""
    [dataset] = load_mixture(
        [DatasetConfig("d", str(path), **keys)], tokenizer, data or DataConfig(), part=part
    )
    return dataset


def load_row(
    tmp_path: Path, tokenizer: "PreTrainedTokenizerBase", row: Row, **data: Any
) -> Example:
    dataset = load(write(tmp_path / "row.jsonl", [row]), tokenizer, data=DataConfig(**data))
    assert dataset.num_examples == 1
    return dataset.examples[0]


def text(tokenizer: "PreTrainedTokenizerBase", ids: Any) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def targets(tokenizer: "PreTrainedTokenizerBase", example: Example) -> list[str]:
    """The runs of target tokens, decoded."""
    assert example.input_ids.dtype == example.labels.dtype == np.int32
    in_loss = example.labels != -100
    assert np.array_equal(example.labels[in_loss], example.input_ids[in_loss])
    assert in_loss[-1] and not in_loss[0]
    edges = np.flatnonzero(np.diff(in_loss.astype(int))) + 1
    runs = np.split(example.input_ids, edges)[1::2]
    return [text(tokenizer, run) for run in runs]


def fails(
    tmp_path: Path,
    tokenizer: "PreTrainedTokenizerBase",
    rows: list[Row] | str | bytes,
    **data: Any,
) -> str:
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


def user(content: Any) -> Row:
    return {"role": "user", "content": content}


def assistant(content: Any) -> Row:
    return {"role": "assistant", "content": content}


GOOD = {"prompt": "capital of France?", "completion": "Paris"}

FORMATS: dict[str, Row] = {
    "messages": {"messages": [user("capital of France?"), assistant("Paris")]},
    "text_parts": {
        "messages": [
            user([{"type": "text", "text": "capital "}, {"type": "text", "text": "of France?"}]),
            assistant([{"type": "text", "text": "Paris"}]),
        ]
    },
    "prompt_completion": GOOD,
    "prompt_completion_lists": {
        "prompt": [user("capital of France?")],
        "completion": [assistant("Paris")],
    },
    "alpaca": {"instruction": "capital of France?", "output": "Paris"},
    "alpaca_empty": {
        "instruction": "capital of France?",
        "input": "",
        "output": "Paris",
        "system": None,
        "history": [],
    },
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "capital of France?"},
            {"from": "gpt", "value": "Paris"},
        ]
    },
    "sharegpt_openai_names": {
        "conversations": [
            {"from": "user", "value": "capital of France?"},
            {"from": "assistant", "value": "Paris"},
        ]
    },
}
