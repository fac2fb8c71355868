"""Forward-mode derivatives: kernels refuse them in words, and eager has them."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import jvp

from merit_fast.kernels import dispatch
from merit_fast.kernels.cross_entropy import linear_cross_entropy, linear_token_statistics
from merit_fast.kernels.layers import add_rms_norm, geglu, rms_norm, rope, swiglu

LABELS = torch.tensor([1, 0, -100, 4])
ANGLES = torch.linspace(0, 3, 24).view(1, 3, 8)


def norm_of_sum(x, y, **options):
    return add_rms_norm(x, y, torch.ones(8), 1e-6, **options)[0]


def rotated(x, y, **options):
    return rope(x, y, ANGLES.cos(), ANGLES.sin(), **options)[0]


def loss_of_head(x, weight, **options):
    return linear_cross_entropy(x, weight, LABELS, **options).loss


def log_probs(x, weight, **options):
    return linear_token_statistics(x, weight, LABELS, **options).log_probs


# name -> function of two tensors, and their shapes
FUNCTIONS = {
    "rms_norm": (lambda x, w, **o: rms_norm(x, w, 1e-6, **o), (4, 8), (8,)),
    "add_rms_norm": (norm_of_sum, (4, 8), (4, 8)),
    "swiglu": (swiglu, (4, 8), (4, 8)),
    "swiglu of one": (lambda x, y, **o: swiglu(torch.cat([x, y], -1), **o), (4, 8), (4, 8)),
    "geglu": (geglu, (4, 8), (4, 8)),
    "rope": (rotated, (1, 2, 3, 8), (1, 2, 3, 8)),
    "linear_cross_entropy": (loss_of_head, (4, 8), (5, 8)),
    "linear_token_statistics": (log_probs, (4, 8), (5, 8)),
}
EVERY = pytest.mark.parametrize("name", FUNCTIONS)


def numbers(name):
    torch.manual_seed(0)
    function, *shapes = FUNCTIONS[name]
    inputs = tuple(torch.randn(shape) for shape in shapes)
    return function, inputs, tuple(torch.randn(shape) for shape in shapes)


@pytest.mark.skipif(dispatch.native_module() is None, reason="the native kernels were not built")
@EVERY
def test_kernels_refuse_tangents_in_words(name):
    """A custom op would return results without tangents, as if they were constants."""
    function, inputs, tangents = numbers(name)
    with pytest.raises(NotImplementedError, match="forward-mode.*backend='eager'"):
        jvp(function, inputs, tangents)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(inputs[1], tangents[1])
        with pytest.raises(NotImplementedError, match="forward-mode.*backend='eager'"):
            function(inputs[0], dual)
        assert torch.equal(function(*inputs), function(*inputs))  # without tangents it runs


@EVERY
def test_forward_mode_of_eager_is_the_transpose_of_the_gradients(name):
    function, inputs, tangents = numbers(name)
    _, tangent = jvp(lambda *x: function(*x, backend="eager"), inputs, tangents)
    leaves = [x.clone().requires_grad_() for x in inputs]
    result = function(*leaves)
    weights = torch.randn_like(result)
    gradients = torch.autograd.grad(result, leaves, weights, allow_unused=True)
    pairs = [(g, t) for g, t in zip(gradients, tangents, strict=True) if g is not None]
    expected = sum(float((g.double() * t.double()).sum()) for g, t in pairs)
    assert float((weights.double() * tangent.double()).sum()) == pytest.approx(expected, rel=1e-4)
