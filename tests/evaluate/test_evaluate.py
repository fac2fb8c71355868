"""Checks evaluate against transformers' loss and generate, and against plain tensor math."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.tiny import make_model
from torch.nn import functional as F

from merit_fast.data import (
    DataConfig,
    Dataset,
    DatasetConfig,
    Example,
    load_mixture,
    load_tokenizer,
)
from merit_fast.errors import InputError
from merit_fast.evaluate import EvaluateConfig, evaluate_arms
from merit_fast.evaluate.losses import dataset_results, mean_loss
from merit_fast.evaluate.retention import PROMPTS, answers_nll, greedy_answers, text_loss
from merit_fast.evaluate.stage import EvaluatedModels
from merit_fast.evaluate.weights import displacement, interpolate_towards
from merit_fast.model import load_model
from merit_fast.progress import SilentProgress


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(str(tiny_model), "fp32")


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(str(tiny_model))


@pytest.fixture(scope="module")
def datasets(tiny_mixture, tokenizer):
    configs = [DatasetConfig(**entry) for entry in tiny_mixture]
    return load_mixture(configs, tokenizer, DataConfig(), part="eval")


def test_losses_equal_transformers_row_by_row(model, datasets):
    results = dataset_results(model, datasets, 1, batch_size=3)
    for dataset in datasets:
        total = 0.0
        for example in dataset.examples:
            ids = torch.tensor(example.input_ids)[None].long()
            labels = torch.tensor(example.labels)[None].long()
            num_targets = int((labels[:, 1:] != -100).sum())
            with torch.no_grad():
                total += float(model(input_ids=ids, labels=labels).loss) * num_targets
        result = results[dataset.name]
        assert result.loss == pytest.approx(total / dataset.num_target_tokens, rel=1e-4)
        assert (result.num_examples, result.num_target_tokens) == (
            len(dataset.examples),
            dataset.num_target_tokens,
        )


def test_exact_match_is_what_greedy_generation_writes(model):
    """Rows whose answer the model itself wrote, every second one spoilt in its last token."""
    generator = np.random.default_rng(0)
    examples = []
    expected = []
    for i in range(6):
        prompt = torch.tensor(generator.integers(2, 400, 5 + i))[None]
        written = model.generate(
            prompt, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=1
        )
        ids = written[0].int().numpy().copy()
        if i % 2:
            ids[-1] = (ids[-1] + 1) % 400
        labels = ids.copy()
        labels[: prompt.shape[1]] = -100
        examples.append(Example(ids, labels))
        expected.append(i % 2 == 0)
    result = dataset_results(model, [Dataset("d", tuple(examples))], 1, batch_size=4)["d"]
    assert result.exact_match == sum(expected) / 6


def test_batch_size_does_not_matter(model, datasets):
    singly, together = (dataset_results(model, datasets, 1, batch_size=n) for n in (1, 8))
    for name in singly:
        assert singly[name].loss == pytest.approx(together[name].loss, rel=1e-5)
        assert singly[name].exact_match == together[name].exact_match


def test_text_loss_is_the_mean_over_the_text(model, tokenizer):
    from importlib import resources

    text = resources.files("merit_fast.evaluate").joinpath("general_text.txt").read_text()
    ids = torch.tensor(tokenizer(text)["input_ids"])
    total = 0.0
    tokens = 0
    for window in ids.split(512):
        with torch.no_grad():
            logits = model(window[None]).logits[0, :-1].float()
        total += float(F.cross_entropy(logits, window[1:], reduction="sum"))
        tokens += len(window) - 1
    assert text_loss(model, tokenizer, 1) == pytest.approx(total / tokens, rel=1e-4)


def test_greedy_answers_are_the_least_surprising_to_their_own_model(model, tokenizer):
    prompts, answers = greedy_answers(model, tokenizer, 1, max_new_tokens=6)
    assert len(prompts) == len(answers) == len(PROMPTS)
    assert all(1 <= len(answer) <= 6 for answer in answers)
    alone = model.generate(
        torch.tensor(prompts[3])[None], max_new_tokens=6, do_sample=False, pad_token_id=1
    )
    assert answers[3] == alone[0, len(prompts[3]) :].tolist()[: len(answers[3])]
    others = [[(token + 7) % 400 for token in answer] for answer in answers]
    assert answers_nll(model, prompts, answers, 1) < answers_nll(model, prompts, others, 1)


def weights(directory):
    return {k: v for f in sorted(directory.glob("*.safetensors")) for k, v in load_file(f).items()}


def test_displacement_and_interpolation_against_tensor_math(tiny_model, tmp_path):
    make_model(tmp_path / "other", seed=3)
    base = weights(tiny_model)
    other = weights(tmp_path / "other")
    exact = sum((other[name].double() - base[name].double()).square().sum() for name in base) ** 0.5
    assert displacement(tmp_path / "other", tiny_model) == pytest.approx(float(exact))
    assert displacement(tiny_model, tiny_model) == 0.0
    model = load_model(str(tmp_path / "other"), "fp32")
    interpolate_towards(model, tiny_model, 0.25)
    state = model.state_dict()
    for name in base:
        expected = (0.75 * base[name].double() + 0.25 * other[name].double()).float()
        assert torch.equal(state[name], expected), name
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])  # still tied


def test_mean_loss_weighs_tokens(model, datasets):
    pooled = mean_loss(model, [e for d in datasets for e in d.examples], 1, batch_size=8)
    results = dataset_results(model, datasets, 1, batch_size=8)
    tokens = sum(result.num_target_tokens for result in results.values())
    assert pooled == pytest.approx(
        sum(r.loss * r.num_target_tokens for r in results.values()) / tokens
    )


def test_a_mixture_without_held_out_rows_is_bad_input(tiny_model, tokenizer, tmp_path):
    candidates = EvaluatedModels(tiny_model, {}, {}, {})
    with pytest.raises(InputError, match="no dataset of the mixture has held-out rows"):
        evaluate_arms(candidates, [], tokenizer, 1, EvaluateConfig(), tmp_path, SilentProgress())
