"""SketchCallback in real Trainers: exact states, untouched training, files, ranks, refusals."""

import pytest
import torch
from support.checks import assert_close
from support.sketch.trainer_runs import (
    NAMES,
    PROJ_DIM,
    gradient_sketch,
    llama,
    losses,
    rows,
    run_ranks,
    trainer,
)

from merit_fast.errors import InputError, MeritFastError
from merit_fast.integrations.trainer import SketchCallback, batches_of_one_dataset, read_states


@pytest.mark.parametrize(
    "accumulation,workers", [(1, 0), (2, 1)], ids=["plain", "accumulated, in a worker"]
)
def test_states_are_exact_and_training_does_not_notice(tmp_path, accumulation, workers):
    options = dict(
        gradient_accumulation_steps=accumulation,
        max_steps=4 // accumulation,
        dataloader_num_workers=workers,
    )
    plain = trainer(tmp_path / "plain", **options)
    plain.train()
    watched = trainer(tmp_path / "watched", learning_rate=0.0, **options)
    SketchCallback(PROJ_DIM).attach(watched)
    watched.train()
    states = read_states(tmp_path / "watched" / "sketches")
    data = rows()
    assert set(states) == set(NAMES)
    for name, state in states.items():  # the weights stood still: the first model is the truth
        exact = [
            gradient_sketch(llama(), data[i : i + 2])
            for i in range(0, 8, 2)
            if data[i]["dataset_id"] == name
        ]
        assert_close(state.block_sums.sum(0), sum(sketch for sketch, _ in exact))
        assert state.loss_sum == pytest.approx(sum(loss for _, loss in exact), rel=1e-5)
        assert state.num_examples == 4 and state.num_target_tokens == 2 * (3 + 6)
        assert state.block_counts.tolist() == [2, 2, 0, 0, 0, 0, 0, 0]

    moving = trainer(tmp_path / "moving", **options)
    SketchCallback(PROJ_DIM).attach(moving)
    moving.train()
    assert losses(moving) == losses(plain)
    both = zip(moving.model.parameters(), plain.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in both)
    assert not any(p._backward_hooks for p in moving.model.parameters())


def test_a_model_without_loss_arguments_and_rows_in_a_list(tmp_path):
    """Checks a model whose Trainer divides the mean by the steps.

    A plain list of rows has no columns to select.
    """
    import transformers as t

    class Strict(t.LlamaForCausalLM):
        accepts_loss_kwargs = False

    model = Strict(llama().config)
    model.load_state_dict(llama().state_dict())
    run = trainer(
        tmp_path,
        rows(),
        model,
        learning_rate=0.0,
        max_steps=2,
        gradient_accumulation_steps=2,
        bf16=False,
    )
    SketchCallback(PROJ_DIM).attach(run)
    run.train()
    data = rows()
    first = gradient_sketch(llama(), data[:2])
    second = gradient_sketch(llama(), data[4:6])
    state = read_states(tmp_path / "sketches")["alpha"]
    assert_close(state.block_sums.sum(0), first[0] + second[0])
    assert state.loss_sum == pytest.approx(first[1] + second[1], rel=1e-5)


def test_a_resumed_run_ends_with_the_states_of_one_that_never_stopped(tmp_path):
    whole = trainer(tmp_path / "whole")
    SketchCallback(PROJ_DIM).attach(whole)
    whole.train()

    cut = trainer(tmp_path / "cut", save_strategy="steps", save_steps=3)
    SketchCallback(PROJ_DIM).attach(cut)
    cut.train()
    assert read_states(tmp_path / "cut" / "checkpoint-3" / "sketches")["alpha"].num_examples == 4
    (tmp_path / "cut" / "sketches" / "alpha.safetensors").unlink()

    again = trainer(tmp_path / "cut", save_strategy="steps", save_steps=3)
    SketchCallback(PROJ_DIM).attach(again)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    for name, state in read_states(tmp_path / "cut" / "sketches").items():
        expected = read_states(tmp_path / "whole" / "sketches")[name]
        assert torch.equal(state.block_sums, expected.block_sums)
        assert state.to_bytes() == expected.to_bytes()

    other = trainer(tmp_path / "cut")
    SketchCallback(PROJ_DIM, parameters="mlp").attach(other)
    with pytest.raises(MeritFastError, match="disagree in parameters"):
        other.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))


def test_evaluation_during_training_leaves_no_trace(tmp_path):
    import datasets

    run = trainer(
        tmp_path, held_out=datasets.Dataset.from_list(rows(2)), eval_strategy="steps", eval_steps=1
    )
    SketchCallback(PROJ_DIM).attach(run)
    run.train()
    assert sum("eval_loss" in entry for entry in run.state.log_history) == 4
    assert read_states(tmp_path / "sketches")["alpha"].num_examples == 4


RANK = """
import os, sys
sys.path[:0] = sys.argv[2:]
from merit_fast.integrations.trainer import SketchCallback, read_states
from support.sketch.trainer_runs import PROJ_DIM, rows, trainer
folder = sys.argv[1]

def train(name, resume=None, **options):
    run = trainer(
        f"{folder}/{name}", rows(9, mixed=True), max_steps=-1, num_train_epochs=2,
        train_sampling_strategy="random", ddp_backend="gloo", **options
    )
    SketchCallback(PROJ_DIM).attach(run)
    run.train(resume_from_checkpoint=resume)

train("still", learning_rate=0.0)
train("moving", save_strategy="steps", save_steps=4)  # the first step of epoch 2, of three
train("resumed", f"{folder}/moving/checkpoint-4")
import torch.distributed as dist
dist.barrier()
dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # gloo's threads may otherwise be torn down while they run, which aborts the process
"""


@pytest.mark.process
@pytest.mark.slow
def test_ranks_add_up_to_the_states_of_one_process(tmp_path):
    single = trainer(
        tmp_path / "one", rows(9, mixed=True), learning_rate=0.0, max_steps=-1, num_train_epochs=2
    )
    SketchCallback(PROJ_DIM).attach(single)
    single.train()
    run_ranks(RANK, [tmp_path], port=29500)
    expected = read_states(tmp_path / "one" / "sketches")
    summed = read_states(tmp_path / "still" / "sketches")
    assert {name: state.num_examples for name, state in summed.items()} == {
        "alpha": 10,
        "beta/2": 8,
    }
    for name, state in summed.items():
        assert_close(state.block_sums.sum(0), expected[name].block_sums.sum(0))
        assert state.loss_sum == pytest.approx(expected[name].loss_sum, rel=1e-5)
        assert state.num_target_tokens == expected[name].num_target_tokens
    moving = read_states(tmp_path / "moving" / "sketches")
    for name, state in read_states(tmp_path / "resumed" / "sketches").items():
        assert torch.equal(state.block_sums.sum(0), moving[name].block_sums.sum(0))
        assert (
            state.loss_sum == moving[name].loss_sum
            and state.num_examples == 2 * {"alpha": 5, "beta/2": 4}[name]
        )


# ---- refusals
def test_rows_of_several_datasets_in_a_batch_as_given_are_refused_with_the_way_out(tmp_path):
    import datasets

    run = trainer(tmp_path, rows(mixed=True))
    SketchCallback(PROJ_DIM).attach(run, sampler="as given")
    with pytest.raises(InputError, match="a batch must be of one dataset, got alpha, beta/2"):
        run.train()
    assert not any(p._backward_hooks for p in run.model.parameters())

    data = datasets.Dataset.from_list(rows(9, mixed=True))
    run = trainer(tmp_path, data.select(batches_of_one_dataset(data["dataset_id"], 2)))
    SketchCallback(PROJ_DIM).attach(run, sampler="as given")
    run.train()
    assert sum(state.num_examples for state in read_states(tmp_path / "sketches").values()) == 8


def test_what_it_does_not_work_with_is_named(tmp_path):
    import datasets

    without = datasets.Dataset.from_list([{"input_ids": [3, 4], "labels": [3, 4]}])
    with pytest.raises(
        InputError, match="train_dataset: dataset_id: is missing; columns: input_ids, labels"
    ):
        SketchCallback(PROJ_DIM).attach(trainer(tmp_path, without))
    packed = trainer(tmp_path)
    packed.args.packing = True
    with pytest.raises(InputError, match="does not work with packing"):
        SketchCallback(PROJ_DIM).attach(packed)
    half = trainer(tmp_path)
    half.args.fp16 = True
    with pytest.raises(InputError, match="does not work with fp16"):
        SketchCallback(PROJ_DIM).attach(half)
    run = trainer(tmp_path)
    run.add_callback(SketchCallback(PROJ_DIM))
    with pytest.raises(MeritFastError, match=r"give it the Trainer by attach\(trainer\)"):
        run.train()
    callback = SketchCallback(PROJ_DIM).attach(trainer(tmp_path))
    with pytest.raises(MeritFastError, match="is attached already"):
        callback.attach(trainer(tmp_path))
    bare = [{key: row[key] for key in ("input_ids", "labels")} for row in rows()]
    run = trainer(tmp_path, bare)
    SketchCallback(PROJ_DIM).attach(run)
    with pytest.raises(InputError, match="dataset_id: is missing in a row"):
        run.train()
