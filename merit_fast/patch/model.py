"""``patch_model`` puts our kernels into one transformers model; ``restore`` undoes it."""

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

# Values of config.model_type; tests compare each with and without our kernels.
ARCHITECTURES = frozenset(
    [
        "cohere",
        "gemma",
        "gemma2",
        "gemma3",
        "gemma3_text",
        "granite",
        "llama",
        "llava",
        "llava_next",
        "llava_onevision",
        "mistral",
        "mixtral",
        "phi3",
        "qwen2",
        "qwen2_5_vl",
        "qwen2_5_vl_text",
        "qwen2_moe",
        "qwen2_vl",
        "qwen3",
        "qwen3_moe",
        "qwen3_vl",
        "qwen3_vl_text",
        "smollm3",
        "smolvlm",
    ]
)


@dataclass(frozen=True)
class Patch:
    """Record of a patched model; as a context manager it restores the model at its end.

    Attributes:
        model: the model without its wrappers.
        replaced: number of modules that run each op: rms_norm, swiglu, geglu, rope, head.
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
    PEFT, DistributedDataParallel or torch.compile are patched; layers with adapters are called as
    they are. Before it replaces a module, ``patch_model`` compares the module's own forward with
    ours on small random inputs and keeps any module that differs. In a vision-language model
    it patches only the language tower.

    In training with ``labels``, the loss comes from the hidden states, and the output's ``logits``
    are None (a batch without any target gives 0, not NaN). The model's own forward runs in
    evaluation, without labels, with hooks or adapters on the head, and with ``skip_logits=False``.
    A second call starts from the model's own forwards again.

    Args:
        model: a transformers model, or a wrapper around one.
        kernels: "auto" (the best backend of each tensor's device), "eager" (nothing is replaced),
            or the backend that must run ("cpu", "triton").

    Returns:
        The record of what changed. An unknown architecture stays as it is, with a note.

    Raises:
        InputError: ``kernels`` has another value.
        BackendUnavailableError: the backend cannot run here.
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
