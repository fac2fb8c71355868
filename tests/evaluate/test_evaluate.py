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
from merit_fast.data.template import prompt_ids
from merit_fast.errors import InputError
from merit_fast.evaluate import EvaluateConfig
from merit_fast.evaluate.losses import can_share, dataset_results, mean_loss, score_rows
from merit_fast.evaluate.models import EvaluationInputs
from merit_fast.evaluate.prefixes import Prefixes, shared_length
from merit_fast.evaluate.retention import (
    PROMPTS,
    answer_rows,
    greedy_answers,
    text_windows,
)
from merit_fast.evaluate.weights import Interpolation, displacement
from merit_fast.model import load_model


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


def results_of(model, datasets, batch_size, share=False):
    rows = [dataset.examples for dataset in datasets]
    return dataset_results(score_rows(model, rows, 1, batch_size, share), datasets)


def test_losses_equal_transformers_row_by_row(model, datasets):
    results = results_of(model, datasets, batch_size=3)
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
    result = results_of(model, [Dataset("d", tuple(examples))], batch_size=4)["d"]
    assert result.exact_match == sum(expected) / 6


def test_batch_size_does_not_matter(model, datasets):
    singly, together = (results_of(model, datasets, batch_size=n) for n in (1, 8))
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
    assert mean_loss(model, text_windows(tokenizer), 1, batch_size=1) == pytest.approx(
        total / tokens, rel=1e-4
    )


def one_by_one(model, prompt, tokens):
    """The greedy answer of one prompt, by the definition: no batch, no cache."""
    ids = list(prompt)
    for _ in range(tokens):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 1:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("share", [False, True])
def test_answers_of_the_batch_are_those_of_each_prompt(model, tokenizer, share):
    prompts = prompt_ids(tokenizer, DataConfig(), PROMPTS)
    assert len(prompts) == len(PROMPTS)
    if share:
        system = [7, 300, 12, 45, 9]
        prompts = [[*system, *ids] for ids in prompts]
    counts = []
    answers = greedy_answers(model, [tokenizer.eos_token_id], prompts, 1, 6, share, counts.append)
    assert answers == [one_by_one(model, prompt, 6) for prompt in prompts]
    assert sum(counts) == 6 * len(PROMPTS)


def test_answers_end_when_all_have_ended(model, tokenizer):
    """A model that always writes the end token takes one step."""
    head = torch.zeros_like(model.lm_head.weight)
    steps = []
    embedding = model.lm_head.weight
    try:
        model.lm_head.weight = torch.nn.Parameter(head)
        model.lm_head.weight.data[1] = 0.0
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(400))
        model.lm_head.bias.data[1] = 1.0
        answers = greedy_answers(
            model, [tokenizer.eos_token_id], [[5, 6], [7]], 1, 40, False, steps.append
        )
    finally:
        model.lm_head.weight = embedding
        model.lm_head.bias = None
    assert answers == [[1], [1]]
    assert steps == [2, 78]  # one step of two prompts, then the tokens that were not needed


def test_answers_are_the_least_surprising_to_their_own_model(model, tokenizer):
    prompts = prompt_ids(tokenizer, DataConfig(), PROMPTS)
    answers = greedy_answers(model, [tokenizer.eos_token_id], prompts, 1, max_new_tokens=6)
    others = [[(token + 7) % 400 for token in answer] for answer in answers]
    own, other = (
        mean_loss(model, answer_rows(prompts, of), 1, batch_size=8) for of in (answers, others)
    )
    assert own < other


def rows_of(lengths, shared, seed, answer=3):
    """Rows that begin with ``shared`` and end with ``answer`` targets."""
    numbers = np.random.default_rng(seed)
    rows = []
    for length in lengths:
        ids = np.array([*shared, *numbers.integers(2, 400, length)], np.int32)
        labels = np.full_like(ids, -100)
        labels[-answer:] = ids[-answer:]
        rows.append(Example(ids, labels))
    return rows


def test_rows_with_a_common_beginning_score_as_without_sharing(model):
    """Groups of long, short and no common beginning, of one row, and of equal rows."""
    numbers = np.random.default_rng(7)
    long, short = numbers.integers(2, 400, 40), numbers.integers(2, 400, 9)
    same = rows_of([6], long, 5)[0]
    groups = [
        rows_of([8, 5, 30, 5], long, 0),
        rows_of([7, 9, 4], short, 1),
        rows_of([11, 3], (), 2),
        rows_of([12], long, 3),
        [same, same, same],
    ]
    assert [shared_length(rows) for rows in groups] == [40, 9, 0, 0, 42]
    plain, shared = (score_rows(model, groups, 1, 4, share) for share in (False, True))
    torch.testing.assert_close(shared.loss, plain.loss, rtol=1e-5, atol=1e-5)
    assert torch.equal(shared.exact, plain.exact) and torch.equal(shared.tokens, plain.tokens)
    assert can_share(model, groups, 1)
    assert not can_share(model, [rows_of([30, 40], short[:2], 4)], 1)  # saves too little


def test_a_model_whose_state_is_no_cache_of_keys_and_values_shares_nothing(model, monkeypatch):
    from transformers.cache_utils import DynamicLayer

    groups = [rows_of([8, 5, 30, 5], np.arange(2, 42), 0)]

    class Recurrent(DynamicLayer):
        pass

    monkeypatch.setattr("transformers.cache_utils.DynamicLayer", Recurrent)
    assert not can_share(model, groups, 1)
    with pytest.raises(ValueError, match="not keys and values only"):
        score_rows(model, groups, 1, 4, share=True)


def test_a_model_whose_losses_change_shares_nothing(tiny_model, monkeypatch):
    groups = [rows_of([8, 5, 30, 5], np.arange(2, 42), 0)]
    model = load_model(str(tiny_model), "fp32")
    with torch.no_grad():  # a random model hardly looks at positions
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight *= 8
    assert can_share(model, groups, 1)
    real = Prefixes.extend

    def forgetful(self, inputs, chosen):
        return real(self, inputs, chosen) | {"position_ids": inputs["position_ids"]}

    monkeypatch.setattr(Prefixes, "extend", forgetful)
    assert not can_share(model, groups, 1)


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
    line = Interpolation(model, tiny_model)
    for share in (0.75, 0.25):  # each from the ends, not from the last point
        line.set(share)
        state = model.state_dict()
        for name in base:
            expected = ((1 - share) * base[name].double() + share * other[name].double()).float()
            assert torch.equal(state[name], expected), name
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])  # still tied


def test_mean_loss_weighs_tokens(model, datasets):
    pooled = mean_loss(model, [e for d in datasets for e in d.examples], 1, batch_size=8)
    results = results_of(model, datasets, batch_size=8)
    tokens = sum(result.num_target_tokens for result in results.values())
    assert pooled == pytest.approx(
        sum(r.loss * r.num_target_tokens for r in results.values()) / tokens
    )


def test_a_mixture_without_held_out_rows_is_bad_input(tiny_model, tokenizer, tmp_path):
    with pytest.raises(InputError, match="no dataset of the mixture has held-out rows"):
        EvaluationInputs([], tokenizer, 1, EvaluateConfig())
