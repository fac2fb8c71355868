"""One name of a parameter, whatever wraps the model: sketches of equal models agree by it."""

import re
from collections.abc import Iterator

from torch import nn

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_WRAPPED = re.compile(rf"(?:^|(?<=\.))(?:{'|'.join(_WRAPPERS)})\.")


def canonical_name(name: str) -> str:
    """The name without what torch.compile, FSDP, checkpoint wrappers and PEFT put into it.

    >>> canonical_name("_orig_mod.model.layers.0._checkpoint_wrapped_module.mlp.up_proj.weight")
    'model.layers.0.mlp.up_proj.weight'
    >>> canonical_name("base_model.model.lm_head.base_layer.weight")
    'lm_head.weight'
    """
    name = _WRAPPED.sub("", name).removeprefix("base_model.model.")
    return name.replace(".base_layer.", ".")


def named_parameters(
    model: nn.Module, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Parameter]]:
    """``model.named_parameters()`` under canonical names."""
    for name, parameter in model.named_parameters(remove_duplicate=remove_duplicate):
        yield canonical_name(name), parameter
