"""A merge's method applied to its models: coefficients or a delta rule for each tensor."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from merit_fast.errors import InputError
from merit_fast.kernels.average.deltas import DeltaRule
from merit_fast.kernels.average.elements import ElementRule
from merit_fast.kernels.average.vectors import VectorRule
from merit_fast.merge.combine.weights import require_numbers
from merit_fast.merge.config import MergeConfig
from merit_fast.merge.method import Base, MergeMethod
from merit_fast.merge.option_names import OptionError
from merit_fast.merge.parameters import BUILT_IN_NAMES, SCALE, Layers, Setting
from merit_fast.merge.read.entries import TensorEntry
from merit_fast.merge.read.remote import Location
from merit_fast.merge.rules.function import FunctionRule, UserFunction
from merit_fast.merge.rules.gram import Array
from merit_fast.merge.rules.kinds import ElementByElement, FromGram, ThinnedDeltas, WeightedSum
from merit_fast.merge.rules.values import Coefficients, MethodValues
from merit_fast.records import record

Rule = Coefficients | DeltaRule | ElementRule | VectorRule | FunctionRule


@record
class Combination:
    """The rule for every tensor. ``paths``: the models, then the base where it takes part.

    If ``from_gram`` is set, it makes a tensor's coefficients from its Gram matrix: of the inputs,
    or with ``gram_from_base`` of their deltas from the last path. Otherwise ``rule`` makes them.
    """

    paths: tuple[Location, ...]
    rule: Callable[[TensorEntry], Rule]
    from_gram: Callable[[str, Array], Coefficients] | None = None
    gram_from_base: bool = False
    is_by_tower: bool = False  # tensors of different towers have different inputs


def combine(
    models: Sequence[Location],
    weights: Sequence[float],
    base: Location | None,
    config: MergeConfig,
    tensors: Iterable[str] = (),
    layers: Layers | None = None,
) -> Combination:
    """Applies the method of ``config`` to these models; ``merge/table.py`` has the formulas.

    Args:
        models: paths of the K models.
        weights: K numbers, used as they are.
        base: path of the base, for methods that use one.
        config: method and parameters.
        tensors: names of all tensors, which gradients over the layers need.
        layers: the tensors' layers, if names do not tell them.

    Raises:
        InputError: the method needs a base and there is none, or another number of models.
    """
    method = config.method_entry
    _check_counts(models, base, config, method)
    values = MethodValues(
        _settings(config, method),
        tuple(weights),
        config.models,
        layers or Layers(tensors),
        config.normalize,
        config.seed,
        len(models),
        config.rescale,
    )
    if isinstance(method.rule, WeightedSum):
        return _weighted_sums(models, base, config, values, method.rule)
    if isinstance(method.rule, FromGram) and config.vectors != "tensor":
        has_columns = config.vectors == "column"
        return _by_vector(models, base, values, method.rule, method.base, has_columns)
    if isinstance(method.rule, FromGram):
        return _from_gram(models, base, values, method.rule, method.base)
    if isinstance(method.rule, UserFunction):
        return _user_function(models, base, values, method, method.rule)
    assert base is not None
    if isinstance(method.rule, ElementByElement):
        return _element_by_element(models, base, values, method.rule)
    return _thinned_deltas(models, base, values, method.rule)


def _settings(config: MergeConfig, method: MergeMethod) -> dict[str, Setting | None]:
    settings = {name: getattr(config, name) for name in BUILT_IN_NAMES}
    given = {name: value for name, value in settings.items() if value is not None}
    declared = {item.name: item.default for item in method.parameters}
    return settings | declared | given | (config.parameters or {})


def _check_counts(
    models: Sequence[Location], base: Location | None, config: MergeConfig, method: MergeMethod
) -> None:
    require_numbers(config)
    fewest = method.fewest_models
    most = method.most_models
    if len(models) < fewest or (most is not None and len(models) > most):
        wanted = f"{fewest} model{'s' * (fewest > 1)}{'' if most else ' or more'}"
        raise InputError(f"merge: method {config.method} needs {wanted}, got {len(models)}")
    if config.models and len(config.models) != len(models):
        raise InputError(f"merge.models: must have {len(models)} entries, got {len(config.models)}")
    if base is None and (config.needs_base or config.stats):
        reason = f"method {config.method}" + " with a scale" * (method.base == "with scale")
        if config.missing == "base":
            reason = "missing=base"
        if config.stats:
            reason = "stats"
        raise OptionError(f"merge: {reason} needs a base model", "base", "give {}")


def _weighted_sums(
    models: Sequence[Location],
    base: Location | None,
    config: MergeConfig,
    values: MethodValues,
    kind: WeightedSum,
) -> Combination:
    is_unscaled = config.scale == 1.0
    sums_to_one = not config.models and abs(sum(values.weights) - 1.0) < 1e-12
    moves_base = base is not None and kind.moves_base(is_unscaled, is_unscaled and sums_to_one)

    def coefficients(entry: TensorEntry) -> Coefficients:
        tensor = values.at(entry.name, entry.shape, entry.num_elements)
        *of_models, of_base = kind.coefficients(tensor)
        of_base = of_base if moves_base else 0.0
        total = sum(of_models) + of_base
        if config.stats and abs(total - 1.0) > 1e-9:
            raise InputError(f"merge: stats need coefficients of sum 1, got {total:g}; normalize")
        return (*of_models, of_base) if moves_base else tuple(of_models)

    takes_part = base is not None and (moves_base or config.stats)
    paths = (*models, base) if takes_part and base else tuple(models)
    rule = _asked_once(coefficients) if values.are_uniform else coefficients
    return Combination(paths, rule)


def _asked_once(rule: Callable[[TensorEntry], Coefficients]) -> Callable[[TensorEntry], Rule]:
    """A rule that gives all tensors the same numbers; it computes them for the first tensor."""
    known: list[Coefficients] = []

    def same(entry: TensorEntry) -> Coefficients:
        if not known:
            known.append(rule(entry))
        return known[0]

    return same


def _from_gram(
    models: Sequence[Location],
    base: Location | None,
    values: MethodValues,
    kind: FromGram,
    uses: Base,
) -> Combination:
    from_base = base is not None and uses != "unused"

    def coefficients(name: str, gram: Array) -> Coefficients:
        return kind.coefficients(gram, values.at(name, from_base=from_base))

    paths = (*models, base) if base is not None and from_base else tuple(models)
    return Combination(paths, _no_rule, coefficients, from_base)


def _by_vector(
    models: Sequence[Location],
    base: Location | None,
    values: MethodValues,
    kind: FromGram,
    uses: Base,
    has_columns: bool,
) -> Combination:
    from_base = base is not None and uses != "unused"
    by_vector = kind.by_vector
    assert by_vector is not None

    def rule(entry: TensorEntry) -> VectorRule:
        tensor = values.at(entry.name, entry.shape, entry.num_elements, from_base)
        is_matrix = len(entry.shape) > 1
        return VectorRule(
            lambda grams: by_vector(grams, tensor),
            length=entry.shape[-1] if entry.shape else 1,
            period=entry.num_elements // entry.shape[0] if has_columns and is_matrix else 0,
            from_base=from_base,
        )

    return Combination((*models, base) if base is not None and from_base else tuple(models), rule)


def _element_by_element(
    models: Sequence[Location], base: Location, values: MethodValues, kind: ElementByElement
) -> Combination:
    def rule(entry: TensorEntry) -> ElementRule:
        return kind.rule(values.at(entry.name, entry.shape, entry.num_elements, from_base=True))

    return Combination((*models, base), rule)


def _thinned_deltas(
    models: Sequence[Location], base: Location, values: MethodValues, kind: ThinnedDeltas
) -> Combination:
    def rule(entry: TensorEntry) -> DeltaRule:
        return kind.rule(values.at(entry.name, entry.shape, entry.num_elements, from_base=True))

    return Combination((*models, base), rule)


def _user_function(
    models: Sequence[Location],
    base: Location | None,
    values: MethodValues,
    method: MergeMethod,
    kind: UserFunction,
) -> Combination:
    has_base = method.base == "required"
    names = [item.name for item in method.parameters if item.name not in BUILT_IN_NAMES]

    def rule(entry: TensorEntry) -> FunctionRule:
        tensor = values.at(entry.name, entry.shape, entry.num_elements, has_base)
        return FunctionRule(
            method.name,
            kind.function,
            tensor.weights(),
            tuple((name, tensor.of(name)) for name in names),
            has_base,
            tensor.of(SCALE.name) if has_base else 1.0,
        )

    paths = (*models, base) if base is not None and has_base else tuple(models)
    return Combination(paths, rule)


def _no_rule(entry: TensorEntry) -> Any:
    raise AssertionError(f"{entry.name}: its coefficients come from its Gram matrix")
