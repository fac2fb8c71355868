"""Fine-tunes any causal language model with the transformers Trainer on the kernels of merit_fast.

    python examples/trainer.py MODEL OUT capitals.jsonl codes.jsonl --steps 100 --groups 2

MODEL is a directory or a hub id. Each file of chat, prompt/completion, alpaca or sharegpt rows is
one dataset. Only the assistant's tokens are in the loss. While it trains, SketchCallback sums every
dataset's gradients, from which the datasets are split into groups. OUT holds the trained model,
sketches/ and split.json. Needs the extra ``trainer``.
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from merit_fast import patch_model
from merit_fast.data import DataConfig, DatasetConfig, load_mixture, load_tokenizer
from merit_fast.integrations.sketch_split import split_sketches
from merit_fast.integrations.trainer import SketchCallback
from merit_fast.kernels.optimizer import FusedAdamW
from merit_fast.manifests.io import write_manifest


def main() -> None:
    options = read_options()
    model = AutoModelForCausalLM.from_pretrained(options.model)
    tokenizer = load_tokenizer(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    patch = patch_model(model)
    print(patch)  # modules that run our kernels; modules that stay, with the reason

    optimizer = FusedAdamW(
        model.parameters(), lr=options.learning_rate, master="split", max_norm=1.0
    )
    arguments = TrainingArguments(
        options.out,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        max_grad_norm=0.0,  # the optimizer clips
        save_strategy="no",
        logging_steps=10,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=read_rows(options.rows, tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        optimizers=(optimizer, None),
    )
    SketchCallback().attach(trainer)  # every batch is of one dataset from here on
    trainer.train()

    patch.restore()
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    split = split_sketches(Path(options.out) / "sketches", groups=options.groups)
    write_manifest(split, Path(options.out) / "split.json")
    for dataset in split.datasets:
        print(f"group {dataset.group}: {dataset.name}, {dataset.num_target_tokens} tokens")


def read_rows(paths, tokenizer) -> list[dict]:
    """Token ids, labels and dataset of every row; -100 marks tokens that are not in the loss."""
    template = None if tokenizer.chat_template else "plain"
    mixture = [DatasetConfig(name=Path(path).stem, path=path) for path in paths]
    datasets = load_mixture(mixture, tokenizer, DataConfig(chat_template=template), part="train")
    return [
        {
            "input_ids": example.input_ids.tolist(),
            "labels": example.labels.tolist(),
            "dataset_id": dataset.name,
        }
        for dataset in datasets
        for example in dataset.examples
    ]


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="directory or hub id")
    parser.add_argument("out", help="directory of the trained model")
    parser.add_argument("rows", nargs="+", help="JSONL or Parquet files, one per dataset")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--groups", type=int, default=2, help="groups of the split")
    return parser.parse_args()


if __name__ == "__main__":
    main()
