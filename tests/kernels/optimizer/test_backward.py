"""Updates in the backward pass: a step's bits, no gradient kept, tied weights updated once."""

import copy

import pytest
import torch
from support.kernels.optimizer_runs import bits

from merit_fast.kernels.optimizer import FusedAdamW, SpentGradient


class Tied(torch.nn.Module):
    """A head that is the embedding."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(11, 8, dtype=dtype)
        self.layer = torch.nn.Linear(8, 8, dtype=dtype)
        self.frozen = torch.nn.Parameter(torch.ones(3, dtype=dtype), requires_grad=False)

    def forward(self, ids):
        return self.layer(self.embedding(ids)).tanh() @ self.embedding.weight.T


def losses(model, step):
    ids = torch.randint(0, 11, (6,), generator=torch.Generator().manual_seed(step))
    return model(ids).float().square().sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"moments": "int8", "average_decay": "mean"}, {"master": "split"}], ids=str
)
def test_it_gives_the_bits_of_steps_after_the_backward_pass(dtype, options):
    models = [Tied(dtype), Tied(dtype)]
    optimizers = [FusedAdamW(model.parameters(), lr=1e-2, **options) for model in models]
    handle = optimizers[1].step_in_backward()
    for step in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            losses(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(p.grad is None for p in models[1].parameters())
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(bits(a), bits(b))
        if a.requires_grad:
            assert int(optimizers[1].state[b]["step"]) == 4
    handle.remove()


def in_memory(gradient):
    return gradient is not None and not isinstance(gradient, SpentGradient)


def test_no_two_gradients_live_at_once():
    layers = torch.nn.Sequential(*[torch.nn.Linear(4, 4, bias=False) for _ in range(5)])
    weights = [layer.weight for layer in layers]
    most = []
    for weight in weights:
        weight.register_post_accumulate_grad_hook(
            lambda _: most.append(sum(in_memory(other.grad) for other in weights))
        )
    with FusedAdamW(weights).step_in_backward():
        layers(torch.randn(2, 4)).sum().backward()
    assert most == [1] * 5


def test_a_removed_handle_leaves_gradients_to_step():
    model = Tied(torch.float32)
    optimizer = FusedAdamW(model.parameters())
    with optimizer.step_in_backward():
        losses(model, 0).backward()
    before = model.layer.weight.detach().clone()
    losses(model, 1).backward()
    assert torch.equal(model.layer.weight, before) and model.layer.weight.grad is not None
    optimizer.step()
    assert not torch.equal(model.layer.weight, before)


@pytest.mark.parametrize("clip", ["previous", "two-pass"])
def test_after_removal_a_step_clips_by_its_own_norm_and_keeps_its_gradients(clip):
    models = [Tied(torch.float32), Tied(torch.float32)]
    ours, plain = (FusedAdamW(m.parameters(), lr=1e-2, eps=1.0, max_norm=0.1) for m in models)
    with ours.step_in_backward(clip=clip, accumulation=2):
        for part in range(2):
            (losses(models[0], part) * 100).backward()
        ours.step()
    models[1].load_state_dict(models[0].state_dict())
    plain.load_state_dict(copy.deepcopy(ours.state_dict()))
    for model, optimizer in zip(models, (ours, plain), strict=True):
        losses(model, 2).backward()
        optimizer.step()
        assert in_memory(model.layer.weight.grad)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(bits(a), bits(b))


def test_a_clip_by_the_norm_of_all_gradients_is_refused():
    with pytest.raises(ValueError, match="step_in_backward with max_norm needs clip"):
        FusedAdamW([torch.nn.Parameter(torch.ones(3))], max_norm=1.0).step_in_backward()
