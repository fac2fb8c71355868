"""TRL's trainers of preferences and rewards: our head, our kernels, and what is refused."""

import pytest
import transformers as t
from datasets import Dataset
from support.stacks.trl_runs import assert_same_logs, logs_of
from support.tiny import TASKS

from merit_fast import patch_model
from merit_fast.errors import InputError
from merit_fast.integrations import MeritCallback
from merit_fast.integrations.trl import use_head

trl = pytest.importorskip("trl", reason="trl is not installed")

COMMON = dict(
    learning_rate=1e-3,
    bf16=False,
    report_to=[],
    use_cpu=True,
    disable_tqdm=True,
    save_strategy="no",
    logging_steps=1,
    max_steps=2,
    per_device_train_batch_size=4,
    dataloader_pin_memory=False,
)
SAMPLED = dict(num_generations=2, max_completion_length=6, temperature=0.8, beta=0.1)


def prompts():
    return [
        {
            "prompt": f"{instruction} {question}",
            "chosen": f" {answer}",
            "rejected": " " + answer[::-1],
        }
        for instruction, facts in TASKS.values()
        for question, answer in facts.items()
    ]


def judged():
    return [
        {"prompt": row["prompt"], "completion": row[kind], "label": kind == "chosen"}
        for row in prompts()
        for kind in ("chosen", "rejected")
    ]


def asked():
    return [{"prompt": row["prompt"]} for row in prompts()]


def reward(completions, **kwargs):
    return [float(len(set(text))) for text in completions]


def run_of(kind, base, out, rows, named=False, model=None, **options):
    """TRL's trainer of a kind, such as DPO."""
    rewards = {"reward_funcs": reward} if kind in ("GRPO", "RLOO") else {}
    rows = [{**row, "dataset_id": "a"} for row in rows] if named else rows
    return getattr(trl, f"{kind}Trainer")(
        model or t.AutoModelForCausalLM.from_pretrained(base),
        args=getattr(trl, f"{kind}Config")(str(out), **COMMON, **options),
        train_dataset=Dataset.from_list(rows),
        processing_class=t.AutoTokenizer.from_pretrained(base),
        **rewards,
    )


CASES = {
    "DPO": ("DPO", prompts, {"use_weighting": True}),
    "KTO": ("KTO", judged, {}),
    "KTO, apo": ("KTO", judged, {"loss_type": "apo_zero_unpaired"}),
    "GRPO": ("GRPO", asked, SAMPLED),
    "RLOO": ("RLOO", asked, SAMPLED),
}


@pytest.mark.parametrize("name", CASES)
def test_preference_and_reinforcement_trainers_log_the_same(base, tmp_path, name):
    kind, rows, options = CASES[name]
    theirs = logs_of(run_of(kind, base, tmp_path, rows(), **options))
    run = run_of(kind, base, tmp_path, rows(), **options)
    assert use_head(run) == 1 + (getattr(run, "ref_model", None) is not None)
    assert_same_logs(logs_of(run), theirs)


def reward_run(base, out, patched, named=False):
    t.set_seed(0)  # of the score's weights
    model = t.AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    if patched:
        assert "swiglu x 2" in str(patch_model(model))
    rows = [
        {kind: row["prompt"] + row[kind] for kind in ("chosen", "rejected")} for row in prompts()
    ]
    return run_of("Reward", base, out, rows, named, model)


def test_a_reward_model_trains_the_same_on_our_kernels_and_has_no_head(base, tmp_path):
    theirs = logs_of(reward_run(base, tmp_path, patched=False))
    run = reward_run(base, tmp_path, patched=True)
    with pytest.raises(InputError, match="use_head: RewardTrainer: has no fused head of TRL"):
        use_head(run)
    assert_same_logs(logs_of(run), theirs)


@pytest.mark.parametrize("name", ["DPO", "KTO", "GRPO", "RLOO", "Reward"])
def test_losses_per_dataset_of_other_losses_are_refused_when_attached(base, tmp_path, name):
    if name == "Reward":
        run = reward_run(base, tmp_path, patched=False, named=True)
    else:
        kind, rows, options = CASES[name]
        run = run_of(kind, base, tmp_path, rows(), named=True, **options)
    rule = f"does not work with TRL's {name}Trainer, whose loss is no sum over tokens; SFTTrainer's"
    with pytest.raises(InputError, match=rule):
        MeritCallback().attach(run)
