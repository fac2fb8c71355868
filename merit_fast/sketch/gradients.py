"""Per-example gradient sketches from one ordinary backward pass.

All weights are frozen, so autograd computes gradients of activations only; forward hooks tap each
module's output, and where its gradient dy arrives the kernels sketch dy^T x per example. No weight
gradient is stored.
"""

from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from merit_fast.errors import InputError, show
from merit_fast.kernels.sketch import CountSketch
from merit_fast.sketch.divided.freezing import is_trainable
from merit_fast.sketch.precondition import KfacFactors, requested_scales
from merit_fast.sketch.selection import (
    select_parameters,
    unwrapped,
)
from merit_fast.sketch.sketcher import GradientSketcher

__all__ = ["GradientSketcher", "sketch_gradients"]


def sketch_gradients(  # noqa: PLR0913
    model: nn.Module,
    proj_dim: int = 65536,
    seed: int = 0,
    parameters: str = "all",
    normalize: Literal["adam", "kfac"] | None = None,
    optimizer: Any = None,
    blocks: int = 8,
    *,
    factors: KfacFactors | None = None,
    mode: Literal["per_example"] = "per_example",
    check: Literal["first", "always", "never"] = "first",
    uncovered: Literal["autograd", "error"] = "error",
    weight: Literal["examples", "tokens"] = "examples",
    parts: Mapping[str, str] | None = None,
) -> "GradientSketcher":
    """Sketches the gradient of every example inside a with-block, in which the weights are frozen.

        with sketch_gradients(model) as sketcher:
            losses_per_example.sum().backward()
            sketches = sketcher.update(dataset_ids)     # [B, D]
        sketcher.state                                  # dataset -> SketchState

    Args:
        model: any torch module; transformers' language models are tested.
        proj_dim: width of the CountSketch, a multiple of 4096.
        seed: seed of its hash.
        parameters: "all" that require a gradient on entry; "blocks": those in the transformer
            blocks; else a regular expression, searched for in their names.
        normalize: "adam" multiplies every gradient as Adam would, by ``optimizer``'s second
            moments; "kfac" by the inverse square root of ``factors``, so that inner products of
            sketches are influences g^T (A (x) S)^-1 h. None: not at all.
        optimizer: an Adam or AdamW that has stepped; with "adam" only.
        factors: of ``kfac_factors``; with "kfac" only.
        blocks: blocks of each dataset's state, for standard errors.
        mode: "per_example", the only value. ``merit_fast.sketch_sums`` sketches sums while a model
            trains.
        check: "first" compares the first pass of every kind of call with autograd, at the cost of
            at most two more backward passes; "always" every pass; "never" none.
        uncovered: "error" refuses parameters that no hook covers, all in one message; "autograd"
            takes a backward pass per example for them (``GradientSketcher.slow_parameters``).
        weight: what an example's gradient counts in ``state``: "examples", 1; "tokens", its target
            tokens, which ``update`` needs then. With the mean over its target tokens as an
            example's loss, "tokens" gives the gradient of the mean over all target tokens, as
            training descends it, and "examples" the mean of the examples' gradients.
        parts: part of the model -> regular expression, searched for in the parameters' names. The
            states of a part, of its parameters only, are ``sketcher.part_state[part][dataset]``;
            they come from the same pass. Parameters of no part count in the whole only.

    Raises:
        InputError: an argument breaks its rule.
        MeritFastError: a parameter cannot be covered, or differs from autograd; the message names
            it.
    """
    core = unwrapped(model)
    if mode != "per_example":
        raise InputError(
            f"mode: must be 'per_example', got {show(mode)}; merit_fast.sketch_sums sketches sums"
        )
    chosen = select_parameters(core, parameters, is_trainable)
    if (normalize == "kfac") != (factors is not None):
        raise InputError("factors: must be given with normalize='kfac', and only then")
    adam = None if normalize == "kfac" else normalize
    scales = requested_scales(core, adam, optimizer, chosen, "None, 'adam' or 'kfac'")
    return GradientSketcher(
        model,
        CountSketch(proj_dim, seed),
        chosen,
        scales,
        factors,
        blocks=blocks,
        check=check,
        uncovered=uncovered,
        weight=weight,
        parts=parts,
    )
