"""K-FAC: inner products of sketches against the explicit inverse of the Kronecker product."""

import pytest
import torch
from support.checks import assert_close
from support.sketch.exact_gradients import ragged_examples, summed_loss, tiny
from torch import nn

import merit_fast
from merit_fast.kernels.sketch import matrix_shape

LENGTHS = (5, 3, 7)


class Small(nn.Module):
    """Two linear layers round a norm, over looked-up rows; tied or not."""

    def __init__(self, tied=False):
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(11, 6)
        self.inner = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(5)
        self.outer = nn.Linear(5, 6)
        self.head = nn.Linear(6, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        hidden = self.norm(torch.tanh(self.inner(self.embed(ids))))
        return self.head(torch.tanh(self.outer(hidden)))


def rows(seed=0):
    """Padded ids [B, T] and the mask of real tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 11, (len(LENGTHS), max(LENGTHS)), generator=generator)
    return ids, torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS).unsqueeze(1)


def losses(model, ids, mask):
    values = torch.log_softmax(model(ids), -1).roll(1, -1).square().sum(-1)
    return (values * mask).sum(1)


def collected(model, seeds=(0, 1), damping=0.1, **options):
    with merit_fast.kfac_factors(model, **options) as collector:
        for seed in seeds:
            losses(model, *rows(seed)).sum().backward()
            collector.update()
    return collector.factors(damping)


def sketches_of(model, factors, parameters="all", seed=5, proj_dim=4096):
    options = dict(parameters=parameters, normalize="kfac", factors=factors, proj_dim=proj_dim)
    with merit_fast.sketch_gradients(model, check="always", **options) as sketcher:
        losses(model, *rows(seed)).sum().backward()
        return sketcher.take().double()


def gradients_of(model, name, seed=5):
    """[B, R, C]: a backward pass per example, in float64."""
    ids, mask = rows(seed)
    parameter = dict(model.named_parameters())[name]
    result = []
    for b in range(len(ids)):
        (gradient,) = torch.autograd.grad(losses(model, ids[b : b + 1], mask[b : b + 1]), parameter)
        result.append(gradient.double().view(matrix_shape(parameter.shape)))
    return torch.stack(result)


def tokens_of(model, layer, seeds=(0, 1)):
    """Inputs and output gradients [N, C] of a layer's real tokens, by plain hooks."""
    inputs = []
    outputs = []

    def keep(module, args, output):
        inputs.append(args[0].detach())
        output.register_hook(outputs.append)

    handle = layer.register_forward_hook(keep)
    for seed in seeds:
        losses(model, *rows(seed)).sum().backward()
    handle.remove()
    model.zero_grad()
    masks = torch.cat([rows(seed)[1] for seed in seeds])
    return torch.cat(inputs)[masks].double(), torch.cat(outputs)[masks].double()


def damped(factor, damping):
    mean = factor.diagonal().mean()
    return factor + damping**0.5 * mean * torch.eye(len(factor), dtype=factor.dtype)


def influence(gradients, left, right):
    """[B, B]: g^T (left (x) right)^-1 h, with the inverse written out."""
    inverse = torch.linalg.inv(torch.kron(left, right))
    flat = gradients.flatten(1)
    return flat @ inverse @ flat.T


@pytest.mark.parametrize("layer", ["inner", "outer", "head"])
@pytest.mark.parametrize("damping", [0.1, 0.003])
def test_inner_products_of_linear_layers_are_influences(layer, damping):
    """A matrix below 64 x 64 lies in one tile, so its sketch keeps all inner products."""
    model = Small()
    name = f"{layer}.weight"
    x, dy = tokens_of(model, getattr(model, layer))
    examples = 2 * len(LENGTHS)
    expected = influence(
        gradients_of(model, name),
        damped(dy.T @ dy / examples, damping),
        damped(x.T @ x / len(x), damping),
    )
    result = sketches_of(model, collected(model, damping=damping), f"^{name}$")
    assert_close(result @ result.T, expected)


def test_an_embedding_has_the_frequency_of_its_tokens():
    model = Small()
    ids, dy = tokens_of(model, model.embed)
    frequency = torch.bincount(ids.long(), minlength=11).double() / len(ids)
    expected = influence(
        gradients_of(model, "embed.weight"),
        damped(frequency.diag(), 0.1),
        damped(dy.T @ dy / 6, 0.1),
    )
    result = sketches_of(model, collected(model), "^embed.weight$")
    assert_close(result @ result.T, expected)


@pytest.mark.parametrize("name", ["inner.bias", "norm.weight", "norm.bias"])
def test_vectors_have_the_mean_square_of_each_entry(name):
    model = Small()
    squares = torch.cat([gradients_of(model, name, seed) for seed in (0, 1)]).square().mean(0)
    flat = gradients_of(model, name) * (squares + 0.1 * squares.mean()).rsqrt()
    result = sketches_of(model, collected(model), f"^{name}$")
    assert_close(result @ result.T, flat.flatten(1) @ flat.flatten(1).T)


def test_long_sides_keep_their_diagonal():
    model = Small()
    x, dy = tokens_of(model, model.head)
    expected = influence(
        gradients_of(model, "head.weight"),
        damped((dy.T @ dy / 6).diagonal().diag(), 0.1),
        damped(x.T @ x / len(x), 0.1),
    )
    factors = collected(model, max_side=6)
    result = sketches_of(model, factors, "^head.weight$")
    assert_close(result @ result.T, expected)
    assert factors.rows["head.weight"].shape == (1, 11)


def test_a_tied_matrix_has_the_partial_traces_of_both_uses():
    model = Small(tied=True)
    ids, dy = tokens_of(model, model.embed)
    x, dlogits = tokens_of(model, model.head)
    one_hot = nn.functional.one_hot(ids.long(), 11).double()
    fisher = torch.zeros(11, 6, 11, 6, dtype=torch.float64)
    for left, right in ((one_hot, dy), (dlogits, x)):
        scale = 1 / (len(left) * 6)
        fisher += scale * torch.einsum("ik,jl->ijkl", left.T @ left, right.T @ right)
    by_row = torch.einsum("ijkj->ik", fisher).diagonal().diag()
    by_column = torch.einsum("ijil->jl", fisher)
    expected = influence(
        gradients_of(model, "embed.weight"),
        damped(by_row / by_row.trace(), 0.1),
        damped(by_column, 0.1),
    )
    result = sketches_of(model, collected(model), "^embed.weight$")
    assert_close(result @ result.T, expected)


def test_factors_do_not_depend_on_batches_or_padding():
    model = Small()
    together = collected(model)
    with merit_fast.kfac_factors(model) as collector:
        for seed in (0, 1):
            ids, mask = rows(seed)
            for b, length in enumerate(LENGTHS):
                alone = (ids[b : b + 1, :length], mask[b : b + 1, :length])
                losses(model, *alone).sum().backward()
                collector.update()
    apart = collector.factors()
    assert apart.examples == together.examples == 6
    for kind in ("rows", "columns", "diagonals"):
        for name, factor in getattr(together, kind).items():
            assert_close(getattr(apart, kind)[name], factor)


ARCHITECTURES = ["llama", "gpt2", "opt", "mixtral", "qwen2-moe"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [False, True])
def test_whole_models_equal_preconditioned_gradients(architecture, tied):
    """The check compares with autograd's gradients, multiplied as explicit matrices."""
    model = tiny(architecture, tied)
    examples = ragged_examples()
    with merit_fast.kfac_factors(model) as collector:
        summed_loss(model, examples).backward()
        collector.update()
    factors = collector.factors()
    assert not factors.unseen or architecture == "opt"
    options = dict(normalize="kfac", factors=factors, proj_dim=4096, check="always")
    with merit_fast.sketch_gradients(model, **options) as sketcher:
        summed_loss(model, examples).backward()
        sketcher.take()
    assert sketcher.checked.row_error < 2e-5
    assert sketcher.checked.sum_error < 2e-5
    kinds = set(sketcher.preconditioned.values())
    assert "rows, columns" in kinds and "entries" in kinds


def test_experts_have_factors_of_their_own():
    model = tiny("mixtral")
    examples = ragged_examples()
    with merit_fast.kfac_factors(model, "down_proj") as collector:
        summed_loss(model, examples).backward()
        collector.update()
    factors = collector.factors()
    name = "model.layers.0.mlp.experts.down_proj"
    assert factors.rows[name].shape == (4, 36, 36)
    assert factors.columns[name].shape == (4, 52, 52)
    assert not torch.equal(factors.columns[name][0], factors.columns[name][1])
