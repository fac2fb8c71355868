"""Fine-tunes with TRL's SFTTrainer on the kernels of merit_fast, and sketches while it trains.

    python examples/trl_sft.py MODEL OUT capitals.jsonl codes.jsonl --steps 100 --groups 2

MODEL is a directory or a hub id. Each JSONL file is one dataset, of rows that SFTTrainer takes:
``messages``, ``prompt`` and ``completion``, or ``text``. OUT holds the trained model, sketches/ and
split.json. Needs trl.
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from merit_fast import patch_model
from merit_fast.integrations.sketch_split import split_sketches
from merit_fast.integrations.trainer import SketchCallback
from merit_fast.kernels.optimizer import FusedAdamW
from merit_fast.manifests.io import write_manifest


def main() -> None:
    options = read_options()
    model = AutoModelForCausalLM.from_pretrained(options.model)

    # Before SFTTrainer is made: it gives the model a forward with a fused head of its own.
    patch = patch_model(model)
    print(patch)

    optimizer = FusedAdamW(
        model.parameters(), lr=options.learning_rate, master="split", max_norm=1.0
    )
    arguments = SFTConfig(
        options.out,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        bf16=torch.cuda.is_available(),  # SFTConfig's default fails without a GPU
        max_grad_norm=0.0,  # the optimizer clips
        save_strategy="no",
        logging_steps=10,
    )
    trainer = SFTTrainer(
        model,
        arguments,
        train_dataset=read_rows(options.rows),  # SFTTrainer keeps the column dataset_id
        processing_class=AutoTokenizer.from_pretrained(options.model),
        optimizers=(optimizer, None),
    )
    SketchCallback().attach(trainer)  # every batch is of one dataset from here on
    trainer.train()

    patch.restore()
    trainer.save_model(options.out)
    split = split_sketches(Path(options.out) / "sketches", groups=options.groups)
    write_manifest(split, Path(options.out) / "split.json")
    for dataset in split.datasets:
        print(f"group {dataset.group}: {dataset.name}, {dataset.num_target_tokens} tokens")


def read_rows(paths) -> Dataset:
    """All rows of all files, with the file's name as their dataset."""
    return Dataset.from_list(
        [
            {**json.loads(line), "dataset_id": Path(path).stem}
            for path in paths
            for line in Path(path).read_text(encoding="utf-8").splitlines()
        ]
    )


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="directory or hub id")
    parser.add_argument("out", help="directory of the trained model")
    parser.add_argument("rows", nargs="+", help="JSONL files, one per dataset")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--groups", type=int, default=2, help="groups of the split")
    return parser.parse_args()


if __name__ == "__main__":
    main()
