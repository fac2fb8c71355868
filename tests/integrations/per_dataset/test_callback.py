"""MeritCallback in transformers' Trainer: mixed batches, patched models, sketches, refusals."""

import json

import pytest
import torch
from support.checks import assert_close
from support.sketch.trainer_runs import (
    NAMES,
    PROJ_DIM,
    gradient_sketch,
    llama,
    pad,
    rows,
    run_ranks,
    trainer,
)
from torch.nn import functional as F

from merit_fast import patch_model
from merit_fast.errors import InputError, MeritFastError
from merit_fast.integrations import MeritCallback
from merit_fast.integrations.sketch_files import read_states


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    llama().save_pretrained(folder)
    return folder


def mixed_rows(count=7):
    return rows(count, mixed=True)


def truth(data):
    """Per dataset (loss sum, target tokens, correct tokens), row by row in float64."""
    model = llama().double().eval()
    sums = dict.fromkeys(NAMES, (0.0, 0, 0))
    for row in data:
        labels = torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        loss = float(F.cross_entropy(logits, labels, reduction="sum"))
        correct = int((logits.argmax(-1) == labels).sum())
        more = (loss, int((labels != -100).sum()), correct)
        before = sums[row["dataset_id"]]
        sums[row["dataset_id"]] = tuple(a + b for a, b in zip(before, more, strict=True))
    return sums


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 3}, {"label_smoothing_factor": 0.1}],
    ids=["single", "accumulated", "smoothed"],
)
def test_mixed_batches_tell_their_datasets_apart(tmp_path, start, patched, options):
    data = mixed_rows()
    model = llama()
    if patched:
        patch_model(model)
    run = trainer(
        tmp_path, data, model, learning_rate=0.0, max_steps=-1, num_train_epochs=1, **options
    )
    callback = MeritCallback(start=start).attach(run)
    run.train()
    knows_accuracy = not patched or "label_smoothing_factor" in options
    for name, (loss, targets, correct) in truth(data).items():
        found = callback.counts[name]
        assert found.loss_sum == pytest.approx(loss, rel=1e-5)
        assert found.num_target_tokens == targets
        assert found.num_correct == (correct if knows_accuracy else -1)
        assert found.num_examples == sum(row["dataset_id"] == name for row in data)
    keys = {key for entry in run.state.log_history for key in entry if key.startswith("merit/")}
    assert {f"merit/loss/{name}" for name in NAMES} < keys
    assert (f"merit/accuracy/{NAMES[0]}" in keys) == knows_accuracy


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
def test_training_gives_the_same_bits_and_sketches_are_exact(tmp_path, start, patched):
    def run_of(name, watched, **options):
        model = llama()
        if patched:
            patch_model(model)
        options = {"max_steps": -1, "num_train_epochs": 2, **options}
        run = trainer(tmp_path / name, mixed_rows(), model, **options)
        if watched:
            MeritCallback(start=start, sketch_every=1, proj_dim=PROJ_DIM).attach(run)
        run.train()
        return run

    plain = run_of("plain", watched=False)
    watched = run_of("watched", watched=True)
    pairs = zip(plain.model.parameters(), watched.model.parameters(), strict=True)
    assert all(torch.equal(mine, other) for mine, other in pairs)
    assert not any(parameter._backward_hooks for parameter in watched.model.parameters())

    run_of("still", watched=True, learning_rate=0.0, num_train_epochs=1)
    states = read_states(tmp_path / "still" / "sketches")
    for name, state in states.items():
        own = [row for row in mixed_rows() if row["dataset_id"] == name]
        exact = [gradient_sketch(llama(), [row]) for row in own]
        assert_close(state.block_sums.sum(0), sum(sketch for sketch, _ in exact))
        assert state.loss_sum == pytest.approx(sum(loss for _, loss in exact), rel=1e-5)
        assert state.num_examples == len(own)


def test_a_flattening_collator_and_a_stream_keep_their_datasets(tmp_path, start):
    import datasets
    import transformers as t

    data = mixed_rows()
    stream = datasets.Dataset.from_list(data).to_iterable_dataset()
    run = trainer(tmp_path, stream, learning_rate=0.0, max_steps=4)
    run.data_collator = t.DataCollatorWithFlattening()
    callback = MeritCallback(start=start).attach(run)
    run.train()
    for name, (loss, targets, _) in truth(data).items():
        assert callback.counts[name].loss_sum == pytest.approx(loss, rel=1e-5)
        assert callback.counts[name].num_target_tokens == targets


def test_a_collator_that_makes_labels_of_tokens_keeps_its_datasets(tmp_path, start):
    """Collates as DataCollatorForLanguageModeling; rows of equal length have labels too."""
    import transformers as t
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"a": 0}, "a"))
    tokenizer = t.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="a")
    data = [{**row, "labels": row["input_ids"]} for row in mixed_rows()]
    for rows_of in (data, [{k: v for k, v in row.items() if k != "labels"} for row in data]):
        size = 1 if "labels" in rows_of[0] else 2
        options = {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": size}
        run = trainer(tmp_path, rows_of, learning_rate=0.0, **options)
        run.data_collator = t.DataCollatorForLanguageModeling(tokenizer, mlm=False)
        callback = MeritCallback(start=start).attach(run)
        run.train()
        for name, (loss, targets, _) in truth(data).items():
            assert callback.counts[name].loss_sum == pytest.approx(loss, rel=1e-5)
            assert callback.counts[name].num_target_tokens == targets


def test_the_best_checkpoint_that_is_loaded_keeps_its_own_count(tmp_path, start):
    import datasets

    run = trainer(
        tmp_path,
        mixed_rows(8),
        held_out=datasets.Dataset.from_list(rows(2)),
        learning_rate=5.0,  # the first checkpoint stays the best
        max_steps=4,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    MeritCallback(start=start).attach(run)
    run.train()
    run.save_model()
    best = json.loads(
        (tmp_path / f"checkpoint-{run.state.best_global_step}/branch.json").read_text()
    )
    last = json.loads((tmp_path / "branch.json").read_text())
    assert run.state.best_global_step < run.state.global_step
    assert (last["steps"], last["num_target_tokens"]) == (best["steps"], best["num_target_tokens"])


RANK = """
import json, os, sys
sys.path[:0] = sys.argv[3:]
import datasets
from merit_fast.integrations import MeritCallback
from support.sketch.trainer_runs import PROJ_DIM, rows, trainer
folder, start = sys.argv[1:3]
held_out = datasets.Dataset.from_list(rows(4, mixed=True))

def train(name, resume=None):
    run = trainer(
        f"{folder}/{name}", rows(8, mixed=True), held_out=held_out, learning_rate=0.0,
        max_steps=-1, num_train_epochs=2, ddp_backend="gloo", save_strategy="steps", save_steps=3
    )
    MeritCallback(start=start, sketch_every=1, proj_dim=PROJ_DIM).attach(run)
    run.train(resume_from_checkpoint=resume)
    run.save_model()
    return run

run = train("whole")
metrics = run.evaluate()
if run.args.process_index == 0:
    logged = {"evaluated": metrics, "history": run.state.log_history}
    with open(f"{folder}/logged.json", "w") as file:
        json.dump(logged, file)
train("resumed", f"{folder}/whole/checkpoint-3")
import torch.distributed as dist
dist.barrier()
dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # gloo's threads may otherwise be torn down while they run, which aborts the process
"""


@pytest.mark.process
@pytest.mark.slow
def test_two_ranks_count_as_one_process(tmp_path, start):
    run_ranks(RANK, [tmp_path, start], port=31500)
    data = mixed_rows(8)
    expected = truth(data)
    branch = json.loads((tmp_path / "whole" / "branch.json").read_text())
    assert branch["num_target_tokens"] == 2 * sum(targets for _, targets, _ in expected.values())
    assert branch["num_examples"] == 2 * len(data)
    resumed = json.loads((tmp_path / "resumed" / "branch.json").read_text())
    assert {**resumed, "branch": "whole"} == branch
    counts = json.loads((tmp_path / "resumed" / "dataset_counts.json").read_text())["datasets"]
    logged = json.loads((tmp_path / "logged.json").read_text())
    last = [entry for entry in logged["history"] if "loss" in entry][-1]
    held_out = truth(mixed_rows(4))
    states = read_states(tmp_path / "resumed" / "sketches")
    for name, (loss, targets, correct) in expected.items():
        assert counts[name]["loss_sum"] == pytest.approx(2 * loss, rel=1e-5)
        assert counts[name]["num_correct"] == 2 * correct
        assert last[f"merit/tokens/{name}"] == 2 * targets
        found = logged["evaluated"][f"eval_merit/loss/{name}"]
        assert found == pytest.approx(held_out[name][0] / held_out[name][1], rel=1e-5)
        own = [row for row in data if row["dataset_id"] == name]
        exact = sum(gradient_sketch(llama(), [row])[0] for row in own)
        assert_close(states[name].block_sums.sum(0), 2 * exact)


class ShufflingCollator:
    """Lays rows out in another order each time."""

    def __init__(self):
        self.calls = 0

    def __call__(self, features):
        self.calls += 1
        return pad(features[:: (-1) ** self.calls])


def test_what_would_count_wrongly_is_refused(tmp_path, start):
    run = trainer(tmp_path / "a", mixed_rows())
    run.data_collator = ShufflingCollator()
    MeritCallback(start=start).attach(run)
    with pytest.raises(InputError, match="ShufflingCollator: must lay out the same rows"):
        run.train()

    with pytest.raises(InputError, match="start: must be the directory or hub id of the model"):
        MeritCallback().attach(trainer(tmp_path / "b", mixed_rows()))
    with pytest.raises(InputError, match="sketch_every: must be at least 0, got -1"):
        MeritCallback(sketch_every=-1)

    run = trainer(tmp_path / "c", mixed_rows(), save_strategy="steps", save_steps=2)
    MeritCallback(start=start).attach(run)
    run.train()
    (tmp_path / "c" / "checkpoint-2" / "dataset_counts.json").unlink()
    again = trainer(tmp_path / "c", mixed_rows())
    MeritCallback(start=start).attach(again)
    with pytest.raises(InputError, match=r"checkpoint-2/dataset_counts.json: is missing"):
        again.train(resume_from_checkpoint=str(tmp_path / "c" / "checkpoint-2"))

    run = trainer(tmp_path / "f", mixed_rows())
    run.data_collator = list  # as a trainer of preferences has
    MeritCallback(start=start).attach(run)
    with pytest.raises(InputError, match="data_collator: type: must give a batch with labels"):
        run.train()
    run = trainer(tmp_path / "d")
    run.add_callback(MeritCallback(start=start))
    with pytest.raises(MeritFastError, match=r"give it the Trainer by attach\(trainer\)"):
        run.train()
    bare = [{key: row[key] for key in ("input_ids", "labels")} for row in rows()]
    run = trainer(tmp_path / "e", bare)
    MeritCallback(start=start).attach(run)
    with pytest.raises(InputError, match="dataset_id: is missing in a row"):
        run.train()
