"""Rows with images under MeritSFTTrainer and TRL's engine: the sums of one row after the other."""

import json

import pytest
import torch
import transformers as t
import yaml
from datasets import Dataset
from support.stacks.trl_runs import sft_arguments
from support.vision.image_rows import write_image
from support.vision.models import make_vision_model
from support.vision.rows import make_image
from torch.nn import functional as F

from merit_fast import patch_model
from merit_fast.data.images import load_processor
from merit_fast.engines import trl_runner
from merit_fast.errors import InputError
from merit_fast.integrations import MeritCallback
from merit_fast.integrations.trl import MeritSFTTrainer

trl = pytest.importorskip("trl", reason="trl is not installed")

ANSWERS = ("seven", "eight", "nine or ten", "two", "three", "four")


def rows(images):
    """Rows of two datasets with 1, 2 and no images in turn."""
    return [
        {
            "images": [images(number, k) for k in range((1, 2, 0)[number % 3])],
            "prompt": [{"role": "user", "content": f"which digit {number}?"}],
            "completion": [{"role": "assistant", "content": answer}],
            "dataset_id": "ab"[number % 2],
        }
        for number, answer in enumerate(ANSWERS)
    ]


def pictures(number, k):
    return make_image(56, 56, 10 * number + k)


@torch.no_grad()
def one_by_one(folder, collator):
    """Per dataset [loss sum, target tokens, correct tokens, tokens, examples]."""
    sums = {}
    model = t.AutoModelForImageTextToText.from_pretrained(folder).eval()
    for row in rows(pictures):
        name = row.pop("dataset_id")
        batch = collator([row])
        labels = batch.pop("labels")[0, 1:]
        logits = model(**batch).logits[0, :-1].double()
        is_target = labels != -100
        found = [
            float(F.cross_entropy(logits, labels, reduction="sum")),
            int(is_target.sum()),
            int((logits.argmax(-1) == labels)[is_target].sum()),
            int(batch["attention_mask"].sum()),
            1,
        ]
        sums[name] = [a + b for a, b in zip(sums.get(name, [0.0] * 5), found, strict=True)]
    return sums


def run_of(cls, folder, out, patched=False, rate=0.0, **options):
    model = t.AutoModelForImageTextToText.from_pretrained(folder)
    if patched:
        patch_model(model)
    data = rows(pictures)
    if cls is trl.SFTTrainer:
        data = [{key: value for key, value in row.items() if key != "dataset_id"} for row in data]
    run = cls(
        model,
        args=sft_arguments(out, max_length=None, learning_rate=rate),
        train_dataset=Dataset.from_list(data),
        processing_class=load_processor(str(folder)),
        **options,
    )
    run.remove_callback(t.PrinterCallback)
    return run


@pytest.mark.parametrize("layout, patched", [("qwen2_5_vl", True), ("gemma3", False)])
def test_image_rows_tell_their_datasets_and_train_the_same(tmp_path, layout, patched):
    make_vision_model(tmp_path, layout)
    run = run_of(MeritSFTTrainer, tmp_path, tmp_path, patched)
    run.train()
    for name, (loss, *counts) in one_by_one(tmp_path, run.data_collator).items():
        found = run.merit.counts[name]
        assert found.loss_sum == pytest.approx(loss, rel=1e-5)
        own = [found.num_target_tokens, found.num_correct, found.num_tokens, found.num_examples]
        assert own == counts
    theirs = run_of(trl.SFTTrainer, tmp_path, tmp_path, rate=1e-3)
    theirs.train()
    ours = run_of(MeritSFTTrainer, tmp_path, tmp_path, head=False, rate=1e-3)
    ours.train()
    for mine, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_sketches_of_image_rows_are_refused(tmp_path):
    make_vision_model(tmp_path, "llava")
    run = run_of(MeritSFTTrainer, tmp_path, tmp_path, merit=MeritCallback(sketch_every=1))
    with pytest.raises(InputError, match="sketch_every: works with text only, got pixel_values"):
        run.train()


def test_trls_engine_counts_image_rows_by_dataset(tmp_path):
    make_vision_model(tmp_path / "base", "llava")

    def written(number, k):
        return str(write_image(tmp_path / f"{number}-{k}.png", 28, 28, seed=number))

    data = [row for row in rows(written) if row["images"]]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in data))
    columns = ["images", "prompt", "completion", "dataset_id"]
    values = {
        "model_name_or_path": str(tmp_path / "base"),
        "datasets": [{"path": "json", "data_files": [str(file)], "columns": columns}],
        "output_dir": str(tmp_path / "out"),
        "max_length": None,
        "num_train_epochs": 2,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
    }
    (tmp_path / "config.yml").write_text(yaml.safe_dump(values))
    trl_runner.train(str(tmp_path / "config.yml"), "dataset_id")
    counts = json.loads((tmp_path / "out" / "dataset_counts.json").read_text())["datasets"]
    assert {name: each["num_examples"] for name, each in counts.items()} == {"a": 4, "b": 4}
    branch = json.loads((tmp_path / "out" / "branch.json").read_text())
    assert branch["num_target_tokens"] == sum(x["num_target_tokens"] for x in counts.values())
