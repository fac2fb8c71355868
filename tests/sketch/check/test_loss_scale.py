"""Losses that are a mean over the batch, or mix examples, are found and named."""

import pytest
import torch
from support.sketch.exact_gradients import SKETCH, tiny
from torch.nn import functional as F

from merit_fast.errors import MeritFastError
from merit_fast.sketch.gradients import GradientSketcher
from merit_fast.sketch.passes.scale import token_weights

LENGTHS = (9, 12, 7)  # target tokens 8, 11 and 6


def batch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(3, 12, dtype=torch.int64)
    labels = torch.full((3, 12), -100)
    for row, length in enumerate(LENGTHS):
        ids[row, :length] = torch.randint(1, 97, (length,), generator=generator)
        labels[row, :length] = ids[row, :length]
    return ids, (ids > 0).long(), labels


def token_losses(logits, labels, **options):
    """[B, T] loss of every token, 0 where it is no target."""
    logits = logits[:, :-1].float()
    losses = F.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none", **options
    )
    return losses.reshape(len(logits), -1)


def run(loss, architecture="llama", weight="examples", dtype=torch.float32, rows=3, **options):
    """Sketches of one checked pass with ``loss(output, labels)``."""
    model = tiny(architecture).to(dtype)
    ids, mask, labels = (value[:rows] for value in batch())
    with GradientSketcher(model, SKETCH, weight=weight) as sketcher:
        output = model(input_ids=ids, attention_mask=mask, use_cache=False, **options)
        loss(output, labels).backward()
        return sketcher.take()


def of_logits(reduce):
    return lambda output, labels: reduce(token_losses(output.logits, labels), labels[:, 1:] != -100)


def example_means(losses, mask):
    return (losses.sum(1) / mask.sum(1)).sum()


def example_sums(losses, mask):
    return losses.sum()


def batch_mean(losses, mask):
    return losses.sum() / mask.sum()


def mean_of_means(losses, mask):
    return (losses.sum(1) / mask.sum(1)).mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mean_over_the_batch_is_named_with_its_divisor(dtype):
    with pytest.raises(MeritFastError, match="divided by 25, the target tokens of the batch: must"):
        run(of_logits(batch_mean), dtype=dtype)
    with pytest.raises(MeritFastError, match="divided by 3, the examples of the batch: must be"):
        run(of_logits(mean_of_means), dtype=dtype)
    accumulated = of_logits(lambda losses, mask: example_means(losses, mask) / 4)
    with pytest.raises(MeritFastError, match="the loss is divided by 4: must be the sum"):
        run(accumulated, dtype=dtype)


@pytest.mark.parametrize("architecture", ["gemma2", "mixtral"])
def test_capped_logits_and_routed_models_are_judged_by_the_logits_they_return(architecture):
    with pytest.raises(MeritFastError, match="divided by 25, the target tokens of the batch: must"):
        run(of_logits(batch_mean), architecture)
    assert run(of_logits(example_means), architecture).isfinite().all()


def test_a_model_that_returns_a_tuple_is_judged_too():
    def of_tuple(reduce):
        return lambda output, labels: reduce(token_losses(output[0], labels), labels[:, 1:] != -100)

    assert run(of_tuple(example_means), return_dict=False).isfinite().all()
    with pytest.raises(MeritFastError, match="divided by 25, the target tokens of the batch: must"):
        run(of_tuple(batch_mean), return_dict=False)
    _, _, labels = batch()
    with pytest.raises(MeritFastError, match="the model's '0', one number for 3 examples"):
        run(lambda output, _: output[0], return_dict=False, labels=labels)


def test_a_head_in_chunks_outside_of_the_model_is_left_alone():
    """Only hidden states leave the model, and their gradient tells no weights."""
    model = tiny("llama")
    ids, mask, labels = batch()
    head = torch.randn(97, 36, generator=torch.Generator().manual_seed(1))
    with GradientSketcher(model.model, SKETCH) as sketcher:
        hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
        losses = [
            token_losses(hidden[b : b + 1] @ head.T, labels[b : b + 1]).sum() / 25 for b in range(3)
        ]
        sum(losses).backward()
        assert sketcher.take().isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_and_means_of_each_example_pass(dtype):
    for loss in (example_means, example_sums):
        assert run(of_logits(loss), dtype=dtype).isfinite().all()
    assert run(of_logits(batch_mean), rows=1).isfinite().all()  # the mean of one is its own


def test_with_weight_tokens_the_loss_must_be_each_examples_mean():
    assert run(of_logits(example_means), weight="tokens").isfinite().all()
    with pytest.raises(MeritFastError, match="weight 'tokens' needs each example's mean"):
        run(of_logits(example_sums), weight="tokens")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_weight_tokens_the_numbers_must_be_those_of_the_means(dtype):
    model = tiny("llama").to(dtype)
    ids, mask, labels = batch()
    for numbers, refused in (([8, 11, 6], False), ([8, 11, 12], True), ([9, 12, 7], True)):
        with GradientSketcher(model, SKETCH, weight="tokens") as sketcher:
            output = model(input_ids=ids, attention_mask=mask, use_cache=False)
            of_logits(example_means)(output, labels).backward()
            if not refused:
                sketcher.update(["a"] * 3, None, numbers)
                assert sketcher.state["a"].block_weights.tolist()[:3] == [8, 11, 6]
                continue
            with pytest.raises(MeritFastError, match="the tokens in the loss, . of example ., got"):
                sketcher.update(["a"] * 3, None, numbers)
            assert sketcher.state == {}


def test_losses_of_unknown_weights_or_another_form_are_left_alone():
    weights = torch.tensor([0.3, 0.9, 0.5])
    left_alone = [
        of_logits(lambda losses, mask: (losses.sum(1) * weights).sum() / 7),
        of_logits(lambda losses, mask: (losses * torch.linspace(0.1, 1, 11)).sum() / 25),
        lambda output, labels: output.logits.float().square().mean(),
        lambda output, labels: token_losses(5 * output.logits, labels, label_smoothing=0.3).mean(),
    ]
    for loss in left_alone:
        assert run(loss).isfinite().all()


def test_rows_that_are_one_example_are_judged_together():
    """Two texts of one example, each with a part of its mean."""
    model = tiny("llama")
    ids, mask, labels = batch()
    with GradientSketcher(model, SKETCH) as sketcher:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        losses = token_losses(logits, labels)
        (losses[:2].sum() / 19 + losses[2].sum() / 6).backward()
        sketches = sketcher.update(["a", "a"], row_examples=[0, 0, 1])
    assert len(sketches) == 2


def test_the_weights_of_two_backward_passes_add_up():
    model = tiny("llama")
    ids, mask, labels = batch()
    for shares, refused in (((1.0, 1.0), False), ((1 / 3, 1 / 3), True)):
        with GradientSketcher(model, SKETCH) as sketcher:
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            means = token_losses(logits, labels).sum(1) / (labels[:, 1:] != -100).sum(1)
            (means[0] * shares[0]).backward(retain_graph=True)
            (means[1:].sum() * shares[1]).backward()
            if refused:
                with pytest.raises(MeritFastError, match="divided by 3, the examples"):
                    sketcher.take()
            else:
                assert sketcher.take().isfinite().all()


def test_packed_examples_are_judged_by_their_segments():
    model = tiny("llama")
    ids, mask, labels = batch()
    row = ids[mask.bool()][None]
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    targets = row.clone()
    targets[0, offsets[:-1]] = -100
    for divisor, refused in ((None, False), (25, True)):
        with GradientSketcher(model, SKETCH) as sketcher:
            sketcher.packed(offsets.int())
            logits = model(input_ids=row, position_ids=positions, use_cache=False).logits
            losses = token_losses(logits, targets)[0]
            lengths = torch.repeat_interleave(torch.tensor(LENGTHS) - 1, torch.tensor(LENGTHS))[1:]
            (losses / (divisor or lengths)).sum().backward()
            if refused:
                with pytest.raises(MeritFastError, match="divided by 25, the target tokens"):
                    sketcher.take()
            else:
                assert sketcher.take().isfinite().all()


def test_token_weights_are_those_of_the_loss():
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(2, 300, 50, generator=generator)).requires_grad_()
    weights = torch.rand(2, 300, generator=generator)
    weights[0, :7] = 0
    labels = torch.randint(0, 50, (2, 300), generator=generator)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    (gradient,) = torch.autograd.grad((losses * weights.flatten()).sum(), logits)
    assert torch.allclose(token_weights(logits, gradient), weights, rtol=1e-3, atol=1e-6)
    assert token_weights(logits, gradient.abs()) is None
    assert token_weights(logits, torch.randn(2, 300, 50, generator=generator)) is None
    assert token_weights(torch.randn(5), torch.randn(5)) is None


# ---- losses that mix examples
def test_a_loss_of_the_model_itself_needs_batches_of_one():
    def own_loss(output, labels):
        return output.loss

    _, _, labels = batch()
    with pytest.raises(MeritFastError, match="the model's 'loss', one number for 3 examples"):
        run(own_loss, labels=labels)
    assert run(own_loss, labels=labels[:1], rows=1).isfinite().all()


def test_auxiliary_losses_of_routers_do_not_mix_examples():
    def with_auxiliary_loss(output, labels):
        return token_losses(output.logits, labels).sum() + 0.1 * output.aux_loss

    def with_router_logits(output, labels):
        router = sum(values.logsumexp(-1).square().mean() for values in output.router_logits)
        return token_losses(output.logits, labels).sum() + 0.1 * router

    options = dict(architecture="mixtral", output_router_logits=True)
    with pytest.raises(MeritFastError, match="the model's 'aux_loss', one number for 3"):
        run(with_auxiliary_loss, **options)
    with pytest.raises(MeritFastError, match="'router_logits': an auxiliary loss of routers mixes"):
        run(with_router_logits, **options)
    for loss in (with_auxiliary_loss, with_router_logits):
        assert run(loss, rows=1, **options).isfinite().all()
