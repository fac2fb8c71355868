"""The modules that an adapter changes or trains whole, found by the options and checked."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from merit_fast.errors import InputError, show
from merit_fast.train.adapter.config import ALL_LINEAR, AdapterConfig

_KEY = "train.adapter"


def target_modules(
    model: nn.Module, config: AdapterConfig, frozen: Sequence[str]
) -> tuple[str, ...]:
    """Names of the modules that get a low-rank change, in the model's order.

    Modules whose weights ``train.freeze`` keeps are left out of ``all-linear``.

    Args:
        model: a language model.
        config: the adapter's options.
        frozen: names of the parameters that ``train.freeze`` keeps.

    Raises:
        InputError: a name or the expression matches no module, or one that is frozen, tied or not
            linear.
    """
    modules = dict(model.named_modules())
    if config.targets == ALL_LINEAR:
        head = _part(model, "get_output_embeddings")
        chosen = [
            name
            for name, module in modules.items()
            if _is_linear(module) and module is not head and not _is_frozen(name, module, frozen)
        ]
        if not chosen:
            raise InputError(f"{_KEY}.targets: {ALL_LINEAR} matches no linear layer of this model")
        return tuple(chosen)
    found = _match_all(modules, config)
    for name in found:
        module = modules[name]
        if not (_is_linear(module) or isinstance(module, nn.Embedding)):
            kind = type(module).__name__
            raise InputError(f"{_KEY}.targets: must be linear layers, {name} is a {kind}")
        _refuse(model, name, "targets", frozen)
    return tuple(found)


def saved_modules(
    model: nn.Module, config: AdapterConfig, frozen: Sequence[str]
) -> tuple[str, ...]:
    """Names of the modules that are trained whole; arguments as of ``target_modules``.

    Raises:
        InputError: a name matches no module, or one that is frozen, tied or a target too.
    """
    modules = dict(model.named_modules())
    found = []
    for name in config.modules_to_save:
        names = _require_match(modules, name, _has_last_name(name), "modules_to_save")
        for match in names:
            _refuse(model, match, "modules_to_save", frozen)
        found += names
    return tuple(found)


def _match_all(modules: dict[str, nn.Module], config: AdapterConfig) -> list[str]:
    if isinstance(config.targets, str):
        expression = re.compile(config.targets)
        fits = [lambda name: expression.fullmatch(name) is not None]
        patterns: Sequence[str] = [config.targets]
    else:
        patterns = config.targets
        fits = [_has_last_name(name) for name in patterns]
    matched = {
        name
        for pattern, fit in zip(patterns, fits, strict=True)
        for name in _require_match(modules, pattern, fit, "targets")
    }
    return [name for name in modules if name in matched]


def _has_last_name(target: str) -> Callable[[str], bool]:
    return lambda name: name == target or name.endswith(f".{target}")


def _require_match(
    modules: dict[str, nn.Module], pattern: str, fits: Callable[[str], bool], key: str
) -> list[str]:
    names = [name for name in modules if name and fits(name)]
    if not names:
        last = dict.fromkeys(
            name.rpartition(".")[2] for name, m in modules.items() if _is_linear(m)
        )
        raise InputError(
            f"{_KEY}.{key}: {show(pattern)} must match a module of the base; its linear layers are "
            f"{', '.join(last)}"
        )
    return names


def _refuse(model: nn.Module, name: str, key: str, frozen: Sequence[str]) -> None:
    """Refuses frozen modules, and an embedding that is the head too."""
    module = model.get_submodule(name)
    if _is_frozen(name, module, frozen):
        raise InputError(f"{_KEY}.{key}: {name} must not be frozen by train.freeze")
    embedding = _part(model, "get_input_embeddings")
    head = _part(model, "get_output_embeddings")
    if embedding is None or head is None or embedding.weight is not head.weight:
        return
    if module is embedding or module is head:
        raise InputError(
            f"{_KEY}.{key}: {name} must have weights of its own; embedding and head of this model "
            "are one matrix (tie_word_embeddings)"
        )


def _part(model: Any, method: str) -> nn.Module | None:
    part = getattr(model, method)() if hasattr(model, method) else None
    return part if isinstance(part, nn.Module) else None


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def _is_frozen(name: str, module: nn.Module, frozen: Sequence[str]) -> bool:
    own = [f"{name}.{parameter}" for parameter, _ in module.named_parameters(recurse=False)]
    return bool(own) and all(parameter in frozen for parameter in own)
