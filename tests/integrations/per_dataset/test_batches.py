"""MeritCallback on unusual batches and models: no tokens in the rows, no datasets, model_init."""

import json

import datasets
import pytest
import torch
import transformers as t
from support.sketch.trainer_runs import NAMES, arguments, llama, pad, rows, trainer

from merit_fast.errors import InputError
from merit_fast.integrations import MeritCallback
from merit_fast.integrations.per_dataset.codes import CODES, BatchDatasets, CollatorWithCodes
from merit_fast.integrations.per_dataset.codes import NAMES as NAMES_OF_BATCH
from merit_fast.integrations.per_dataset.outputs import write_outputs
from merit_fast.integrations.per_dataset.sketches import unpacked
from merit_fast.integrations.per_dataset.sums import Counts


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    llama().save_pretrained(folder)
    return folder


def tokenising_collator(features):
    """Makes tokens of texts, as collators of images do, with the padding on the left."""
    width = max(len(feature["text"]) for feature in features)
    ids = torch.zeros(len(features), width, dtype=torch.long)
    mask = torch.zeros(len(features), width, dtype=torch.long)
    for line, feature in enumerate(features):
        length = len(feature["text"])
        ids[line, width - length :] = torch.tensor(feature["text"])
        mask[line, width - length :] = 1
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def test_padding_of_rows_without_tokens_is_not_counted(tmp_path, start):
    data = [
        {"text": row["input_ids"], "dataset_id": row["dataset_id"]} for row in rows(6, mixed=True)
    ]
    options = {"max_steps": -1, "num_train_epochs": 1, "remove_unused_columns": False}
    run = t.Trainer(
        llama(),
        arguments(tmp_path, **options),
        data_collator=tokenising_collator,
        train_dataset=datasets.Dataset.from_list(data),
    )
    callback = MeritCallback(start=start).attach(run)
    run.train()
    for name in NAMES:
        own = [row["text"] for row in data if row["dataset_id"] == name]
        found = callback.counts[name]
        assert found.num_examples == len(own)
        assert found.num_tokens == sum(map(len, own))


def packing_collator(packs):
    """Puts each list of rows into one line, as axolotl packs, and pads the lines by 0."""
    lines = {
        key: [[value for row in pack for value in row[key]] for pack in packs]
        for key in ("input_ids", "labels")
    }
    width = max(map(len, lines["labels"]))
    return {
        key: torch.tensor([line + [fill] * (width - len(line)) for line in lines[key]])
        for key, fill in (("input_ids", 0), ("labels", -100))
    }


def test_lists_of_rows_that_become_one_line_keep_their_datasets():
    """Batches of axolotl's sampler hold lists of rows."""
    data = [
        {"input_ids": [3] * length, "labels": [3] * length, "dataset_id": name}
        for length, name in ((2, "a"), (3, "b"), (4, "a"))
    ]
    batch = CollatorWithCodes(packing_collator, "dataset_id")([data[:2], data[2:]])
    owners = BatchDatasets(batch[CODES], batch[NAMES_OF_BATCH])
    assert owners.names == ["a", "b"]
    assert owners.of_tokens.tolist() == [[0, 0, 1, 1, 1], [0, 0, 0, 0, -1]]
    assert owners.starts.nonzero().tolist() == [[0, 0], [0, 2], [1, 0]]
    assert batch["input_ids"].tolist() == [[3] * 5, [3] * 4 + [0]]


class PlainRows(torch.utils.data.Dataset):
    """Rows that name no columns."""

    def __init__(self, listed):
        self.listed = listed

    def __len__(self):
        return len(self.listed)

    def __getitem__(self, index):
        return self.listed[index]


def test_an_evaluation_of_rows_without_datasets_stays_as_it_is(tmp_path, start):
    bare = [{key: row[key] for key in ("input_ids", "labels")} for row in rows(4)]
    run = trainer(tmp_path, rows(6, mixed=True), held_out=datasets.Dataset.from_list(bare))
    expected = run.evaluate()["eval_loss"]
    run.eval_dataset = PlainRows(bare)
    MeritCallback(start=start).attach(run)
    metrics = run.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert not any("merit" in key for key in metrics)


def test_every_model_of_model_init_is_watched_and_counted_from_zero(tmp_path, start):
    data = rows(6, mixed=True)
    run = t.Trainer(
        model_init=llama,
        args=arguments(tmp_path, max_steps=3),
        data_collator=pad,
        train_dataset=datasets.Dataset.from_list(data),
    )
    callback = MeritCallback(start=start).attach(run)
    for _ in range(2):
        run.train()
        tokens = sum(value.num_tokens for value in callback.counts.values())
        assert tokens == sum(len(row["input_ids"]) for row in data)


def test_a_checkpoint_has_its_counts_before_it_is_whole(tmp_path, start, monkeypatch):
    run = trainer(tmp_path, rows(6, mixed=True), save_strategy="steps", save_steps=2)
    MeritCallback(start=start, sketch_every=1, proj_dim=4096).attach(run)
    seen = []
    save_to_json = t.TrainerState.save_to_json

    def spy(state, path):
        folder = tmp_path / f"checkpoint-{state.global_step}"
        branch = json.loads((folder / "branch.json").read_text())
        seen.append(branch["steps"])
        assert (folder / "dataset_counts.json").is_file() and any(folder.glob("sketches/*"))
        save_to_json(state, path)

    monkeypatch.setattr(t.TrainerState, "save_to_json", spy)
    run.train()
    assert seen == [2, 4]


@pytest.mark.parametrize("positions", [None, torch.arange(6)[None]], ids=["none", "running"])
def test_rows_whose_examples_see_one_another_are_not_sketched(positions):
    ids = torch.arange(6)[None] + 3
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions}
    tail = BatchDatasets(torch.tensor([[0, 0, 0, 3, 2, 2]]), ["x", "y"])  # of x, then all of y
    with pytest.raises(InputError, match="got wrapped"):
        unpacked(batch, tail)
    batch["position_ids"] = torch.tensor([[4, 5, 6, 0, 1, 2]])
    parts = unpacked(batch, tail)
    assert [example.input_ids.tolist() for name in "xy" for example in parts[name]] == [
        [3, 4, 5],
        [6, 7, 8],
    ]


def test_a_run_without_target_tokens_leaves_no_branch_json(tmp_path):
    (tmp_path / "branch.json").write_text("of an earlier run")
    write_outputs(tmp_path, Counts({}, "0" * 32, 0), steps=0, seed=0)
    assert not (tmp_path / "branch.json").exists()
