"""Counts, batches, fingerprints and tokenizers."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.data.rows import (
    CHATML,
    FORMATS,
    GOOD,
    TRIMMING,
    fails,
    load,
    load_row,
    make_tokenizer,
    targets,
    write,
)

from merit_fast.data import (
    DataConfig,
    DatasetConfig,
    Example,
    collate,
    count_target_tokens,
    load_tokenizer,
    mixture_fingerprint,
)
from merit_fast.errors import InputError


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_counts_are_after_the_shift(tmp_path, tokenizer):
    import torch

    assert count_target_tokens(np.array([5, -100, 5, 5])) == 2
    assert count_target_tokens(torch.tensor([[5, 5], [5, -100]])) == 1
    dataset = load(write(tmp_path / "a.jsonl", [GOOD, GOOD]), tokenizer)
    per_row = len(
        tokenizer("Paris<|im_end|>", add_special_tokens=False, truncation=False)["input_ids"]
    )
    assert dataset.num_target_tokens == 2 * per_row
    assert dataset.num_tokens == 2 * len(dataset.examples[0].input_ids)
    first = load_row(
        tmp_path,
        make_tokenizer(
            "{% for m in messages %}{{ m.content }}{% endfor %}"
            "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
        ),
        {"prompt": "", "completion": "of the"},
    )
    assert first.labels[0] == -100  # nothing predicts it


def example(ids, labels) -> Example:
    return Example(np.array(ids, np.int32), np.array(labels, np.int32))


def test_collate_pads_left_and_masks_by_position(tokenizer):
    import torch

    end = tokenizer.eos_token_id
    assert end == tokenizer.pad_token_id  # the trap
    short = example([end, 7, end], [-100, -100, end])
    long = example([5, 6, end, 8, end], [5, -100, end, -100, end])
    batch = collate([short, long], [3, 1], end, pad_to_multiple_of=4)
    n = -100
    assert batch.input_ids.tolist() == [[end] * 5 + [end, 7, end], [end] * 3 + [5, 6, end, 8, end]]
    assert batch.labels.tolist() == [[n] * 7 + [end], [n, n, n, n, n, end, n, end]]
    assert batch.attention_mask.tolist() == [[0] * 5 + [1] * 3, [0] * 3 + [1] * 5]
    assert batch.position_ids.tolist() == [[0] * 5 + [0, 1, 2], [0] * 3 + [0, 1, 2, 3, 4]]
    assert batch.dataset_ids.tolist() == [3, 1]
    tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    assert {tensor.dtype for tensor in tensors} == {torch.int64}
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
    train = write(tmp_path / "t.jsonl", rows)
    held_out = write(tmp_path / "e.jsonl", rows[:1])
    model = tmp_path / "model"
    tokenizer.save_pretrained(model)

    def mark(data=None, names=("d",), part=None, model=model, **keys):
        keys = {"path": train, "eval_path": held_out} | keys
        configs = [DatasetConfig(name, **keys) for name in names]
        return mixture_fingerprint(configs, data or DataConfig(), str(model), part=part)

    base = mark()
    base_train = mark(part="train")
    moved = write(tmp_path / "moved.jsonl", rows)
    (tmp_path / "folder").mkdir()
    template = tmp_path / "c.jinja"
    same_template = tmp_path / "d.jinja"
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
    heavy = {"torch", "transformers", "datasets", "pyarrow"}
    code = f"import merit_fast.data, sys; print(*{heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
