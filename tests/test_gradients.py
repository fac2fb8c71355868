"""The hooks' sketches equal those of exact per-example gradients from torch.func, and leave the model as it was."""

import pytest
import torch
from checks import assert_close
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from merit_fast.data import Example, collate
from merit_fast.errors import MeritFastError
from merit_fast.kernels.sketch import CountSketch, flat_sketch
from merit_fast.model import target_losses
from merit_fast.split.gradients import GradientSketcher

SKETCH = CountSketch(4096, seed=7)
SIZES = dict(vocab_size=97, hidden_size=36, intermediate_size=52, num_hidden_layers=2)


def tiny(architecture, tied):
    import transformers as t

    heads = dict(num_attention_heads=3, num_key_value_heads=1, tie_word_embeddings=tied)
    if architecture == "llama":
        config = t.LlamaConfig(**SIZES, **heads, attention_bias=True)
    elif architecture == "qwen2":
        config = t.Qwen2Config(**SIZES, **heads)
    elif architecture == "qwen3":
        config = t.Qwen3Config(**SIZES, **heads, head_dim=12)
    elif architecture == "gemma":
        config = t.GemmaConfig(**SIZES, **heads, head_dim=12)
    elif architecture == "gpt2":
        config = t.GPT2Config(vocab_size=97, n_embd=36, n_layer=2, n_head=3, n_positions=64, tie_word_embeddings=tied)
    else:
        config = t.GPTNeoXConfig(**SIZES, num_attention_heads=3, tie_word_embeddings=tied)
    config.pad_token_id = 0
    return t.AutoModelForCausalLM.from_config(config).eval()


def ragged_examples(lengths=(9, 14, 5), vocabulary=97):
    """Ids from 0 on: the padding token (0 in these models) occurs in the text too, as the end token does in chats."""
    generator = torch.Generator().manual_seed(4)
    examples = []
    for length in lengths:
        ids = torch.randint(0, vocabulary, (length,), generator=generator).int().numpy()
        ids[1] = 0
        labels = ids.copy()
        labels[: length // 2] = -100
        examples.append(Example(ids, labels))
    return examples


def hook_sketches(model, examples):
    with GradientSketcher(model, SKETCH) as sketcher:
        losses = target_losses(model, collate(examples, [0] * len(examples), 0))
        losses.loss.sum().backward()
        return sketcher.take()


def exact_sketches(model, examples):
    """vmap(grad) over unpadded examples of one length at a time, then flat sketches of every parameter."""
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    rows = []
    for example in examples:
        ids, labels = torch.tensor(example.input_ids)[None].long(), torch.tensor(example.labels)[None].long()

        def loss(values, one_ids, one_labels):
            logits = functional_call(model, values, (), {"input_ids": one_ids[None], "use_cache": False}).logits
            return F.cross_entropy(logits[0, :-1], one_labels[1:], ignore_index=-100, reduction="sum")

        if model.config.model_type in ("llama", "qwen2"):
            gradients = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, ids, labels)
        else:  # their masks branch on data, which vmap refuses
            gradients = {name: g[None] for name, g in grad(loss)(parameters, ids[0], labels[0]).items()}
        out = torch.zeros(1, SKETCH.proj_dim)
        for name, gradient in gradients.items():
            flat = gradient.flatten(2) if gradient.dim() > 2 else gradient
            flat_sketch(flat.contiguous(), name, SKETCH, out=out, backend="eager")
        rows.append(out)
    return torch.cat(rows)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma", "gpt2", "neox"])
def test_hooks_equal_vmap_grad(architecture, tied):
    model = tiny(architecture, tied)
    model.set_attn_implementation("eager")
    examples = ragged_examples()
    result, truth = hook_sketches(model, examples), exact_sketches(model, examples)
    for mine, exact in zip(result, truth, strict=True):
        assert_close(mine, exact, torch.float32)


def test_frozen_parameters_are_left_out():
    model = tiny("llama", tied=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" in name or "norm" in name)
    examples = ragged_examples()
    assert_close(hook_sketches(model, examples), exact_sketches(model, examples))


def test_batching_padding_and_order_do_not_matter():
    model, examples = tiny("qwen2", tied=True), ragged_examples((9, 14, 5, 30))
    together = hook_sketches(model, examples)
    alone = torch.cat([hook_sketches(model, [example]) for example in examples])
    turned = hook_sketches(model, examples[::-1]).flip(0)
    assert_close(together, alone)
    assert_close(turned, alone)


def test_gradient_checkpointing_gives_the_same():
    model, examples = tiny("llama", tied=True), ragged_examples()
    plain = hook_sketches(model, examples)
    model.train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    assert_close(hook_sketches(model, examples), plain)


def test_bf16_is_near_fp32():
    model, examples = tiny("llama", tied=True), ragged_examples()
    exact = hook_sketches(model, examples)
    rounded = hook_sketches(model.bfloat16(), examples)
    cosine = F.cosine_similarity(exact, rounded)
    assert (cosine > 0.99).all(), cosine


def test_model_is_restored_even_after_an_exception():
    model = tiny("llama", tied=True)
    model.model.embed_tokens.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="on purpose"), GradientSketcher(model, SKETCH):
        target_losses(model, collate(ragged_examples(), [0] * 3, 0)).loss.sum().backward()
        raise RuntimeError("on purpose")
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_parameter_that_cannot_be_covered_is_named():
    class Gate(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.scale = inner, torch.nn.Parameter(torch.ones(1))

        def forward(self, *args, **kwargs):
            output = self.inner(*args, **kwargs)
            return (output,) if isinstance(output, torch.Tensor) else output

    model = tiny("llama", tied=True)
    model.model.layers[1].mlp = Gate(model.model.layers[1].mlp)
    with (
        pytest.raises(MeritFastError, match="parameter model.layers.1.mlp.scale belongs to Gate"),
        GradientSketcher(model, SKETCH),
    ):
        model(input_ids=torch.ones(2, 5, dtype=torch.long))


def test_routed_experts_are_refused_by_name():
    import transformers as t

    config = t.MixtralConfig(
        **SIZES, num_attention_heads=3, num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1
    )
    model = t.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(MeritFastError, match="parameter model.layers.0.mlp.gate.weight"):
        hook_sketches(model, ragged_examples())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("gate.weight" not in name)
    with pytest.raises(MeritFastError, match="parameter model.layers.*experts"):
        hook_sketches(model, ragged_examples())


def test_take_before_a_pass_says_so():
    with GradientSketcher(tiny("llama", True), SKETCH) as sketcher, pytest.raises(MeritFastError, match="before"):
        sketcher.take()
