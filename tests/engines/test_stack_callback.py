"""The callback that any stack takes: kernels, counts and branch.json, with a plain Trainer."""

import importlib
import json
import shutil
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from support.tiny import make_model
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from merit_fast import merge_models
from merit_fast.errors import InputError, MeritFastError
from merit_fast.integrations.stacks.callback import StackCallback
from merit_fast.integrations.stacks.counts import COUNTS_FILE, count_batch

ROWS = [[5, 6, 7, 8, 9][:length] for length in (5, 3, 4, 5, 2, 5)]


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return len(ROWS)

    def __getitem__(self, index):
        ids = ROWS[index]
        return {"input_ids": ids, "labels": [-100, *ids[1:]]}


def collate(rows):
    width = max(len(row["input_ids"]) for row in rows)
    padded = {
        key: torch.tensor([row[key] + [fill] * (width - len(row[key])) for row in rows])
        for key, fill in (("input_ids", 0), ("labels", -100))
    }
    lengths = torch.tensor([[len(row["input_ids"])] for row in rows])
    return {**padded, "attention_mask": (torch.arange(width) < lengths).long()}


def train(folder, base, callback, *, resume=None, **options):
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        num_train_epochs=2,
        save_steps=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    trainer = Trainer(
        LlamaForCausalLM.from_pretrained(base),
        arguments,
        train_dataset=Rows(),
        data_collator=collate,
        callbacks=[callback],
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    return trainer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_model(folder)
    return folder


def test_counts_are_those_of_the_rows_and_merges_weigh_by_them(base, tmp_path, capsys):
    callback = StackCallback(datasets=["a", "b"])
    trainer = train(tmp_path / "whole", base, callback, gradient_accumulation_steps=2)
    assert "merit_fast: kernels: rms_norm" in capsys.readouterr().out
    branch = json.loads((tmp_path / "whole" / "branch.json").read_text())
    assert branch["num_examples"] == 2 * len(ROWS)
    assert branch["num_tokens"] == 2 * sum(map(len, ROWS))
    assert branch["num_target_tokens"] == 2 * sum(len(row) - 1 for row in ROWS)
    assert branch["steps"] == trainer.state.global_step
    assert branch["datasets"] == ["a", "b"]
    half = json.loads((tmp_path / "whole" / "checkpoint-2" / "branch.json").read_text())
    assert half["steps"] == 2 and half["num_examples"] == len(ROWS)
    folders = [tmp_path / "whole", tmp_path / "whole" / "checkpoint-2"]
    summary = merge_models(folders, out=tmp_path / "merged")
    assert summary["weights"] == pytest.approx([2 / 3, 1 / 3])
    trainer.model.eval()(input_ids=torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]]))
    assert callback.counts.num_examples == 2 * len(ROWS)  # an evaluation does not count


def test_a_resumed_run_counts_on_from_its_checkpoint(base, tmp_path):
    train(tmp_path / "run", base, StackCallback())
    whole = json.loads((tmp_path / "run" / "branch.json").read_text())
    train(tmp_path / "run", base, StackCallback(), resume=str(tmp_path / "run" / "checkpoint-2"))
    assert json.loads((tmp_path / "run" / "branch.json").read_text()) == whole
    (tmp_path / "run" / "checkpoint-2" / COUNTS_FILE).unlink()
    with pytest.raises(InputError, match="was saved without merit_fast"):
        train(tmp_path / "run", base, StackCallback(), resume=str(tmp_path / "run/checkpoint-2"))


def test_counts_are_those_of_the_checkpoint_that_the_run_resumes_from(base, tmp_path):
    """Counts of an earlier run, which left a checkpoint of the same step, are not taken."""
    options = {"logging_steps": 1, "gradient_accumulation_steps": 1}
    train(tmp_path / "first", base, StackCallback(), **options)
    train(tmp_path / "other", base, StackCallback(), learning_rate=1e-2, **options)
    counts = tmp_path / "other" / "checkpoint-2" / COUNTS_FILE
    counts.write_text(json.dumps({"num_examples": 90, "num_tokens": 90, "num_target_tokens": 90}))
    named = str(tmp_path / "first" / "checkpoint-2")
    with pytest.raises(InputError, match="is not the checkpoint that this run resumes from"):
        train(tmp_path / "other", base, StackCallback(), resume=named, **options)
    told = {**options, "resume_from_checkpoint": named}
    train(tmp_path / "other", base, StackCallback(), resume=named, **told)
    branches = [json.loads((tmp_path / x / "branch.json").read_text()) for x in ("first", "other")]
    assert {**branches[1], "branch": "first"} == branches[0]
    state = tmp_path / "first" / "checkpoint-2" / "trainer_state.json"
    values = json.loads(state.read_text())
    values["log_history"][0]["grad_norm"] = float("nan")
    state.write_text(json.dumps(values))
    shutil.rmtree(tmp_path / "first" / "checkpoint-4")
    train(tmp_path / "first", base, StackCallback(), resume=named, **options)


def test_a_callback_of_two_trainers_counts_each_of_them_once(base, tmp_path, capsys):
    callback = StackCallback()
    for name in ("one", "two"):
        train(tmp_path / name, base, callback)
        assert "merit_fast: kernels: rms_norm" in capsys.readouterr().out
        branch = json.loads((tmp_path / name / "branch.json").read_text())
        assert branch["num_examples"] == 2 * len(ROWS)
    other = LlamaForCausalLM.from_pretrained(base).train()
    callback.watch(other)
    callback.watch(other)
    other(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]]))
    assert callback.counts.num_examples == 2 * len(ROWS) + 1


def test_a_run_without_target_tokens_leaves_no_branch_json(base, tmp_path):
    folder = tmp_path / "run"
    train(folder, base, StackCallback())
    arguments = TrainingArguments(output_dir=str(folder), report_to="none", use_cpu=True)
    state = SimpleNamespace(global_step=0, best_model_checkpoint=None)
    StackCallback().on_train_end(arguments, state, None)
    assert not (folder / "branch.json").exists()


@pytest.fixture
def plugin(monkeypatch):
    """Our axolotl plugin, next to an axolotl that has its base class only."""
    pytest.importorskip("pydantic", reason="pydantic is not installed")
    name = "merit_fast.integrations.axolotl"
    modules = {n: ModuleType(n) for n in ("axolotl", "axolotl.integrations")}
    modules["axolotl.integrations.base"] = ModuleType("axolotl.integrations.base")
    modules["axolotl.integrations.base"].BasePlugin = object
    for key, module in modules.items():
        monkeypatch.setitem(sys.modules, key, module)
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(name)
    sys.modules.pop(name)


def test_the_optimizer_of_axolotl_gets_the_rate_and_the_seed_of_its_arguments(plugin, tmp_path):
    arguments = TrainingArguments(
        output_dir=str(tmp_path), learning_rate=3e-4, adam_beta2=0.9, seed=7, use_cpu=True
    )
    options = plugin.optimizer_kwargs({"moments": "int8"}, arguments)
    expected = {"lr": 3e-4, "betas": (0.9, 0.9), "eps": 1e-8, "seed": 7, "moments": "int8"}
    assert {key: options[key] for key in expected} == expected
    arguments.optim_args = "a=1"
    with pytest.raises(InputError, match="optim_args: must be absent with merit_optimizer"):
        plugin.optimizer_kwargs({}, arguments)


def test_a_batch_is_counted_by_its_labels_mask_and_positions():
    labels = torch.tensor([[-100, 4, 5, -100, 7, 8]])
    packed = count_batch(
        {
            "input_ids": torch.ones(1, 6, dtype=torch.long),
            "labels": labels,
            "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]),
        }
    )
    assert (packed.num_examples, packed.num_tokens, packed.num_target_tokens) == (2, 6, 4)
    mask = torch.tensor([[1, 1, 1, 2, 2, 0]])  # axolotl numbers the examples of a packed row
    masked = count_batch({"input_ids": labels.abs(), "labels": labels, "attention_mask": mask})
    assert (masked.num_examples, masked.num_tokens) == (1, 5)
    shifted = count_batch({"input_ids": labels.abs(), "shift_labels": labels})
    assert shifted.num_target_tokens == 4
    embedded = count_batch({"inputs_embeds": torch.ones(1, 6, 2), "labels": labels})
    assert embedded.num_tokens == 6
    with pytest.raises(MeritFastError, match="has no labels"):
        count_batch({"input_ids": labels})


def test_label_smoothing_takes_the_labels_away_and_is_refused(base, tmp_path):
    with pytest.raises(MeritFastError, match="a training batch has no labels"):
        train(tmp_path / "run", base, StackCallback(), label_smoothing_factor=0.1)


def test_a_model_of_no_folder_needs_a_start(tmp_path, base):
    model = make_model(tmp_path / "made")
    model.config._name_or_path = ""
    with pytest.raises(InputError, match="start: must name the model"):
        StackCallback().watch(model)
    StackCallback(start=base).watch(model)


@pytest.mark.parametrize(
    "values, rule",
    [
        ({"stage": "dpo"}, "stage: must be sft or pt, whose tokens can be counted, got 'dpo'"),
        ({"merit_losses": True}, "merit_losses: must be absent: LLaMA-Factory's rows lose"),
        ({"merit_kernels": "auto"}, "merit_kernels: must be absent: it is a key of merit_fast's"),
    ],
)
def test_what_the_callback_cannot_do_in_llamafactory_is_refused(values, rule):
    from merit_fast.integrations.llamafactory import train as train_there

    with pytest.raises(InputError, match=rule):
        train_there(values)
