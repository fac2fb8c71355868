"""The head under torch.func: grad, vmap and functional_call, against autograd."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, grad_and_value, vmap

from merit_fast.kernels.cross_entropy import (
    IGNORED_LABEL,
    linear_cross_entropy,
    linear_token_statistics,
)
from merit_fast.kernels.sketch import CountSketch

EXAMPLES = 4
BACKENDS = pytest.mark.parametrize("backend", ["cpu", "eager"])


@pytest.fixture
def batch():
    labels = torch.randint(0, 130, (EXAMPLES, 7))
    labels[:, 0] = IGNORED_LABEL
    labels[2, 3:] = IGNORED_LABEL
    return torch.randn(EXAMPLES, 7, 12), torch.randn(130, 12), torch.randn(130), labels


def loss_of(hidden, weight, bias, labels, backend="cpu"):
    return linear_cross_entropy(
        hidden, weight, labels, bias=bias, softcap=5.0, label_smoothing=0.1, backend=backend
    ).loss


def entropy_of(hidden, weight, bias, labels, backend="cpu"):
    found = linear_token_statistics(
        hidden, weight, labels, bias=bias, temperature=2.0, entropy=True, backend=backend
    )
    return (found.log_probs * found.entropy.sin()).sum()


def by_autograd(function, *tensors):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors[:3]]
    return torch.autograd.grad(function(*leaves, tensors[3], "eager"), leaves)


@pytest.mark.parametrize("function", [loss_of, entropy_of])
def test_gradients_of_torch_func_are_autograd_s(batch, function):
    found = grad(function, argnums=(0, 1, 2))(*batch)
    for ours, expected in zip(found, by_autograd(function, *batch), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("function", [loss_of, entropy_of])
def test_gradients_per_example_are_those_of_each_example(batch, function):
    hidden, weight, bias, labels = batch
    per_example = vmap(grad(function, argnums=(0, 1, 2)), in_dims=(0, None, None, 0))(*batch)
    for k in range(EXAMPLES):
        expected = by_autograd(function, hidden[k], weight, bias, labels[k])
        for ours, of_example in zip(per_example, expected, strict=True):
            torch.testing.assert_close(ours[k], of_example)


def test_losses_of_stacked_heads(batch):
    hidden, weight, bias, labels = batch
    heads = torch.stack([weight, -weight, 2 * weight], dim=1)
    losses = vmap(loss_of, in_dims=(None, 1, None, None))(hidden, heads, bias, labels)
    for k, loss in enumerate(losses):
        torch.testing.assert_close(loss, loss_of(hidden, heads[:, k], bias, labels, "eager"))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(130, 12)

    def forward(self, ids, labels, backend):
        hidden = self.embedding(ids).tanh()
        return linear_cross_entropy(hidden, self.embedding.weight, labels, backend=backend).loss


def test_a_tied_module_called_by_function(batch):
    model = Tied()
    ids = torch.randint(0, 130, (EXAMPLES, 7))

    def loss(parameters, backend):
        return functional_call(model, parameters, (ids, batch[3], backend))

    parameters = {name: value.detach() for name, value in model.named_parameters()}
    ours, value = grad_and_value(loss)(parameters, "cpu")
    eager, expected = grad_and_value(loss)(parameters, "eager")
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(ours, eager)


def test_a_sketch_under_torch_func_is_refused(batch):
    hidden, weight, bias, labels = batch

    def loss(weight):
        return linear_cross_entropy(
            hidden, weight, labels, sketch=CountSketch(4096), sketch_name="head",
            sketch_out=torch.zeros(EXAMPLES, 4096),
        ).loss  # fmt: skip

    with pytest.raises(ValueError, match="linear_cross_entropy: sketch_out is no value of"):
        grad(loss)(weight)
