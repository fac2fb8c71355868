"""Copies of a module that share its structure and hold other parameters."""

import copy

from torch import Tensor, nn


def twin_of(module: nn.Module, values: dict[str, Tensor]) -> nn.Module:
    """Returns a copy of the module with other values for its own parameters."""
    twin = copy.copy(module)
    twin._parameters = {
        **module._parameters,
        **{k: nn.Parameter(v, False) for k, v in values.items()},
    }
    twin.__dict__.pop("forward", None)
    return twin


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    return dict(module.named_parameters(recurse=False, remove_duplicate=False))
