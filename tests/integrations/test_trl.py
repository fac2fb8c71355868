"""SketchCallback in TRL's SFTTrainer: rows of text in any order, its own loss and its collator."""

import pytest
from support.checks import assert_close
from support.sketch.trainer_runs import PROJ_DIM, gradient_sketch
from support.stacks.trl_runs import sft_run
from support.tiny import TASKS, make_model, make_tokenizer

from merit_fast import patch_model
from merit_fast.errors import InputError
from merit_fast.integrations.trainer import SketchCallback, read_states
from merit_fast.kernels.optimizer import FusedAdamW

trl = pytest.importorskip("trl", reason="trl is not installed")


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trl")
    make_tokenizer(folder)
    make_model(folder)
    return folder


def sft_trainer(base, out, model=None, optimizer=None, column="dataset_id", **changes):
    rows = [
        {"prompt": f"{instruction} {question}", "completion": f" {answer}", column: name}
        for name, (instruction, facts) in TASKS.items()
        for question, answer in list(facts.items())[: 5 if name == "codes" else 6]
    ]
    further = {"optimizers": (optimizer, None)}
    options = {"max_grad_norm": 0.0, "rows": rows, "kwargs": further, **changes}
    return sft_run(trl.SFTTrainer, base, out, model, **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 3}, {"padding_free": True, "max_length": None}],
    ids=["plain", "accumulated", "padding-free"],
)
def test_a_shuffled_dataset_gives_the_sums_over_all_its_rows(base, tmp_path, options):
    import transformers as t

    run = sft_trainer(base, tmp_path, **options)
    SketchCallback(PROJ_DIM).attach(run)
    run.train()
    states = read_states(tmp_path / "sketches")
    assert {name: state.num_examples for name, state in states.items()} == {
        name: 5 if name == "codes" else 6 for name in TASKS
    }
    model = t.AutoModelForCausalLM.from_pretrained(base)
    for name, state in states.items():  # the weights stood still
        own = [row for row in run.train_dataset if row["dataset_id"] == name]
        exact = [gradient_sketch(model, [row]) for row in own]
        assert_close(state.block_sums.sum(0), sum(sketch for sketch, _ in exact))
        assert state.loss_sum == pytest.approx(sum(loss for _, loss in exact), rel=1e-4)
        assert state.num_target_tokens == sum(
            label != -100 for row in own for label in row["labels"][1:]
        )


def test_patched_models_and_our_optimizer_train_as_without_them(base, tmp_path):
    import transformers as t

    def losses(patched):
        model = t.AutoModelForCausalLM.from_pretrained(base)
        if patched:
            patch_model(model)
        optimizer = FusedAdamW(model.parameters(), lr=1e-3)
        run = sft_trainer(base, tmp_path, model, optimizer)
        SketchCallback(PROJ_DIM).attach(run)
        run.train()
        return [entry["loss"] for entry in run.state.log_history if "loss" in entry]

    ours = losses(True)
    assert ours == pytest.approx(losses(False), rel=1e-4)
    assert ours[-1] < ours[0]


def test_packing_and_rows_without_a_dataset_are_refused(base, tmp_path):
    packed = sft_trainer(base, tmp_path, packing=True, max_length=64)
    with pytest.raises(InputError, match="does not work with packing"):
        SketchCallback(PROJ_DIM).attach(packed)
    with pytest.raises(InputError, match="dataset_id: is missing; columns: .*source"):
        SketchCallback(PROJ_DIM).attach(sft_trainer(base, tmp_path, column="source"))
