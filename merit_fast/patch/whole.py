"""A tiny model of the same class and config, whole, with and without what is planned."""

import copy
import inspect
import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from merit_fast.errors import one_line
from merit_fast.kernels.labels import IGNORED_LABEL
from merit_fast.patch.classes import Plan, own_class, swap_all, swap_back
from merit_fast.patch.forms.residual import only_plain_forms
from merit_fast.patch.proof import Operations, random_tensor, seed_generator, undisturbed
from merit_fast.patch.shrink import VOCABULARY, shrunken_model

Plans = Callable[[Any, str | None], tuple[list[Plan], list[str]]]

_FP32 = 5e-5
_BF16 = 3e-2
_SUMS = "add_rms_norm"  # what only a trial of the whole model proves
_MOST_SECONDS = 2.0  # of one plain pass; some models loop over tokens in Python
_ROWS = 2
_TOKENS = 9


@dataclass(frozen=True)
class Verdict:
    """Findings of a tiny model.

    Attributes:
        dropped: ops with which it gives other losses or gradients.
        layers: classes of layers that add to the residual and normalise in one pass.
        notes: the reasons.
    """

    dropped: frozenset[str]
    layers: frozenset[type]
    notes: tuple[str, ...]

    def keeps(self, plan: Plan) -> bool:
        if plan.op == _SUMS and own_class(type(plan.module)) not in self.layers:
            return False
        return plan.op not in self.dropped


# (model class, config, backend, kinds of plans) -> what differs; tiny models take a second.
_KNOWN: dict[Any, Verdict] = {}


def try_whole(model: nn.Module, backend: str | None, plans: list[Plan], plans_of: Plans) -> Verdict:
    """Compares a tiny model of this kind, whole, with and without what is planned."""
    if not plans:
        return Verdict(frozenset(), frozenset(), ())
    device = next(model.parameters()).device
    key = _key(model, backend, plans, device)
    if key not in _KNOWN:
        with undisturbed(device), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            seed_generator(device)
            _KNOWN[key] = _compare(model, backend, plans_of, device)
    return _KNOWN[key]


def _key(model: nn.Module, backend: str | None, plans: list[Plan], device: torch.device) -> Any:
    config: Any = getattr(model, "config", None)
    text = config.to_json_string() if hasattr(config, "to_json_string") else ""
    attention = getattr(config, "_attn_implementation", None)
    kinds = frozenset(
        (type(plan.module), type(plan.module).forward, plan.op, plan.options) for plan in plans
    )
    return type(model), text, attention, backend, device.type, kinds


def _compare(
    model: nn.Module, backend: str | None, plans_of: Plans, device: torch.device
) -> Verdict:
    tiny = shrunken_model(model, device)
    if isinstance(tiny, str):
        return _not_compared(tiny)
    batch = _batch(tiny, device)
    try:
        expected = _observe(tiny, batch, _MOST_SECONDS)
    except Exception as error:  # whatever foreign code raises about a tiny model
        return _not_compared(f"a tiny one does not run ({type(error).__name__})")
    plans, _ = plans_of(tiny, backend)
    layers = frozenset(
        cls
        for cls in {type(plan.module) for plan in plans if plan.op == _SUMS}
        if _adds_in(cls, tiny, batch, plans)
    )
    plans = [plan for plan in plans if plan.op != _SUMS or type(plan.module) in layers]
    difference = _difference(tiny, batch, plans, expected)
    if not difference:
        return Verdict(frozenset(), layers, ())
    ops = sorted({plan.op for plan in plans})
    for op in ops:
        if not _difference(tiny, batch, [plan for plan in plans if plan.op != op], expected):
            return Verdict(frozenset([op]), layers, (f"{op}: {difference}",))
    return Verdict(frozenset(ops), layers, (f"{', '.join(ops)}: {difference}",))


def _not_compared(reason: str) -> Verdict:
    return Verdict(frozenset(), frozenset(), (f"the whole model was not compared: {reason}",))


def _adds_in(cls: type, model: Any, batch: Mapping[str, Any], plans: list[Plan]) -> bool:
    """Whether layers of this class only add and normalise, and do both in one pass somewhere."""
    swap_all(plan for plan in plans if plan.op != _SUMS or type(plan.module) is cls)
    try:
        with only_plain_forms(), Operations() as operations:
            for training in (True, False):
                copy.deepcopy(model).train(training)(**batch)  # it may keep its results
    except Exception:  # foreign code on a view of the layer
        return False
    finally:
        for module in model.modules():
            swap_back(module)
    return f"merit_fast::{_SUMS}" in operations.names


def _batch(model: nn.Module, device: torch.device) -> dict[str, Any]:
    generator = torch.Generator("cpu").manual_seed(0)
    tokens = torch.randint(3, VOCABULARY, (_ROWS, _TOKENS), generator=generator, device="cpu")
    labels = tokens.clone()
    labels[0, :4] = IGNORED_LABEL
    inputs = {"input_ids": tokens.to(device), "labels": labels.to(device), "use_cache": False}
    known = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
    takes_labels = "labels" in known or (takes_any and hasattr(model, "loss_function"))
    if not takes_labels:
        del inputs["labels"]
    return {name: value for name, value in inputs.items() if takes_any or name in known}


@dataclass(frozen=True)
class _Observed:
    """Results of a model in one mode: loss, logits where it computes them, gradients."""

    loss: Tensor
    logits: Tensor | None
    gradients: Mapping[str, Tensor]


def _observe(
    tiny: Any, batch: Mapping[str, Any], most_seconds: float = math.inf
) -> list[_Observed]:
    """Results in training, in evaluation, and in training with bfloat16 weights.

    Raises a TimeoutError after a pass that takes longer. Passes with our kernels have no limit,
    since a first one may compile them; nor do other threads count, which may only spin.
    """
    results = []
    for training, dtype in (
        (True, torch.float32),
        (False, torch.float32),
        (True, torch.bfloat16),
    ):
        model = copy.deepcopy(tiny).to(dtype).train(training)  # a forward may change its buffers
        seed_generator(next(model.parameters()).device)
        start = time.thread_time()
        output = model(**batch)
        first = next(iter(output.values()))  # the loss, or a base model's hidden states
        direction = random_tensor(*first.shape, seed=1, device=first.device)
        loss = first if first.dim() == 0 else (first.float() * direction).sum()
        loss.backward()
        if time.thread_time() - start > most_seconds:
            raise TimeoutError
        gradients = {
            name: parameter.grad.float()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
        logits = output.get("logits")
        logits = None if training or logits is None else logits.detach().float()
        results.append(_Observed(loss.detach().float(), logits, gradients))
    return results


def _difference(
    model: nn.Module, batch: Mapping[str, Any], plans: list[Plan], expected: list[_Observed]
) -> str:
    """Describe how these plans change what the model gives; "" if they do not."""
    swap_all(plans)
    try:
        actual = _observe(model, batch)
    except Exception as error:  # foreign code that meets something it does not expect
        return f"the whole model then fails: {type(error).__name__}: {one_line(error)}"
    finally:
        for module in model.modules():
            swap_back(module)
    train, evaluation, low = zip(expected, actual, strict=True)
    are_equal = (
        _are_equal(*train)
        and _are_equal(*evaluation)
        and bool((low[0].loss - low[1].loss).abs() <= _BF16 * low[0].loss.abs())
        and low[0].gradients.keys() == low[1].gradients.keys()
    )
    return "" if are_equal else "the whole model then has other losses or gradients"


def _are_equal(theirs: _Observed, ours: _Observed) -> bool:
    if theirs.gradients.keys() != ours.gradients.keys():
        return False
    pairs = [(ours.loss, theirs.loss)]
    if ours.logits is not None and theirs.logits is not None:
        pairs.append((ours.logits, theirs.logits))
    if not all(_is_near(our, their, 0.0) for our, their in pairs):
        return False
    norms = [gradient.double().norm() for gradient in theirs.gradients.values()]
    total = float(torch.stack(norms).norm()) if norms else 0.0
    return all(
        _is_near(ours.gradients[name], gradient, 0.01 * total)
        for name, gradient in theirs.gradients.items()
    )


def _is_near(actual: Tensor, expected: Tensor, floor: float) -> bool:
    error = (actual.double() - expected.double()).norm()
    return bool(error <= _FP32 * (expected.double().norm() + floor))
