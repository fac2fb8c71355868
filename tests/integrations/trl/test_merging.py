"""MergeModelCallback merges the checkpoints of a real SFTTrainer, without mergekit."""

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.stacks.trl_runs import sft_run
from support.tiny import make_model, make_tokenizer

from merit_fast.errors import InputError
from merit_fast.integrations.trl import MergeConfig, MergeModelCallback

trl = pytest.importorskip("trl", reason="trl is not installed")


def weights(folder):
    """Every tensor of a model's folder in float64."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= {name: value.astype(np.float64) for name, value in load_file(file).items()}
    return tensors


def train(base, out, callback, model=None, **options):
    options = {"learning_rate": 1e-2, "max_steps": 4, "save_strategy": "steps", **options}
    run = sft_run(
        trl.SFTTrainer, base, out, model, kwargs={"callbacks": [callback]}, save_steps=2, **options
    )
    run.train()
    return run


def spherical(start, end, t):
    cosine = (start * end).sum() / np.linalg.norm(start) / np.linalg.norm(end)
    angle = np.arccos(np.clip(cosine, -1, 1))
    if np.sin(angle) < 1e-6 or abs(cosine) > 0.9995:
        return (1 - t) * start + t * end
    return (np.sin((1 - t) * angle) * start + np.sin(t * angle) * end) / np.sin(angle)


def test_a_drop_in_for_trls_callback_merges_the_last_checkpoint_with_the_start(base, tmp_path):
    train(base, tmp_path, MergeModelCallback())
    assert not (tmp_path / "checkpoint-2" / "merged").exists()
    start = weights(base)
    trained = weights(tmp_path / "checkpoint-4")
    merged = weights(tmp_path / "checkpoint-4" / "merged")
    assert merged.keys() == trained.keys()
    for name, value in merged.items():
        expected = (0.5 * start[name] + 0.5 * trained[name]).astype(np.float16)
        np.testing.assert_array_equal(value, expected.astype(np.float64))
    assert any((trained[name] != start[name]).any() for name in start)


def test_one_config_serves_trainers_of_different_starts(base, tmp_path):
    other = tmp_path / "other"
    make_tokenizer(other)
    make_model(other, seed=5)
    config = MergeConfig()
    config.dtype = "float32"
    for number, start in enumerate((base, other)):
        out = tmp_path / f"run-{number}"
        train(start, out, MergeModelCallback(config), max_steps=2)
        before = weights(start)
        trained = weights(out / "checkpoint-2")
        for name, value in weights(out / "checkpoint-2" / "merged").items():
            expected = 0.5 * before[name] + 0.5 * trained[name]
            np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


def test_every_checkpoint_by_another_method_with_another_model(base, tmp_path):
    other = tmp_path / "other"
    make_tokenizer(other)
    make_model(other, seed=5)
    config = MergeConfig("slerp")
    config.target_model_path = str(other)
    config.t_values = 0.25
    config.dtype = "float32"
    train(base, tmp_path / "run", MergeModelCallback(config, merge_at_every_checkpoint=True))
    for step in (2, 4):
        checkpoint = tmp_path / "run" / f"checkpoint-{step}"
        trained = weights(checkpoint)
        target = weights(other)
        for name, value in weights(checkpoint / "merged").items():
            expected = spherical(trained[name], target[name], 0.25)
            np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_the_other_methods_of_trl_run(base, tmp_path, method):
    other = tmp_path / "other"
    make_tokenizer(other)
    make_model(other, seed=5)
    config = MergeConfig(method)
    config.target_model_path = str(other)
    config.dtype = "float32"
    train(base, tmp_path / "run", MergeModelCallback(config))
    trained = weights(tmp_path / "run" / "checkpoint-4")
    target = weights(other)
    for name, value in weights(tmp_path / "run" / "checkpoint-4" / "merged").items():
        # The checkpoint is the base and its own delta is 0: the other model's is kept whole.
        np.testing.assert_allclose(value, target[name], rtol=1e-5, atol=1e-6)
        assert value.shape == trained[name].shape


def test_a_recipe_of_any_method_names_the_checkpoint(base, tmp_path):
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [{"model": "CHECKPOINT", "parameters": {"weight": 0.3}}],
        "parameters": {"normalize": False},
        "dtype": "float32",
    }
    train(base, tmp_path, MergeModelCallback(recipe))
    start = weights(base)
    trained = weights(tmp_path / "checkpoint-4")
    for name, value in weights(tmp_path / "checkpoint-4" / "merged").items():
        expected = start[name] + 0.3 * (trained[name] - start[name])
        np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-7)


def test_an_adapter_is_merged_on_its_base(base, tmp_path):
    import peft
    import transformers as t

    config = MergeConfig()
    config.dtype = "float32"
    model = peft.get_peft_model(
        t.AutoModelForCausalLM.from_pretrained(base),
        peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    )
    run = train(base, tmp_path, MergeModelCallback(config), model)
    start = weights(base)
    trained = {
        name: value.detach().double().numpy()
        for name, value in run.model.merge_and_unload().named_parameters()
    }
    moved = 0
    for name, value in weights(tmp_path / "checkpoint-4" / "merged").items():
        expected = 0.5 * start[name] + 0.5 * trained[name]
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
        moved += (expected != start[name]).any()
    assert moved == 2


def test_what_cannot_be_merged_is_refused_before_the_first_step(base, tmp_path):
    import peft
    import transformers as t

    with pytest.raises(InputError, match="method: must be linear, ties, dare_ties, slerp; got 'x'"):
        MergeConfig("x")
    with pytest.raises(InputError, match="save_strategy: must save checkpoints to be merged"):
        train(base, tmp_path, MergeModelCallback(), save_strategy="no")
    config = MergeConfig()
    config.target_model_path = str(tmp_path / "absent")
    with pytest.raises(InputError, match="absent"):
        train(base, tmp_path, MergeModelCallback(config))
    with pytest.raises(InputError, match="must have a model named CHECKPOINT"):
        recipe = {"merge_method": "linear", "models": [{"model": str(base)}]}
        train(base, tmp_path, MergeModelCallback(recipe))
    model = peft.get_peft_model(
        t.AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(target_modules=["q_proj"])
    )
    with pytest.raises(InputError, match="method: must be linear where the checkpoints are adapte"):
        train(base, tmp_path, MergeModelCallback(MergeConfig("ties")), model)
    assert not list(tmp_path.glob("checkpoint-*"))
