"""A check that a model reads trees exactly, and their texts in place of them where it does not."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from merit_fast.model.losses import target_losses

if TYPE_CHECKING:
    from torch import Tensor, nn

    from merit_fast.data import Example

# Share of the effect of a tree's other branches that is still rounding.
_SHARE_FP32 = 1e-3
_SHARE_LOW = 0.1
_EPS_LOW = 1e-3  # bf16 and fp16 are above
# What forwards raise for a mask that they cannot use.
_REFUSALS = (ValueError, TypeError, RuntimeError, IndexError, AttributeError, KeyError)
_MASKED = ("eager", "sdpa")  # kinds of attention that take a mask of every query and key
# model -> (tokens of the longest tree that was tried, result)
_tried: "WeakKeyDictionary[nn.Module, tuple[int, bool]]" = WeakKeyDictionary()


def fit_trees(
    model: "nn.Module | None", examples: "Sequence[Example]"
) -> "tuple[list[Example], list[int]]":
    """Examples as the model can read them, and the number of the example that each belongs to.

    Trees stay as they are if the model reads them exactly, else their texts take their places.

    Args:
        model: a language model, in any mode; None: one that is not asked and reads no trees.
        examples: N examples.

    Returns:
        M >= N examples, and [M] numbers from 0 to N - 1 in ascending order.
    """
    from merit_fast.data.tree import expand

    trees = [example for example in examples if example.tree is not None]
    if not trees or (model is not None and reads_trees(model, trees)):
        return list(examples), list(range(len(examples)))
    texts = [(text, number) for number, e in enumerate(examples) for text in expand(e)]
    return [text for text, _ in texts], [number for _, number in texts]


def reads_trees(model: "nn.Module", trees: "Sequence[Example]") -> bool:
    """Whether a model's losses of trees are those of their texts, up to rounding.

        change = mean |loss in the tree - loss in its text|
        whole = the mean where every branch is part of the texts behind it
        allowed: change <= share(dtype) * whole + eps(dtype) / 4 * (1 + mean loss)

    The shortest and the longest tree are tried: layers with windows differ on long texts only. A
    model that was tried on a longer tree is not tried again.

    Args:
        model: a language model, in any mode.
        trees: at least one example with a tree.
    """
    import torch

    ordered = sorted(trees, key=lambda example: len(example.input_ids))
    shortest = ordered[0]
    longest = ordered[-1]
    length = len(longest.input_ids)
    known = _tried.get(model)
    if known is not None and (not known[1] or known[0] >= length):
        return known[1]
    training = model.training
    model.eval()
    with torch.no_grad():
        exact = _is_exact(model, shortest) and (shortest is longest or _is_exact(model, longest))
    model.train(training)
    _tried[model] = (length, exact)
    return exact


def _is_exact(model: "nn.Module", tree: "Example") -> bool:
    import torch

    from merit_fast.data import Example
    from merit_fast.data.tree import expand

    apart = torch.cat([_losses(model, text) for text in expand(tree)])
    try:
        joined = _losses(model, tree)
    except _REFUSALS:
        return False
    config: Any = model.config
    if config._attn_implementation not in _MASKED:
        return False
    linear = _losses(model, Example(tree.input_ids, tree.labels))
    difference = float((joined - apart).abs().mean())
    whole = float((linear - apart).abs().mean())
    eps = torch.finfo(next(model.parameters()).dtype).eps
    share = _SHARE_FP32 if eps < _EPS_LOW else _SHARE_LOW
    return difference <= share * whole + eps / 4 * (1 + float(apart.mean()))


def _losses(model: "nn.Module", example: "Example") -> "Tensor":
    from merit_fast.data import collate

    return target_losses(model, collate([example], [0], 0)).loss
