"""Adam's second moments as scales: torch's own update is the truth."""

import pytest
import torch
from torch import nn

from merit_fast.errors import InputError, MeritFastError
from merit_fast.kernels.optimizer import FusedAdamW
from merit_fast.kernels.sketch import matrix_shape
from merit_fast.sketch.precondition import (
    adam_scales,
    adam_scales_of_checkpoint,
    scales_fingerprint,
)


def small():
    return nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 5), nn.LayerNorm(5))


def stepped(cls, steps=3, model=None, **options):
    model = model or small()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1]},
        {
            "params": [p for p in model.parameters() if p.dim() == 1],
            "eps": 1e-3,
            "betas": (0.8, 0.9),
        },
    ]
    optimizer = cls(groups, lr=1e-2, **options)
    for seed in range(steps):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        (model(torch.randint(0, 11, (4, 3))) ** 2 * torch.randn(5)).sum().backward()
        optimizer.step()
    return model, optimizer


VARIANTS = [
    (torch.optim.Adam, dict(foreach=False)),
    (torch.optim.AdamW, dict(foreach=True, weight_decay=0.0)),
    (torch.optim.AdamW, dict(fused=True, weight_decay=0.0)),
    (torch.optim.Adam, dict(amsgrad=True)),
    (torch.optim.Adam, dict(amsgrad=True, fused=True)),
]


@pytest.mark.parametrize(
    "cls,options", VARIANTS, ids=["adam", "foreach", "fused", "amsgrad", "fused-amsgrad"]
)
def test_scales_are_what_torch_divides_by(cls, options):
    """The last step moved every weight by lr * m / (1 - beta1^t) * scale."""
    model, optimizer = stepped(cls, steps=2, **options)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()  # the gradients of the last backward pass once more
    scales = adam_scales(model, optimizer, before)
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        group = optimizer.param_groups[parameter.dim() == 1]
        momentum = state["exp_avg"] / (1 - group["betas"][0] ** float(state["step"]))
        moved = (before[name] - parameter).detach()
        expected = group["lr"] * momentum * scales[name].reshape(parameter.shape)
        assert torch.allclose(moved, expected, rtol=1e-3, atol=1e-6), name
        assert (
            scales[name].shape == matrix_shape(parameter.shape)
            and scales[name].dtype == torch.float32
        )


def test_8_bit_moments_are_decoded():
    """Codes have the shapes of moments, and would pass for them."""
    names = ["0.weight", "1.weight", "1.bias"]
    ours, plain = (
        adam_scales(*stepped(FusedAdamW, model=seeded(), moments=moments), names)
        for moments in ("int8", "fp32")
    )
    for name in names:
        seen = plain[name] < 100  # others had no gradient
        assert torch.allclose(ours[name][seen], plain[name][seen], rtol=0.1), name


def seeded():
    torch.manual_seed(0)
    return small()


def test_capturable_state_gives_the_same_as_plain():
    """Steps and betas may be tensors; here as they are after a load from a capturable run."""
    model, optimizer = stepped(torch.optim.AdamW)
    plain = adam_scales(model, optimizer, ["1.weight"])
    for group in optimizer.param_groups:
        group["betas"] = tuple(torch.tensor(beta) for beta in group["betas"])
    assert torch.allclose(
        adam_scales(model, optimizer, ["1.weight"])["1.weight"], plain["1.weight"]
    )


def test_what_has_no_second_moments_is_named():
    model, optimizer = stepped(torch.optim.AdamW, steps=0)
    with pytest.raises(MeritFastError, match="parameter 1.bias has no second moments yet"):
        adam_scales(model, optimizer, ["1.bias"])
    model, optimizer = stepped(torch.optim.SGD)
    with pytest.raises(MeritFastError, match="parameter 1.weight is not optimized by Adam"):
        adam_scales(model, optimizer, ["1.weight"])
    with pytest.raises(MeritFastError, match="has no parameter 7.weight"):
        adam_scales(model, optimizer, ["7.weight"])
    only_one = torch.optim.Adam([model[1].weight])
    with pytest.raises(MeritFastError, match="parameter 2.bias is not among the optimizer's"):
        adam_scales(model, only_one, ["2.bias"])


def test_fingerprint_tells_scales_apart():
    model, optimizer = stepped(torch.optim.AdamW, steps=2)
    names = [name for name, _ in model.named_parameters()]
    first = scales_fingerprint(adam_scales(model, optimizer, names))
    assert first == scales_fingerprint(adam_scales(model, optimizer, names[::-1]))
    assert first != scales_fingerprint(adam_scales(model, optimizer, names[1:]))
    optimizer.step()
    assert first != scales_fingerprint(adam_scales(model, optimizer, names))


def test_a_trainer_checkpoint_gives_the_scales_of_its_optimizer(tmp_path):
    import transformers as t

    config = t.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = t.LlamaForCausalLM(config)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    rows = [{"input_ids": [3, 5, 7, 9], "labels": [3, 5, 7, 9]}] * 4
    arguments = t.TrainingArguments(
        tmp_path,
        max_steps=2,
        save_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = t.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    live = adam_scales(model, trainer.optimizer, names)
    loaded = adam_scales_of_checkpoint(model, tmp_path / "checkpoint-2", names)
    assert loaded.keys() == live.keys()
    assert all(torch.equal(loaded[name], live[name]) for name in names)

    model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    with pytest.raises(
        InputError, match="optimizer.pt: must hold the model's 12 trainable parameters, got 11"
    ):
        adam_scales_of_checkpoint(model, tmp_path / "checkpoint-2", names)
    (tmp_path / "checkpoint-2" / "optimizer.pt").write_bytes(b"nothing")
    with pytest.raises(InputError, match="optimizer.pt: is not an optimizer's state"):
        adam_scales_of_checkpoint(model, tmp_path / "checkpoint-2", names)
