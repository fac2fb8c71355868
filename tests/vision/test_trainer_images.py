"""SketchCallback in a Trainer whose collator makes batches with images."""

import pytest
from support.checks import assert_close
from support.sketch.exact_gradients import SKETCH, sketch_of_loss
from support.vision.rows import as_example, processed_rows

from merit_fast.data import collate
from merit_fast.data.images import load_processor
from merit_fast.model import freeze_parameters, load_model, target_losses

pytest.importorskip("accelerate", reason="transformers' Trainer needs it")


def test_the_callback_sums_the_gradients_of_rows_with_images(vision_folders, tmp_path):
    """The weights stay (rate 0), so each dataset's sum is the gradient of its summed loss."""
    from transformers import Trainer, TrainingArguments

    from merit_fast.integrations.trainer import SketchCallback

    folder = vision_folders("qwen2_5_vl")
    examples = [as_example(row) for row in processed_rows(load_processor(str(folder)))]
    names = ["one", "two", "one", "two"]
    model = load_model(str(folder), "fp32")
    freeze_parameters(model, None)
    arguments = TrainingArguments(
        str(tmp_path),
        num_train_epochs=1,
        per_device_train_batch_size=2,
        learning_rate=0.0,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=[
            {"example": example, "dataset_id": name}
            for example, name in zip(examples, names, strict=True)
        ],
        data_collator=collate_rows,
    )
    callback = SketchCallback(proj_dim=SKETCH.proj_dim, seed=SKETCH.seed, blocks=2)
    callback.attach(trainer)
    trainer.train()
    for name in ("one", "two"):
        own = [e for e, other in zip(examples, names, strict=True) if other == name]
        batch = collate(own, [0] * len(own), 0)
        exact = sketch_of_loss(model, lambda b=batch: target_losses(model, b).loss.sum())
        state = callback.sketcher.state[name]
        assert_close(state.block_sums.sum(0).float(), exact[0])


def collate_rows(rows):
    batch = collate([row["example"] for row in rows], [0] * len(rows), 0)
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "labels": batch.labels,
        **batch.media,
    }
