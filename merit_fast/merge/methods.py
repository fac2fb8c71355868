"""Merge methods as coefficients: every one writes, tensor by tensor, a weighted sum of its inputs.

The linear ones have the same coefficients for all tensors. The others take them from each tensor's Gram matrix, for
which they read the inputs once more, before.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from merit_fast.errors import InputError
from merit_fast.merge.config import MergeConfig

Array = npt.NDArray[np.float64]
Coefficients = tuple[float, ...]

_COLINEAR = 0.9995  # above this cosine slerp is a lerp, as in mergekit


@dataclass(frozen=True)
class Combination:
    """Each tensor of the output is sum_j coefficients[j] * paths[j]. The first path gives the layout.

    A last path without a coefficient is the base, read for the geometry alone. Where ``from_gram`` is given it makes a
    tensor's coefficients from its Gram matrix, of the deltas from the base (the last path) if ``gram_from_base``.
    """

    paths: tuple[Path, ...]
    coefficients: Coefficients
    from_gram: Callable[[Array], Coefficients] | None = None
    gram_from_base: bool = False


def combine(models: Sequence[Path], weights: Sequence[float], base: Path | None, config: MergeConfig) -> Combination:
    """The method of ``config`` on these models. theta_0 is the base, w_k the weights, s the scale, t slerp's place.

        linear           theta_0 + s (sum_k w_k theta_k - theta_0)
        task_arithmetic  theta_0 + s sum_k w_k (theta_k - theta_0)        Ilharco et al. 2023, arXiv 2212.04089
        slerp            along the arc from model 1 (t = 0) to model 2    Shoemake 1985
        model_stock      theta_0 + c mean_k(theta_k - theta_0)            Jang et al. 2024, arXiv 2403.19522

    Raises:
        InputError: the method needs a base and there is none, or another number of models.
    """
    if base is None and (config.needs_base or config.geometry):
        what = "geometry" if config.geometry else f"method {config.method} with scale {config.scale:g}"
        raise InputError(f"merge: {what} needs a base model")
    if config.method == "slerp":
        if len(models) != 2:
            raise InputError(f"merge: method slerp needs 2 models, got {len(models)}")
        return Combination(tuple(models), (), lambda gram: slerp_coefficients(gram, config.t))
    if config.method == "model_stock":
        if len(models) < 2:
            raise InputError(f"merge: method model_stock needs 2 models or more, got {len(models)}")
        assert base is not None  # needs_base
        return Combination((*models, base), (), model_stock_coefficients, gram_from_base=True)
    return _linear(models, weights, base, config)


def slerp_coefficients(gram: Array, t: float) -> Coefficients:
    """(a, b) of a theta_1 + b theta_2 from the Gram matrix [2, 2] of the two tensors.

        omega = arccos(cosine); a = sin((1 - t) omega) / sin(omega); b = sin(t omega) / sin(omega)

    (1 - t, t) where a tensor is zero or the two are nearly colinear (|cosine| > 0.9995).
    """
    lengths = math.sqrt(gram[0, 0]) * math.sqrt(gram[1, 1])
    cosine = gram[0, 1] / lengths if lengths > 0 else 1.0
    if abs(cosine) > _COLINEAR:
        return (1.0 - t, t)
    omega = math.acos(cosine)
    return (math.sin((1.0 - t) * omega) / math.sin(omega), math.sin(t * omega) / math.sin(omega))


def model_stock_coefficients(gram: Array) -> Coefficients:
    """K times c / K, then 1 - c for the base, from the deltas' Gram matrix [K, K].

        cosine = mean over pairs; c = K cosine / (1 + (K - 1) cosine)

    A pair with a delta of length zero has cosine 0. Where the deltas cancel (denominator 0), c is 0: the base.
    """
    count = len(gram)
    lengths = np.sqrt(np.diag(gram))
    scale = np.outer(lengths, lengths)
    cosines = np.where(scale > 0, gram / np.where(scale > 0, scale, 1.0), 0.0)
    mean = float(cosines[np.triu_indices(count, 1)].mean())
    denominator = 1.0 + (count - 1) * mean
    share = count * mean / denominator if denominator > 1e-12 else 0.0
    return (*([share / count] * count), 1.0 - share)


def _linear(models: Sequence[Path], weights: Sequence[float], base: Path | None, config: MergeConfig) -> Combination:
    drawn_back = sum(weights) if config.method == "task_arithmetic" else 1.0
    of_base = 1.0 - config.scale * drawn_back if config.needs_base else 0.0
    scaled = tuple(config.scale * weight for weight in weights)
    if config.geometry and abs(sum(scaled) + of_base - 1.0) > 1e-9:
        raise InputError(f"merge: geometry needs coefficients of sum 1, got {sum(scaled) + of_base:g}; normalize")
    paths = (*models, *([base] if base and (of_base or config.geometry) else []))
    return Combination(paths, (*scaled, of_base) if of_base else scaled)
