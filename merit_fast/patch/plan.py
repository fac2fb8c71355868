"""Choose the kernels that each module of a model runs: every kind is tried once."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from merit_fast.patch.classes import Plan, method_on_instance
from merit_fast.patch.forms.gated import gated_parts, match_gated
from merit_fast.patch.forms.norm import epsilon_of, match_norm
from merit_fast.patch.forms.rotary import match_rotary, rotations_called
from merit_fast.patch.proof import Match, undisturbed
from merit_fast.patch.reads import constants_read, name_of, scalars_of

Matcher = Callable[[nn.Module, torch.device, str | None], Match | str]


class Planner:
    """Plans modules; those of equal code and settings are tried once."""

    def __init__(self, device: torch.device, backend: str | None) -> None:
        self.device = device
        self.backend = backend
        self.refused: dict[tuple[str, str], int] = {}
        self._tried: dict[Any, Match | str] = {}

    def layers(self, modules: Iterable[nn.Module]) -> list[Plan]:
        """Plans every norm, gated MLP and attention whose trial equals a kernel's form."""
        plans = []
        for module in modules:
            matcher = _matcher(module)
            if matcher is None:
                continue
            match = self._match(module, matcher)
            if isinstance(match, Match):
                options = (*match.options, self.backend)
                plans.append(Plan(module, match.op, match.maker, options))
            elif _is_worth_a_note(module):
                key = type(module).__name__, match
                self.refused[key] = self.refused.get(key, 0) + 1
        return plans

    @property
    def notes(self) -> list[str]:
        """A line for every kind of module that stays."""
        return [f"{count} {name}: {reason}" for (name, reason), count in self.refused.items()]

    def _match(self, module: nn.Module, matcher: Matcher) -> Match | str:
        # accelerate's hooks and transformers' hub kernels sit on the instance: ours would not be
        # reached
        method = method_on_instance(module)
        if method is not None:
            return f"has a {method} of its own on the instance"
        key = matcher, type(module), type(module).forward, _settings(module)
        if key not in self._tried:
            with undisturbed(self.device):
                self._tried[key] = matcher(module, self.device, self.backend)
        return self._tried[key]


def _matcher(module: nn.Module) -> Matcher | None:
    """The trial that may match a module, by its parts; None for a module of another kind."""
    name = type(module).__name__
    if epsilon_of(module) is not None or name.endswith("Norm"):
        return match_norm
    if rotations_called(type(module).forward) or name.endswith("Attention"):
        return match_rotary
    if gated_parts(module) is not None or name.endswith("MLP"):
        return match_gated
    return None


def _is_worth_a_note(module: nn.Module) -> bool:
    return type(module).__name__.endswith(("Norm", "MLP", "Attention"))


def _settings(module: nn.Module) -> tuple[Any, ...]:
    """Everything that makes two modules of one class differ for a trial."""
    parts = gated_parts(module)
    act = getattr(module, parts[1]) if parts and parts[1] else None
    rotations = rotations_called(type(module).forward)
    variables = getattr(type(module).forward, "__globals__", {})
    epsilon = epsilon_of(module)
    is_rotary = parts is None and epsilon is None
    return (
        () if is_rotary else constants_read(module),
        None if epsilon is None else (epsilon, getattr(module, epsilon)),
        tuple(module._parameters),
        tuple(
            (name, type(child) if not parts or name == parts[1] else None)
            for name, child in module._modules.items()
        ),
        None if parts is None else (tuple(parts[0].items()), type(act), scalars_of(act)),
        None if act is None or isinstance(act, nn.Module) else name_of(act),
        tuple((name, variables.get(name)) for name in rotations),
    )
