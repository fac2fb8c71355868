"""Mixtures of experts: routers, routed and shared experts, however the model computes them."""

import pytest
import torch
from support.checks import assert_close
from support.sketch.exact_gradients import (
    SIZES,
    exact_sketches,
    hook_sketches,
    ragged_examples,
    tiny,
)

from merit_fast.kernels.sketch import matrix_shape
from merit_fast.sketch.selection import select_parameters


@pytest.mark.parametrize(
    "architecture, implementation",
    [
        ("mixtral", "eager"),
        ("qwen2-moe", "batched_mm"),
        ("qwen2-moe", "eager"),
        ("qwen3-moe", "grouped_mm"),
    ],
)
def test_hooks_equal_a_pass_per_example(architecture, implementation):
    model = tiny(architecture, tied=True)
    examples = ragged_examples()
    model.set_experts_implementation(implementation)
    assert_close(hook_sketches(model, examples), exact_sketches(model, examples))
    assert model.config._experts_implementation == implementation


@pytest.mark.parametrize(
    "parameters", [r"mlp\.gate\.weight", "down_proj", "gate_up_proj", "shared_expert"]
)
def test_each_kind_of_parameter_alone(parameters):
    model = tiny("qwen2-moe")
    examples = ragged_examples()
    chosen = select_parameters(model, parameters)
    assert_close(
        hook_sketches(model, examples, parameters=chosen), exact_sketches(model, examples, chosen)
    )


def test_experts_with_scales():
    model = tiny("mixtral")
    examples = ragged_examples()
    chosen = select_parameters(model, "experts")
    scales = {name: torch.rand(matrix_shape(p.shape)) + 0.5 for name, p in chosen.items()}
    result = hook_sketches(model, examples, parameters=chosen, scales=scales)
    hooks = [
        p.register_hook(lambda g, s=scales[name]: g * s.view(g.shape)) for name, p in chosen.items()
    ]
    assert_close(result, exact_sketches(model, examples, chosen))
    assert len(hooks) == 4


def gpt_oss():
    import transformers as t

    config = t.GptOssConfig(
        **SIZES,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=12,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    config.pad_token_id = 0
    model = t.GptOssForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "expert" in name or "router" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


def test_experts_stored_transposed_and_with_biases():
    model = gpt_oss()
    examples = ragged_examples()
    chosen = select_parameters(model, "experts|router")
    assert {len(p.shape) for p in chosen.values()} == {1, 2, 3}
    assert_close(
        hook_sketches(model, examples, parameters=chosen), exact_sketches(model, examples, chosen)
    )


def test_attention_sinks():
    model = gpt_oss()
    examples = ragged_examples()
    assert_close(hook_sketches(model, examples), exact_sketches(model, examples))
    chosen = select_parameters(model, "sinks")
    assert_close(
        hook_sketches(model, examples, parameters=chosen), exact_sketches(model, examples, chosen)
    )


def test_experts_of_another_formula():
    model = tiny("mixtral")
    examples = ragged_examples()
    model.set_experts_implementation("eager")
    experts = model.model.layers[0].mlp.experts
    experts._apply_gate = lambda inner: (
        2 * type(experts)._apply_gate(experts, inner)
    )  # the eager forward has its own
    assert_close(hook_sketches(model, examples), exact_sketches(model, examples))


def test_an_expert_without_tokens_has_no_gradient():
    model = tiny("mixtral")
    examples = ragged_examples((3,))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[3] = -10 * layer.mlp.gate.weight[:3].abs().sum(0)
    chosen = select_parameters(model, "experts")
    assert_close(
        hook_sketches(model, examples, parameters=chosen), exact_sketches(model, examples, chosen)
    )
