"""SketchCallback in real Trainers: exact states, untouched training, files, resuming, ranks, refusals."""

import os
from pathlib import Path

import pytest
import torch
from support.checks import assert_close
from support.paths import ROOT, TESTS
from support.warm import run_together
from torch.nn import functional as F

from merit_fast.errors import InputError, MeritFastError
from merit_fast.integrations.trainer import SketchCallback, batches_of_one_dataset, read_states
from merit_fast.kernels.sketch import CountSketch, flat_sketch, matrix_shape

PROJ_DIM = 4096
NAMES = ("alpha", "beta/2")


def llama():
    import transformers as t

    config = t.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(1)
    return t.LlamaForCausalLM(config)


def rows(count=8, mixed=False):
    """Pairs of rows of one dataset in turn, of lengths 5 and 8, the first token without a label."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(count):
        ids = torch.randint(2, 64, (5 + 3 * (i % 2),), generator=generator).tolist()
        name = NAMES[(i if mixed else i // 2) % 2]
        made.append(
            {"input_ids": ids, "labels": [-100, -100, *ids[2:]], "dataset_id": name, "extra": 1}
        )
    return made


def pad(features):
    width = max(len(f["input_ids"]) for f in features)
    assert all("dataset_id" not in f for f in features)  # what a user's collator would choke on
    return {
        key: torch.tensor([f[key] + [fill] * (width - len(f[key])) for f in features])
        for key, fill in (("input_ids", 0), ("labels", -100))
    }


def arguments(directory, **changes):
    import transformers as t

    options = dict(
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        train_sampling_strategy="sequential",
        logging_steps=1,
        dataloader_pin_memory=False,
    )
    return t.TrainingArguments(str(directory), **{**options, **changes})


def trainer(directory, data=None, model=None, held_out=None, **changes):
    import datasets
    import transformers as t

    made = t.Trainer(
        model or llama(),
        arguments(directory, **changes),
        data_collator=pad,
        train_dataset=datasets.Dataset.from_list(rows()) if data is None else data,
        eval_dataset=held_out,
    )
    made.remove_callback(t.PrinterCallback)
    return made


def gradient_sketch(model, features):
    """Sketch and value of the summed token loss of some rows, by plain autograd."""
    batch = pad([{key: f[key] for key in ("input_ids", "labels")} for f in features])
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    parameters = dict(model.named_parameters())
    out = torch.zeros(1, PROJ_DIM)
    for (name, p), g in zip(
        parameters.items(), torch.autograd.grad(loss, parameters.values()), strict=True
    ):
        flat_sketch(
            g.reshape(1, *matrix_shape(p.shape)),
            name,
            CountSketch(PROJ_DIM),
            out=out,
            backend="eager",
        )
    return out[0], float(loss.detach())


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


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
    states, data = read_states(tmp_path / "watched" / "sketches"), rows()
    assert set(states) == set(NAMES)
    for (
        name,
        state,
    ) in states.items():  # the weights stood still, so the truth is that of the first model
        parts = [
            gradient_sketch(llama(), data[i : i + 2])
            for i in range(0, 8, 2)
            if data[i]["dataset_id"] == name
        ]
        assert_close(state.block_sums.sum(0), sum(sketch for sketch, _ in parts))
        assert state.loss_sum == pytest.approx(sum(loss for _, loss in parts), rel=1e-5)
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
    """Then the Trainer divides the mean by the steps; a plain list of rows takes another way through its columns."""
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
    first, second = gradient_sketch(llama(), data[:2]), gradient_sketch(llama(), data[4:6])
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
from test_trainer_callback import PROJ_DIM, SketchCallback, rows, trainer
run = trainer(sys.argv[1], rows(), learning_rate=0.0, max_steps=2, ddp_backend="gloo")
SketchCallback(PROJ_DIM).attach(run)
run.train()
import torch.distributed as dist
dist.barrier()
dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # gloo's threads may otherwise be torn down while they run, which aborts the process
"""


@pytest.mark.process
@pytest.mark.slow
def test_ranks_add_up_to_the_states_of_one_process(tmp_path):
    here = Path(__file__).resolve().parent
    one = trainer(tmp_path / "one", learning_rate=0.0)
    SketchCallback(PROJ_DIM).attach(one)
    one.train()
    command = ["-c", RANK, tmp_path / "two", here, TESTS, ROOT]
    common = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(29500 + os.getpid() % 2000),
    }
    environments = [
        {**os.environ, **common, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(2)
    ]
    ranks = run_together([command] * 2, environments=environments, timeout=300)
    assert [rank.returncode for rank in ranks] == [0, 0], ranks
    single, summed = (
        read_states(tmp_path / "one" / "sketches"),
        read_states(tmp_path / "two" / "sketches"),
    )
    assert single.keys() == summed.keys()
    for name, state in summed.items():
        assert_close(state.block_sums.sum(0), single[name].block_sums.sum(0))
        assert state.loss_sum == pytest.approx(single[name].loss_sum, rel=1e-5)
        assert (state.num_examples, state.num_target_tokens) == (4, single[name].num_target_tokens)


# ---- refusals
def test_rows_of_several_datasets_in_a_batch_are_refused_with_the_way_out(tmp_path):
    import datasets

    run = trainer(tmp_path, rows(mixed=True))
    SketchCallback(PROJ_DIM).attach(run)
    with pytest.raises(InputError, match="a batch must be of one dataset, got alpha, beta/2"):
        run.train()
    assert not any(p._backward_hooks for p in run.model.parameters())

    data = datasets.Dataset.from_list(rows(9, mixed=True))
    run = trainer(tmp_path, data.select(batches_of_one_dataset(data["dataset_id"], 2)))
    SketchCallback(PROJ_DIM).attach(run)
    run.train()
    assert sum(state.num_examples for state in read_states(tmp_path / "sketches").values()) == 8


def test_batches_of_one_dataset_hold_every_full_batch_once():
    ids = ["a"] * 7 + ["b"] * 4 + ["c"]
    order = batches_of_one_dataset(ids, 2, seed=3)
    assert len(order) == len(set(order)) == 6 + 4
    assert all(ids[order[i]] == ids[order[i + 1]] for i in range(0, 10, 2))
    assert order == batches_of_one_dataset(ids, 2, seed=3) != batches_of_one_dataset(ids, 2, seed=4)


def test_what_it_does_not_go_with_is_named(tmp_path):
    import datasets

    without = datasets.Dataset.from_list([{"input_ids": [3, 4], "labels": [3, 4]}])
    with pytest.raises(
        InputError, match="train_dataset: dataset_id: is missing; columns: input_ids, labels"
    ):
        SketchCallback(PROJ_DIM).attach(trainer(tmp_path, without))
    packed = trainer(tmp_path)
    packed.args.packing = True
    with pytest.raises(InputError, match="does not go with packing"):
        SketchCallback(PROJ_DIM).attach(packed)
    half = trainer(tmp_path)
    half.args.fp16 = True
    with pytest.raises(InputError, match="does not go with fp16"):
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
