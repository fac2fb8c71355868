"""Fine-tunes any causal language model with the transformers Trainer on the kernels of merit_fast.

    python examples/trainer.py MODEL OUT ROWS.jsonl --steps 100 --learning-rate 1e-5

MODEL is a directory or a hub id. ROWS are chat, prompt/completion, alpaca or sharegpt rows. Only
the assistant's tokens are in the loss. The trained model lies in OUT. Needs the extra ``trainer``.
"""

import argparse

from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from merit_fast import patch_model
from merit_fast.data import DataConfig, DatasetConfig, load_mixture, load_tokenizer
from merit_fast.kernels.optimizer import FusedAdamW


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
    trainer.train()

    patch.restore()
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)


def read_rows(path, tokenizer) -> list[dict]:
    """Token ids and labels of every row; -100 marks tokens that are not in the loss."""
    template = None if tokenizer.chat_template else "plain"
    rows = DatasetConfig(name="rows", path=path)
    (dataset,) = load_mixture([rows], tokenizer, DataConfig(chat_template=template), part="train")
    return [
        {"input_ids": example.input_ids.tolist(), "labels": example.labels.tolist()}
        for example in dataset.examples
    ]


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="directory or hub id")
    parser.add_argument("out", help="directory of the trained model")
    parser.add_argument("rows", help="JSONL or Parquet file of rows")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
