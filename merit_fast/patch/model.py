"""``patch_model`` puts our kernels into one transformers model; ``restore`` undoes it."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import nn

from merit_fast.errors import InputError
from merit_fast.kernels.dispatch import BACKENDS
from merit_fast.patch.classes import Plan, set_classes, swap_all, swap_back
from merit_fast.patch.forms.residual import plan_sums
from merit_fast.patch.head import plan_head
from merit_fast.patch.plan import Planner
from merit_fast.patch.whole import try_whole

OPS = ("rms_norm", "add_rms_norm", "swiglu", "geglu", "rope", "head")


@dataclass(frozen=True)
class Patch:
    """Record of a patched model; as a context manager it restores the model at its end.

    Attributes:
        model: the model without its wrappers.
        replaced: number of modules that run each op: rms_norm, add_rms_norm (in layers), swiglu,
            geglu, rope, head.
        notes: one line per kind of module that stays as it was, with the reason.
    """

    model: nn.Module
    replaced: Mapping[str, int]
    notes: tuple[str, ...]

    def restore(self) -> None:
        """Gives every module its own forward back, bit for bit. A second call does nothing."""
        for module in self.model.modules():
            swap_back(module)

    def __enter__(self) -> "Patch":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.restore()

    def __str__(self) -> str:
        done = (
            ", ".join(f"{op} x {count}" for op, count in self.replaced.items())
            or "nothing replaced"
        )
        return "\n".join([f"kernels: {done}", *(f"  unchanged: {note}" for note in self.notes)])


def patch_model(model: nn.Module, kernels: str = "auto") -> Patch:
    """Runs one model's norms, gated MLPs, rotary positions and loss with our kernels.

        patch = patch_model(model)     # or: with patch_model(model): ...
        print(patch)                   # kernels: rms_norm x 61, swiglu x 30, rope x 30, head x 1
        patch.restore()

    Only this instance changes, in place. Its parameters, state dict and hooks stay, and so do other
    models of the class. Copies and pickles stay patched, in other processes too. Models inside
    PEFT, DistributedDataParallel or torch.compile are patched, before or after FSDP2's
    ``fully_shard``; layers with adapters are called as they are. In a vision-language model only
    the language tower is patched.

    Any architecture may come. A module is replaced only if trials show that it computes what a
    kernel does: values and gradients on small random inputs (training and evaluation, fp32 and
    bf16, several scales and shapes), no other operation such as dropout, and a tiny model of the
    same config that is equal as a whole. The trials take about a second, draw no number from
    torch's generators and change nothing in the model. Every call checks what the trials assumed,
    and runs the module's own forward if its activation, a number or word that the forward reads,
    the forward or a method that it calls, or the function that rotates positions was replaced
    since.

    In training with ``labels``, the loss comes from the hidden states, and the output's ``logits``
    are None (a batch without any target gives 0, not NaN, and a warning if it is the first). The
    model's own forward runs in evaluation, without labels, with hooks or adapters on the head, and
    with ``skip_logits=False``. A second call starts from the model's own forwards again.

    Args:
        model: a transformers model, or a wrapper around one.
        kernels: "auto" (the best backend of each tensor's device), "eager" (nothing is replaced),
            or the backend that must run ("cpu", "triton").

    Returns:
        The record of what changed; its notes say what stays, and why.

    Raises:
        InputError: ``kernels`` has another value.
        BackendUnavailableError: the backend cannot run here.
        BaseException: any other error of a trial. Every module then has the class it had before.
    """
    if kernels not in ("auto", *BACKENDS):
        raise InputError(f"kernels: must be auto, {', '.join(BACKENDS)}; got {kernels!r}")
    inner = _unwrapped(model)
    before = [(module, type(module)) for module in inner.modules()]
    try:
        for module, _ in before:
            swap_back(module)
        if kernels == "eager":
            return Patch(inner, {}, ())
        if any(parameter.is_meta for parameter in inner.parameters()):
            return Patch(inner, {}, ("the model has no weights yet (meta device)",))
        return _patched(inner, None if kernels == "auto" else kernels)
    except BaseException:
        set_classes(before)
        raise


def _patched(inner: Any, backend: str | None) -> Patch:
    plans, notes = _plans(inner, backend)
    verdict = try_whole(inner, backend, plans, _plans)
    plans = [plan for plan in plans if verdict.keeps(plan)]
    swap_all(plans)
    counts = {op: sum(plan.op == op for plan in plans) for op in OPS}
    replaced = {op: count for op, count in counts.items() if count}
    return Patch(inner, replaced, (*notes, *verdict.notes))


def _plans(inner: Any, backend: str | None) -> tuple[list[Plan], list[str]]:
    """Find what each module of a model can run, with a note for each kind that stays."""
    decoder = inner.get_decoder() if hasattr(inner, "get_decoder") else inner
    parameter = next(decoder.parameters(), None)
    if parameter is None:
        return [], [f"{type(inner).__name__}: has no parameters"]
    planner = Planner(parameter.device, backend)
    modules = list(decoder.modules())
    plans = planner.layers(modules)
    plans += plan_sums(plans, modules, backend)
    notes = planner.notes
    head = plan_head(inner, backend)
    if isinstance(head, Plan):
        plans.append(head)
    else:
        notes.append(f"{type(inner).__name__}: {head}")
    notes += [f"{tower}: is not the language tower" for tower in _other_towers(inner, decoder)]
    return plans, notes


def _unwrapped(model: Any) -> Any:
    while True:
        if hasattr(model, "_orig_mod"):  # torch.compile
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif hasattr(model, "get_base_model"):  # PEFT
            model = model.get_base_model()
        else:
            return model


def _other_towers(model: Any, decoder: nn.Module) -> list[str]:
    base = getattr(model, getattr(model, "base_model_prefix", ""), model)
    return [
        name
        for name, child in base.named_children()
        if base is not decoder
        and child is not decoder
        and next(child.parameters(), None) is not None
    ]
