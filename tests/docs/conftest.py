"""One working directory for every page and example, with the names that they use."""

import json
import shutil

import pytest
from support.docs.pages import ROOT
from support.tiny import TASKS, chat_row, make_model, make_tokenizer

from merit_fast.merge.registry import unregister_method

SEEDS = {"BASE": 0, "A": 1, "B": 2}
# Names in docs/merge.md's section on one's own method.
ALIASES = {"start": "BASE", "model-a": "A", "model-b": "B", "model-c": "BASE"}


def _write_adapter(directory, seed):
    """A LoRA adapter of every query projection, as PEFT writes it."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(directory.parent / "BASE")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(directory)


def _write_steps(folder, names):
    """Distributed checkpoints of these models as a trainer writes them: step-10, step-20."""
    import torch.distributed.checkpoint as dcp
    from transformers import AutoModelForCausalLM

    for number, name in enumerate(names, 1):
        state = {"model": AutoModelForCausalLM.from_pretrained(folder.parent / name).state_dict()}
        dcp.save(state, checkpoint_id=folder / f"step-{10 * number}", no_dist=True)


def _write_rows(folder):
    from datasets import Dataset

    folder.mkdir()
    for name in ("capitals", "codes", "plurals"):
        instruction, answers = TASKS[name]
        rows = [chat_row(instruction, question, answer) for question, answer in answers.items()]
        for ending, part in (("", rows[2:] * 2), (".eval", rows[:2])):
            lines = [json.dumps(row) + "\n" for row in part]
            (folder / f"{name}{ending}.jsonl").write_text("".join(lines))
            Dataset.from_list(part).to_parquet(folder / f"{name}{ending}.parquet")


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """BASE, A, B, two adapters, steps/, data/, and examples/run.yml's finished run in runs/mine."""
    from merit_fast.pipeline.config import read_run_config
    from merit_fast.pipeline.run import Run

    folder = tmp_path_factory.mktemp("docs")
    for name, seed in SEEDS.items():
        make_tokenizer(folder / name)
        make_model(folder / name, seed=seed)
    for alias, name in ALIASES.items():
        (folder / alias).symlink_to(folder / name)
    _write_adapter(folder / "ADAPTER1", 1)
    _write_adapter(folder / "ADAPTER2", 2)
    _write_steps(folder / "steps", ("A", "B"))
    _write_rows(folder / "data")
    (folder / "run.yml").write_text((ROOT / "examples" / "run.yml").read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Run(read_run_config(folder / "run.yml")).all()
    shutil.copy(folder / "runs/mine/split/split.json", folder / "split_of_run.json")
    return folder


@pytest.fixture
def working_directory(workspace, monkeypatch):
    """The workspace, as the current directory. Merge methods of the pages are forgotten after."""
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    yield workspace
    (workspace / "data" / "merit.yml").unlink(missing_ok=True)  # several pages begin with init
    unregister_method("trimmed_mean")
