"""Recipes: which tensors of a checkpoint make which parameters of a model of transformers.

transformers renames tensors, and joins some, such as those of experts, while it loads. A recipe
does so for one group of parameters at a time, by transformers' own rules.
"""

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from merit_fast.errors import InputError, one_line
from merit_fast.model.layered.mapped import MappedTensor


@dataclass
class Recipe:
    """How tensors of the files become one parameter, or several that transformers makes together.

    Attributes:
        first: name of the result in the model; of several, the one that the tensors map to.
        dtype: of the results.
        tensors: (pattern of ``converter`` that a tensor's name matches, tensor), in order.
        converter: of transformers; None: the only tensor is the result.
    """

    first: str
    dtype: torch.dtype
    converter: Any = None
    tensors: list[tuple[str, MappedTensor]] = field(default_factory=list)

    def make(self, model: Any, device: torch.device) -> dict[str, Tensor]:
        """The results by name; on the CPU a view of the file where dtype and form are its own."""
        return self._made(model, lambda tensor: tensor.view().to(device, self.dtype))

    def shapes(self, model: Any) -> dict[str, tuple[int, ...]]:
        """Shapes of the results by name; nothing is read."""

        def empty(tensor: MappedTensor) -> Tensor:
            return torch.empty(tensor.shape, dtype=self.dtype, device="meta")

        return {name: tuple(value.shape) for name, value in self._made(model, empty).items()}

    def _made(self, model: Any, read: Callable[[MappedTensor], Tensor]) -> dict[str, Tensor]:
        if self.converter is None:
            return {self.first: read(self.tensors[0][1])}
        converter = copy.deepcopy(self.converter)
        for pattern, tensor in self.tensors:
            converter.add_tensor(self.first, self.first, pattern, read(tensor))
        made = converter.convert(self.first, model=model, config=model.config)
        return {name: v[0] if isinstance(v, list) else v for name, v in made.items()}


@dataclass(frozen=True)
class Source:
    """Where a parameter comes from: the result ``name`` of ``recipe``."""

    recipe: Recipe
    name: str


def sources_of(
    model: Any, tensors: Mapping[str, MappedTensor], dtype: torch.dtype
) -> dict[str, Source]:
    """Source of every parameter and saved buffer of a model, by its names in the state dict.

    Args:
        model: of transformers, with parameters on the meta device.
        tensors: of the checkpoint; those that the model has no place for are left out, as
            transformers does.
        dtype: of the model; some models keep some of their parameters in float32.

    Raises:
        InputError: a parameter has no tensor, or one of another shape.
    """
    from transformers.core_model_loading import dot_natural_key

    expected = model.state_dict(keep_vars=True)
    rename = _Renaming(model, expected)
    kept = _kept_dtypes(model, dtype)
    recipes: dict[str, Recipe] = {}
    for key in sorted(tensors, key=dot_natural_key):  # "10" after "9": experts in their order
        name, pattern, converter = rename(key)
        if name not in expected:
            continue
        if name not in recipes:
            matches = (each for rule, each in kept if rule.search(name))
            recipes[name] = Recipe(name, next(matches, expected[name].dtype), converter)
        recipes[name].tensors.append((pattern, tensors[key]))
    sources = {}
    for recipe in recipes.values():
        for name, shape in _shapes_of(recipe, model).items():
            if name in expected and tuple(expected[name].shape) != shape:
                raise InputError(
                    f"model: {name}: must be {list(expected[name].shape)} by config.json, found "
                    f"{list(shape)}"
                )
            sources[name] = Source(recipe, name)
    return _with_tied_names(sources, expected)


def _shapes_of(recipe: Recipe, model: Any) -> dict[str, tuple[int, ...]]:
    try:
        return recipe.shapes(model)
    except Exception as error:  # a conversion raises anything for tensors that do not fit
        raise InputError(f"model: {recipe.first}: cannot be made ({one_line(error)})") from None


def _with_tied_names(
    sources: Mapping[str, Source], expected: Mapping[str, Tensor]
) -> dict[str, Source]:
    """Source of every expected name; the names of one tensor have one."""
    names: dict[int, list[str]] = {}
    for name, value in expected.items():
        names.setdefault(id(value), []).append(name)
    found = {}
    for tied in names.values():
        source = next((sources[name] for name in tied if name in sources), None)
        if source is None:
            raise InputError(f"model: {tied[0]}: must be in the model's files, is absent")
        found.update(dict.fromkeys(tied, source))
    return found


class _Renaming:
    """Name of a tensor in the files -> name in the model, pattern and converter that it matches."""

    def __init__(self, model: Any, expected: Mapping[str, Tensor]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._of_pattern = {p: rule for rule in self._converters for p in rule.source_patterns}
        self._prefix = model.base_model_prefix
        self._expected = expected

    def __call__(self, key: str) -> tuple[str, str, Any]:
        name, pattern = self._renamed(key, self._renamings, self._converters)
        if name not in self._expected and key in self._expected:
            name, pattern = self._renamed(key, [], [])
        return name, pattern or key, self._of_pattern[pattern] if pattern else None

    def _renamed(self, key: str, renamings: Any, converters: Any) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        expected: Any = self._expected
        return rename_source_key(key, renamings, converters, self._prefix, expected)


def _kept_dtypes(model: Any, dtype: torch.dtype) -> list[tuple[re.Pattern[str], torch.dtype]]:
    """(Pattern of names, dtype) of the parameters that transformers keeps in another dtype."""
    from transformers.core_model_loading import build_glob_alternation

    plan = model._get_dtype_plan(dtype)
    return [(build_glob_alternation([name])[0], kept) for name, kept in plan.items()]
