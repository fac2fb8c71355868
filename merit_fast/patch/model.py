"""``patch_model``: our kernels in one transformers model, taken out again by ``restore``."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import nn

from merit_fast.errors import InputError
from merit_fast.kernels.dispatch import BACKENDS
from merit_fast.patch.classes import swap_back
from merit_fast.patch.head import patch_head
from merit_fast.patch.layers import patch_layers

# model_type of the configs whose models are tested with and without our kernels.
ARCHITECTURES = frozenset(
    (
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3",
        "gemma3_text",
        "phi3",
        "smollm3",
        "granite",
    )
    + (
        "cohere",
        "qwen2_5_vl",
        "qwen2_5_vl_text",
        "qwen3_vl",
        "qwen3_vl_text",
        "mixtral",
        "qwen2_moe",
        "qwen3_moe",
    )
)


@dataclass(frozen=True)
class Patch:
    """What ``patch_model`` did. A context manager that restores the model at its end.

    Attributes:
        replaced: how many modules run which op: rms_norm, swiglu, geglu, rope, head.
        notes: what was left alone and why, a line each.
    """

    model: nn.Module
    replaced: Mapping[str, int]
    notes: tuple[str, ...]

    def restore(self) -> None:
        """Gives every module its own forward back; outputs have the bits they had. A second call does nothing."""
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
        return "\n".join([f"kernels: {done}", *(f"  left alone: {note}" for note in self.notes)])


def patch_model(model: nn.Module, kernels: str = "auto") -> Patch:
    """Runs the norms, gated MLPs, rotary positions and loss of one transformers model by merit_fast's kernels.

        patch = patch_model(model)     # or: with patch_model(model): ...
        print(patch)                   # kernels: rms_norm x 61, swiglu x 30, rope x 30, head x 1
        patch.restore()

    Only this instance changes, in place: parameters, state dict, hooks and other models of the class stay as they are,
    and copies and pickles stay patched. What is inside wrappers (PEFT, DistributedDataParallel, torch.compile) is
    patched; layers with adapters are called as they are. Before a module is replaced, its own forward and ours are
    compared on small random inputs; what differs is left alone. Of a vision-language model only the language tower is
    patched.

    In training with ``labels``, the loss comes from the hidden states and ``logits`` of the output is None (a batch
    without any target gives 0, not NaN). In evaluation, without labels, with hooks or adapters on the head, or with
    ``skip_logits=False``, the model's own forward runs. Patching a patched model patches it anew.

    Args:
        model: a transformers model, or a wrapper around one.
        kernels: "auto" (the best backend of each tensor's device), "eager" (nothing is replaced) or the backend that
            must run: "cpu", "triton".

    Returns:
        What was replaced, what was not, and the way back. An architecture that is not known is left alone with a note.

    Raises:
        InputError: another value of kernels.   BackendUnavailableError: that backend cannot run here.
    """
    if kernels not in ("auto", *BACKENDS):
        raise InputError(f"kernels: must be auto, {', '.join(BACKENDS)}; got {kernels!r}")
    inner = _unwrapped(model)
    for module in inner.modules():
        swap_back(module)
    if kernels == "eager":
        return Patch(inner, {}, ())
    name = getattr(getattr(inner, "config", None), "model_type", type(inner).__name__)
    if name not in ARCHITECTURES:
        return Patch(inner, {}, (f"{name}: is an architecture that patch_model does not know",))
    if any(parameter.is_meta for parameter in inner.parameters()):
        return Patch(inner, {}, ("the model has no weights yet (meta device)",))
    backend = None if kernels == "auto" else kernels
    decoder = inner.get_decoder()
    replaced, notes = patch_layers(decoder, backend)
    reason = patch_head(inner, backend)
    if reason is None:
        replaced["head"] = 1
    else:
        notes.append(f"{type(inner).__name__}: {reason}")
    notes += [f"{tower}: is not the language tower" for tower in _other_towers(inner, decoder)]
    return Patch(inner, replaced, tuple(notes))


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
    base = getattr(model, model.base_model_prefix, model)
    return [
        name
        for name, child in base.named_children()
        if base is not decoder
        and child is not decoder
        and next(child.parameters(), None) is not None
    ]
