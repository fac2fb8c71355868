"""Packed rows: examples end to end train as they do row by row, dataset by dataset."""

import numpy as np
import pytest
import torch
from support.architectures import CASES, VOCABULARY, make
from support.checks import assert_close
from support.patched import assert_same_gradients

from merit_fast import patch_model
from merit_fast.data import Example, collate, pack
from merit_fast.errors import InputError
from merit_fast.kernels.cross_entropy import linear_cross_entropy
from merit_fast.model import target_losses
from merit_fast.train.loss import batch_loss, require_packing

LENGTHS = (9, 1, 14, 2, 6)


def examples(lengths=LENGTHS):
    generator = np.random.default_rng(0)
    rows = [generator.integers(3, VOCABULARY, n).astype(np.int32) for n in lengths]
    return [
        Example(ids, np.where(generator.random(len(ids)) < 0.4, -100, ids).astype(np.int32))
        for ids in rows
    ]


def test_a_packed_row_says_where_each_example_lies():
    a, b = (
        Example(np.array([5, 6, 7]), np.array([5, -100, 7])),
        Example(np.array([8, 9]), np.array([8, 9])),
    )
    row = pack([a, b], [3, 1])
    assert row.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert row.labels.tolist() == [[-100, -100, 7, -100, 9]]
    assert row.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert (row.cu_seqlens.tolist(), row.dataset_ids.tolist()) == ([0, 3, 5], [3, 1])
    assert row.attention_mask.tolist() == [[1] * 5] and row.num_target_tokens == 2
    for wrong in ([], [1]):
        with pytest.raises(
            ValueError, match=f"pack: needs one dataset id per example, got {len(wrong)} for 2"
        ):
            pack([a, b], wrong)


@pytest.mark.parametrize("kernels", ["auto", "eager"])
@pytest.mark.parametrize("name", [name for name in CASES if "vl" not in name])
def test_packed_rows_have_the_losses_of_padded_ones(name, kernels):
    model = make(name)
    patch_model(model, kernels)
    rows, ids = examples(), [0] * len(LENGTHS)
    require_packing(model, rows)
    padded, packed = (
        target_losses(model, make_batch(rows, ids)) for make_batch in (padded_batch, pack)
    )
    order = torch.argsort(padded.example, stable=True)
    assert torch.equal(packed.example, padded.example[order])
    assert_close(packed.loss.detach(), padded.loss[order].detach())
    results = []
    for batch in (padded_batch(rows, ids), pack(rows, ids)):
        model.zero_grad()
        loss = batch_loss(model, batch, batch.num_target_tokens, max(ids) + 1)
        loss.loss.backward()
        summed = loss.dataset_losses.tolist()
        results.append(
            (summed, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        )
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert sum(results[0][0]) == pytest.approx(float(padded.loss.detach().double().sum()), rel=1e-6)
    assert_same_gradients(results[1][1], results[0][1])


def padded_batch(rows, ids):
    return collate(rows, ids, 0)


def test_sums_and_counts_per_dataset_are_those_of_single_rows():
    model = make("llama")
    rows, ids = examples(), [1, 0, 1, 2, 0]
    row = pack(rows, ids)
    output = model.model(input_ids=row.input_ids, position_ids=row.position_ids, use_cache=False)
    hidden = output.last_hidden_state[:, :-1]
    found = linear_cross_entropy(
        hidden, model.lm_head.weight, row.labels[:, 1:],
        dataset_ids=row.dataset_ids, num_datasets=3,
        cu_seqlens=row.cu_seqlens.clamp(max=hidden.shape[1]),
    )  # fmt: skip
    losses, tokens = torch.zeros(3), torch.zeros(3, dtype=torch.int64)
    for example, dataset_id in zip(rows, ids, strict=True):
        single = target_losses(model, collate([example], [0], 0))
        losses[dataset_id] += single.loss.sum().detach()
        tokens[dataset_id] += len(single.loss)
    assert_close(found.dataset_loss.detach(), losses)
    assert torch.equal(found.dataset_tokens, tokens)


def test_a_model_that_sees_over_borders_is_refused():
    model = make("llama")
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    plain = model.model.forward
    model.model.forward = lambda *args, position_ids=None, **kwargs: plain(*args, **kwargs)
    with pytest.raises(
        InputError,
        match=r"train.packing: must be false: this model's attention crosses the borders",
    ):
        require_packing(model, examples((5, 4)))
    assert model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "qwen2_moe"])
def test_rounding_by_a_neighbour_is_no_leak(name, attention, dtype):
    model = make(name, dtype)
    model.set_attn_implementation(attention)
    differ = False
    for seed in range(6):
        generator = np.random.default_rng(seed)
        rows = [generator.integers(3, VOCABULARY, n).astype(np.int32) for n in (9, 14, 23)]
        require_packing(model, [Example(ids, ids) for ids in rows])
        changed = [Example(ids, ids) for ids in (rows[0], rows[0] * 0 + 5)]
        losses = [
            target_losses(model, pack([a, Example(rows[1], rows[1])], [0, 0])) for a in changed
        ]
        differ |= not torch.equal(*(found.loss[found.example == 1] for found in losses))
    assert differ or dtype == torch.bfloat16 or name == "mixtral"  # the check meets rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_leak_in_one_layer_is_seen(layer, dtype):
    model = make("llama", dtype)
    attention = model.model.layers[layer].self_attn
    plain = attention.forward

    def leaks(*args, attention_mask=None, **kwargs):
        width = kwargs["hidden_states"].shape[1]
        mask = torch.ones(1, 1, width, width, dtype=torch.bool).tril()
        return plain(*args, attention_mask=torch.where(mask, 0.0, -1e4).to(dtype), **kwargs)

    require_packing(model, examples((9, 14)))
    attention.forward = leaks
    with pytest.raises(InputError, match="crosses the borders of examples"):
        require_packing(model, examples((9, 14)))


def test_examples_without_targets_tell_nothing_about_packing():
    model = make("llama")
    blank = Example(np.array([5], np.int32), np.array([-100], np.int32))
    model.model.forward = None  # not called
    require_packing(model, [blank, blank])
