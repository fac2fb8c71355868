"""Whole patched models under torch.compile: one graph where the model has one, the same numbers."""

import sys

import pytest
import torch
from support.architectures import inputs, make
from support.checks import assert_close
from support.patched import assert_same_gradients, loss_and_gradients
from torch._dynamo.testing import CompileCounterWithBackend

from merit_fast import patch_model
from merit_fast.kernels import dispatch

pytestmark = pytest.mark.skipif(
    dispatch.native_module() is None, reason="the native kernels were not built"
)


@pytest.fixture(autouse=True)
def _compiler_without_memory():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "name, whole",
    [("gemma2", True), ("phi3 partial", True), ("mixtral", False)],
)
def test_a_patched_model_compiles_as_the_model_itself_does(name, whole):
    """Experts choose their tokens by data, so that a mixture has several graphs, patched or not."""
    expected, gradients = loss_and_gradients(make(name), inputs())
    model = make(name)
    patch_model(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=whole)
    output, _ = loss_and_gradients(compiled, inputs())
    assert output.logits is None
    assert_close(output.loss.detach(), expected.loss.detach())
    assert_same_gradients({key: p.grad for key, p in model.named_parameters()}, gradients)


def test_a_model_compiles_once_for_any_length():
    model = make("llama", num_hidden_layers=1)
    patch_model(model)
    counted = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend=counted)
    graphs = set()
    for length in (9, 6, 7):
        batch = {key: value[:, :length] for key, value in inputs().items()}
        expected, gradients = loss_and_gradients(make("llama", num_hidden_layers=1), batch)
        output, _ = loss_and_gradients(compiled, batch)
        graphs.add(counted.frame_count)
        assert_close(output.loss.detach(), expected.loss.detach())
        assert_same_gradients({key: p.grad for key, p in model.named_parameters()}, gradients)
    assert len(graphs) == 1


def test_layers_compile_one_by_one():
    plain = make("qwen3")
    model = make("qwen3")
    patch_model(model)
    for layer in model.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    expected, gradients = loss_and_gradients(plain, inputs())
    output, actual = loss_and_gradients(model, inputs())
    assert_close(output.loss.detach(), expected.loss.detach())
    assert_same_gradients(actual, gradients)


@pytest.mark.parametrize("compiles", [False, True])
def test_a_rope_that_is_replaced_later_is_followed(monkeypatch, compiles):
    """Somebody's own positions in transformers' module reach the patched model's next step."""
    model = make("llama")
    module = sys.modules[type(model).__module__]
    patch_model(model)
    call = torch.compile(model, backend="eager") if compiles else model
    before = call(**inputs()).loss
    plain = module.apply_rotary_pos_emb

    def enlarged(q, k, cos, sin, **options):
        return plain(40 * q, 40 * k, cos, sin, **options)

    monkeypatch.setattr(module, "apply_rotary_pos_emb", enlarged)
    expected = make("llama")(**inputs()).loss
    assert not torch.isclose(before, expected, rtol=1e-4)
    assert_close(call(**inputs()).loss.detach(), expected.detach())
    monkeypatch.undo()
    assert torch.equal(call(**inputs()).loss, before)
