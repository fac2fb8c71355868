"""SketchCallback makes batches of one dataset out of rows in any order, and loses no row."""

import datasets
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from support.checks import assert_close
from support.sketch.trainer_runs import (
    NAMES,
    PROJ_DIM,
    gradient_sketch,
    llama,
    rows,
    trainer,
)

from merit_fast.errors import InputError, MeritFastError
from merit_fast.integrations.trainer import (
    OneDatasetBatches,
    SketchCallback,
    batches_of_one_dataset,
    read_states,
)

IDS = ["a", "b", "a", "c", "a", "b", "a", "b", "a", "a", "b", "a"]  # 7 a, 4 b, 1 c


# ---- the batches
@pytest.mark.parametrize("order", ["random", "sequential"])
def test_every_row_stands_in_one_batch_of_its_dataset(order):
    batches = list(OneDatasetBatches(IDS, 3, seed=1, order=order))
    assert sorted(row for batch in batches for row in batch) == list(range(12))
    assert all(len({IDS[row] for row in batch}) == 1 for batch in batches)
    assert sorted(map(len, batches)) == [1, 1, 1, 3, 3, 3]
    assert len(OneDatasetBatches(IDS, 3)) == len(batches) == 6


def test_the_order_depends_on_seed_and_epoch_only():
    def batches(seed, epoch, **options):
        sampler = OneDatasetBatches(IDS, 2, seed, **options)
        sampler.set_epoch(epoch)
        return list(sampler)

    torch.manual_seed(1)
    first = batches(3, 1)
    torch.manual_seed(2)
    assert first == batches(3, 1)
    assert first != batches(3, 0) and first != batches(4, 1)
    sequential = batches(3, 1, order="sequential")
    assert sequential == [[0, 2], [1, 5], [4, 6], [8, 9], [7, 10], [3], [11]]
    assert sequential == batches(4, 0, order="sequential")


@pytest.mark.parametrize("num_processes", [2, 3, 4, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_processes_share_all_rows_in_as_many_batches_each(num_processes, batch_size):
    """accelerate would repeat batches on some processes, and their rows would count twice."""
    sampler = OneDatasetBatches(IDS, batch_size, num_processes=num_processes)
    shares = [
        list(BatchSamplerShard(sampler, num_processes, process)) for process in range(num_processes)
    ]
    seen = sorted(row for share in shares for batch in share for row in batch)
    assert len({len(share) for share in shares}) == 1
    if batch_size > 1 or 12 % num_processes == 0:
        assert seen == list(range(12))
    else:  # batches of one row cannot be cut: some rows are repeated, none is left out
        assert set(seen) == set(range(12))


def test_rows_of_similar_length_share_a_batch():
    ids = ["a", "b"] * 20
    lengths = [5 * (i % 7) for i in range(40)]
    batches = list(OneDatasetBatches(ids, 4, lengths=lengths))
    assert sorted(row for batch in batches for row in batch) == list(range(40))
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in batches]
    assert max(spread) <= 15 and sum(spread) / len(spread) <= 10


def test_smaller_batches_are_left_out_only_by_request():
    sampler = OneDatasetBatches(IDS[:3] + IDS[4:], 2, drop_last=True)
    assert {len(batch) for batch in sampler} == {2}
    assert len(sampler) == 5 and sampler.num_left_out == 1
    shared = OneDatasetBatches(IDS[:3] + IDS[4:], 2, drop_last=True, num_processes=2)
    assert len(list(shared)) == len(shared) == 4 and shared.num_left_out == 3
    with pytest.raises(InputError, match="must be false unless each dataset has 2 rows.* got c"):
        OneDatasetBatches(IDS, 2, drop_last=True)


def test_batches_of_one_dataset_hold_every_full_batch_once():
    ids = ["a"] * 7 + ["b"] * 4 + ["c"]
    order = batches_of_one_dataset(ids, 2, seed=3)
    assert len(order) == len(set(order)) == 6 + 4
    assert all(ids[order[i]] == ids[order[i + 1]] for i in range(0, 10, 2))
    assert order == batches_of_one_dataset(ids, 2, seed=3) != batches_of_one_dataset(ids, 2, seed=4)


# ---- in a Trainer
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2, "dataloader_num_workers": 1},
        {"train_sampling_strategy": "group_by_length"},
        {"remove_unused_columns": False},
    ],
    ids=["plain", "accumulated, in a worker", "by length", "all columns"],
)
def test_a_shuffled_dataset_gives_the_sums_over_all_its_rows(tmp_path, options):
    data = rows(9, mixed=True)  # the weights stand still: sums depend on no order
    if "remove_unused_columns" in options:
        data = [{k: v for k, v in row.items() if k != "extra"} for row in data]
    options = {"train_sampling_strategy": "random", **options}
    run = trainer(
        tmp_path,
        datasets.Dataset.from_list(data),
        learning_rate=0.0,
        max_steps=-1,
        num_train_epochs=2,
        **options,
    )
    SketchCallback(PROJ_DIM).attach(run)
    run.train()
    states = read_states(tmp_path / "sketches")
    assert set(states) == set(NAMES)
    for name, state in states.items():
        own = [gradient_sketch(llama(), [row]) for row in data if row["dataset_id"] == name]
        assert state.num_examples == 2 * len(own)
        assert_close(state.block_sums.sum(0), 2 * sum(sketch for sketch, _ in own))
        assert state.loss_sum == pytest.approx(2 * sum(loss for _, loss in own), rel=1e-5)


def test_a_run_resumed_within_an_epoch_sees_the_remaining_rows(tmp_path):
    def shuffled(name, **options):
        run = trainer(
            tmp_path / name,
            rows(9, mixed=True),
            max_steps=-1,
            num_train_epochs=2,
            train_sampling_strategy="random",
            **options,
        )
        SketchCallback(PROJ_DIM).attach(run)
        return run

    shuffled("whole").train()
    shuffled("cut", save_strategy="steps", save_steps=7).train()  # the second step of epoch 2
    (tmp_path / "cut" / "sketches" / "alpha.safetensors").unlink()
    shuffled("cut").train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-7"))
    for name, state in read_states(tmp_path / "cut" / "sketches").items():
        expected = read_states(tmp_path / "whole" / "sketches")[name]
        assert state.to_bytes() == expected.to_bytes()


def test_a_batch_size_that_is_found_by_trial_starts_the_sums_again(tmp_path):
    import transformers as t

    class Small(t.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, **inputs):
            if len(input_ids) > 2:
                raise RuntimeError("CUDA out of memory.")
            return super().forward(input_ids=input_ids, labels=labels, **inputs)

    run = trainer(
        tmp_path,
        rows(9, mixed=True),
        Small(llama().config),
        max_steps=-1,
        num_train_epochs=1,
        per_device_train_batch_size=4,
        auto_find_batch_size=True,
    )
    SketchCallback(PROJ_DIM).attach(run)
    run.train()
    states = read_states(tmp_path / "sketches")
    assert {name: state.num_examples for name, state in states.items()} == {"alpha": 5, "beta/2": 4}


def test_a_stream_keeps_its_batches(tmp_path):
    stream = datasets.Dataset.from_list(rows()).to_iterable_dataset()
    run = trainer(tmp_path / "pairs", stream)
    SketchCallback(PROJ_DIM).attach(run)
    run.train()
    assert read_states(tmp_path / "pairs" / "sketches")["alpha"].num_examples == 4
    mixed = datasets.Dataset.from_list(rows(mixed=True)).to_iterable_dataset()
    run = trainer(tmp_path / "mixed", mixed)
    SketchCallback(PROJ_DIM).attach(run)
    with pytest.raises(InputError, match="a batch must be of one dataset, got alpha, beta/2"):
        run.train()


# ---- refusals
def test_samplers_that_it_cannot_regroup_are_named(tmp_path):
    import transformers as t

    class Weighted(t.Trainer):
        def _get_train_sampler(self, train_dataset=None):
            return torch.utils.data.WeightedRandomSampler([1.0] * 8, 8)

    plain = trainer(tmp_path, rows())
    run = Weighted(plain.model, plain.args, data_collator=plain.data_collator, train_dataset=rows())
    SketchCallback(PROJ_DIM).attach(run)
    with pytest.raises(InputError, match="got a WeightedRandomSampler; attach.*'as given'"):
        run.train()
    run = trainer(tmp_path, rows(), train_sampling_strategy="batch_rebalance")
    SketchCallback(PROJ_DIM).attach(run)
    with pytest.raises(InputError, match="got a BatchRebalanceSampler"):
        run.train()
    with pytest.raises(InputError, match="sampler: must be 'one dataset' or 'as given', got 'all'"):
        SketchCallback(PROJ_DIM).attach(trainer(tmp_path), sampler="all")


@pytest.mark.parametrize("value", [None, "", 1.5, True])
def test_a_row_whose_id_names_no_dataset_is_refused(tmp_path, value):
    data = rows()
    data[3]["dataset_id"] = value
    run = trainer(tmp_path, data)
    SketchCallback(PROJ_DIM).attach(run)
    with pytest.raises(InputError, match="dataset_id: must be a non-empty str or an int, got"):
        run.train()


def test_a_loader_that_bypasses_accelerate_is_refused(tmp_path):
    run = trainer(tmp_path)
    run.get_train_dataloader = lambda: torch.utils.data.DataLoader(
        rows(), collate_fn=run.data_collator
    )
    SketchCallback(PROJ_DIM).attach(run)
    with pytest.raises(MeritFastError, match="does not give a DataLoader to accelerator.prepare"):
        run.train()
