"""Parameters that training leaves as they are."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from merit_fast.errors import InputError, show
from merit_fast.model.vision import tower_parameters

if TYPE_CHECKING:
    from torch import nn

KEY = "train.freeze"


def freeze_parameters(model: "nn.Module", freeze: Sequence[str] | None) -> tuple[str, ...]:
    """Freezes parameters in place: they need no gradient, and no stage changes them.

    Args:
        model: a language model.
        freeze: regular expressions, searched for in the names of the parameters. None: the vision
            tower and the projector of a model that reads images, and nothing of another one.

    Returns:
        The names of the frozen parameters, in the model's order.

    Raises:
        InputError: an expression is none, or matches no parameter; nothing is left to train.
    """
    frozen = tower_parameters(model) if freeze is None else _matched(model, freeze)
    for parameter in frozen.values():
        parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"{KEY}: must leave a parameter to train, got {show(freeze)}")
    return tuple(frozen)


def _matched(model: "nn.Module", freeze: Sequence[str]) -> dict[str, "nn.Parameter"]:
    # a tied parameter has several names
    named = dict(model.named_parameters(remove_duplicate=False))
    matched: dict[str, nn.Parameter] = {}
    for pattern in freeze:
        try:
            search = re.compile(pattern).search
        except re.error as error:
            raise InputError(
                f"{KEY}: must be regular expressions, got {show(pattern)} ({error})"
            ) from None
        found = {name: p for name, p in named.items() if search(name)}
        if not found:
            raise InputError(
                f"{KEY}: {show(pattern)} must match a parameter; the first is {next(iter(named))}"
            )
        matched |= found
    return {name: p for name, p in named.items() if name in matched}
