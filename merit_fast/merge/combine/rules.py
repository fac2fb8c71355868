"""Merge methods: for every tensor either coefficients of a weighted sum of the inputs, or a rule for their deltas."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from merit_fast.errors import InputError
from merit_fast.kernels.average.deltas import DeltaRule
from merit_fast.merge.combine.coefficients import (
    Array,
    Coefficients,
    model_stock_coefficients,
    multislerp_coefficients,
    slerp_coefficients,
)
from merit_fast.merge.combine.weights import require_numbers
from merit_fast.merge.config import MergeConfig
from merit_fast.merge.parameters import Layers, setting_at
from merit_fast.merge.read.checkpoint import TensorEntry
from merit_fast.merge.read.remote import Location

Rule = Coefficients | DeltaRule


@dataclass(frozen=True)
class Combination:
    """What becomes of every tensor. ``paths``: the models, then the base where it takes part.

    Where ``from_gram`` is given it makes a tensor's coefficients from its Gram matrix: of the inputs themselves, or
    with ``gram_from_base`` of their deltas from the last path. Otherwise ``rule`` decides alone.
    """

    paths: tuple[Location, ...]
    rule: Callable[[TensorEntry], Rule]
    from_gram: Callable[[str, Array], Coefficients] | None = None
    gram_from_base: bool = False


def combine(
    models: Sequence[Location],
    weights: Sequence[float],
    base: Location | None,
    config: MergeConfig,
    tensors: Iterable[str] = (),
    layers: Layers | None = None,
) -> Combination:
    """The method of ``config`` on these models. theta_0 is the base, w_k the weights, s the scale, t slerp's place.

        linear            theta_0 + s (sum_k w_k theta_k - theta_0)
        task_arithmetic   theta_0 + s sum_k w_k delta_k                       Ilharco et al. 2023, arXiv 2212.04089
        ties              deltas' largest, sign elected, mean of who agrees   Yadav et al. 2023, arXiv 2306.01708
        dare_linear/ties  deltas dropped at random, the rest / density        Yu et al. 2024, arXiv 2311.03099
        breadcrumbs(_ties)  deltas without largest and smallest               Davari & Belilovsky 2024, arXiv 2312.06795
        della(_linear)    dropped at random, rarely if large in their row     Deep et al. 2024, arXiv 2406.11617
        sce               select, calculate, erase                            Wan et al. 2024, arXiv 2408.07990
        slerp             along the arc from model 1 (t = 0) to model 2       Shoemake 1985
        multislerp        from the mean direction along the sphere            see ``multislerp_coefficients``
        model_stock       theta_0 + c mean_k delta_k                          Jang et al. 2024, arXiv 2403.19522
        passthrough       s theta_1

    ``DeltaRule`` has the steps of ties to sce as code.

    Args:
        tensors: names of all tensors, which gradients over the layers need.
        layers: where the tensors stand, if their names alone do not tell.

    Raises:
        InputError: the method needs a base and there is none, or another number of models.
    """
    _check_counts(models, base, config)
    values = _Values(config, weights, layers or Layers(tensors), len(models))
    method = config.method
    if method == "slerp":
        return Combination(
            tuple(models),
            _no_rule,
            lambda name, gram: slerp_coefficients(gram, values.of("t", name)),
        )
    if method == "model_stock":
        assert base is not None
        return Combination(
            (*models, base), _no_rule, lambda _, gram: model_stock_coefficients(gram), True
        )
    if method == "multislerp":
        paths, centred = (*models, *([base] if base else [])), base is not None

        def around(name: str, gram: Array) -> Coefficients:
            found = multislerp_coefficients(gram, values.weights(name), name)
            return (*found, 1.0 - sum(found)) if centred else found

        return Combination(paths, _no_rule, around, centred)
    if method in ("linear", "task_arithmetic", "passthrough"):
        return _sums(models, base, config, values)
    assert base is not None
    return Combination((*models, base), lambda entry: _delta_rule(config, values, entry))


class _Values:
    """The parameters of one tensor."""

    def __init__(
        self, config: MergeConfig, weights: Sequence[float], layers: Layers, count: int
    ) -> None:
        self.config, self.layers, self.count = config, layers, count
        self.shared_weights = tuple(weights)
        self.own = config.models

    def of(self, key: str, name: str, model: int | None = None) -> float:
        value = setting_at(getattr(self.config, key), name, self.layers, model)
        if value is None:
            raise InputError(f"merge: {name}: {key} has no case that matches this tensor")
        return value

    def by_model(self, key: str, name: str) -> tuple[float, ...]:
        own = [
            setting_at(getattr(model, key), name, self.layers, k)
            for k, model in enumerate(self.own)
        ]
        own = own or [None] * self.count
        return tuple(self.of(key, name) if value is None else value for value in own)

    def weights(self, name: str) -> Coefficients:
        if all(model.weight is None for model in self.own):
            return self.shared_weights
        own = [setting_at(model.weight, name, self.layers, k) for k, model in enumerate(self.own)]
        for k, weight in enumerate(own):
            if weight is None:
                raise InputError(
                    f"merge: {name}: models[{k}].weight has no case that matches this tensor"
                )
        given = [float(weight) for weight in own if weight is not None]
        total = sum(given) if self.config.normalize else 1.0
        if abs(total) <= 1e-12:
            raise InputError(f"merge: {name}: weights must have a sum other than 0, got {given}")
        return tuple(weight / total for weight in given)


def _check_counts(models: Sequence[Location], base: Location | None, config: MergeConfig) -> None:
    require_numbers(config)
    least = {"model_stock": 2, "slerp": 2}.get(config.method, 1)
    most = {"slerp": 2, "passthrough": 1}.get(config.method)
    if len(models) < least or (most is not None and len(models) > most):
        wanted = f"{least} model{'s' * (least > 1)}{'' if most else ' or more'}"
        raise InputError(f"merge: method {config.method} needs {wanted}, got {len(models)}")
    if config.models and len(config.models) != len(models):
        raise InputError(f"merge.models: must have {len(models)} entries, got {len(config.models)}")
    if base is None and (config.needs_base or config.stats):
        what = f"method {config.method}" + (" with a scale" if config.method == "linear" else "")
        what = "stats" if config.stats else "missing=base" if config.missing == "base" else what
        raise InputError(f"merge: {what} needs a base model; give --base")


def _sums(
    models: Sequence[Location], base: Location | None, config: MergeConfig, values: _Values
) -> Combination:
    def coefficients(entry: TensorEntry) -> Coefficients:
        passes = config.method == "passthrough"
        scale = values.of("scale", entry.name, 0 if passes else None)
        weights = (1.0,) if passes else values.weights(entry.name)
        drawn_back = sum(weights) if config.method == "task_arithmetic" else 1.0
        scaled = tuple(scale * weight for weight in weights)
        of_base = 1.0 - scale * drawn_back if moves_base else 0.0
        if config.stats and abs(sum(scaled) + of_base - 1.0) > 1e-9:
            raise InputError(
                f"merge: stats need coefficients of sum 1, got {sum(scaled) + of_base:g}; normalize"
            )
        return (*scaled, of_base) if moves_base else scaled

    whole = (
        config.scale == 1.0 and not config.models and abs(sum(values.shared_weights) - 1.0) < 1e-12
    )
    moves_base = (config.method == "task_arithmetic" and not whole) or (
        config.method == "linear" and config.scale != 1.0
    )
    moves_base = moves_base and base is not None
    takes_part = base is not None and (moves_base or config.stats)
    return Combination((*models, base) if takes_part and base else tuple(models), coefficients)


def _delta_rule(config: MergeConfig, values: _Values, entry: TensorEntry) -> DeltaRule:
    method, name, count = config.method, entry.name, entry.num_elements
    rule = DeltaRule((1.0,) * values.count, scale=values.of("scale", name))
    if method == "sce":
        share = values.of("select_topk", name)
        return replace(
            rule, variance_share=share, elect=True, normalize=True, weigh_by_squares=True
        )
    elected = method in ("ties", "dare_ties", "breadcrumbs_ties", "della")
    rule = replace(
        rule, weight=values.weights(name), elect=elected, normalize=elected and config.normalize
    )
    density = values.by_model("density", name)
    if method.startswith("ties"):
        keep = tuple(max(1, int(share * count)) if share > 0 else 0 for share in density)
        return replace(rule, top=(0,) * values.count, keep=keep)
    if method.startswith("breadcrumbs"):
        ranks = [
            _middle(count, *both)
            for both in zip(density, values.by_model("gamma", name), strict=True)
        ]
        return replace(
            rule, top=tuple(top for top, _ in ranks), keep=tuple(keep for _, keep in ranks)
        )
    streams = tuple(_stream(config.seed, name, k) for k in range(values.count))
    epsilon = (
        values.by_model("epsilon", name) if method.startswith("della") else (0.0,) * values.count
    )
    epsilon = tuple(
        spread if 0 < share < 1 else 0.0 for share, spread in zip(density, epsilon, strict=True)
    )
    for share, spread in zip(density, epsilon, strict=True):
        if spread and (share - spread <= 0 or share + spread >= 1):
            raise InputError(
                f"merge: {name}: density +- epsilon must lie between 0 and 1, got {share:g} +- {spread:g}"
            )
    row = (entry.shape[-1] if entry.shape else 1) if method.startswith("della") else 0
    return replace(rule, stream=streams, density=density, epsilon=epsilon, row=row)


def _middle(count: int, density: float, gamma: float) -> tuple[int, int]:
    """Breadcrumbs: how many of the largest go, and how many of the next stay."""
    if density >= 1.0:
        return 0, count
    keep = int(density * count)
    below = max(0, count - keep - int(gamma * count))
    return count - below - keep, keep


def _stream(seed: int, name: str, branch: int) -> int:
    digest = hashlib.sha256(f"{seed}\0{name}\0{branch}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "little")


def _no_rule(entry: TensorEntry) -> Any:
    raise AssertionError(f"{entry.name}: its coefficients come from its Gram matrix")
