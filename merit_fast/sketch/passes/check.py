"""The self-check: the sketches of one pass against autograd's gradients of the same losses."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from merit_fast.kernels.sketch import CountSketch
from merit_fast.sketch.capture.layout import Pass
from merit_fast.sketch.divided.tensor_parallel import Slices
from merit_fast.sketch.precondition.example_sketches import add_multiplied, side_multiplied

# Width of the sketches that are compared parameter by parameter.
_NARROW = 4096


@dataclass(frozen=True)
class Tolerance:
    """Errors that rounding explains.

    Attributes:
        whole: |s - S(g)| / |S(g)| over all parameters together.
        share: of one parameter against its own gradient, where ``floor`` is exceeded too.
        floor: of one parameter against the gradient of all.
    """

    whole: float
    share: float
    floor: float


FP32 = Tolerance(2e-5, 5e-3, 2e-6)
BF16 = Tolerance(2e-2, 0.25, 4e-3)  # autograd rounds every weight gradient to bf16


TF32 = Tolerance(5e-3, 5e-2, 1e-3)


# Tokens from which on autograd's own sums in bf16, where terms get lost, are worse than BF16 says:
# 0.02 of the whole gradient at 2400 tokens of few kinds, 0.7 of a norm's bias.
_TOKENS_OF_BF16 = 250


def tolerance_of(
    parameters: Iterable[Tensor], value: Tensor, tokens: int, autocast: bool
) -> Tolerance:
    """The tolerance for gradients of ``parameters``, sums over ``tokens``.

    Args:
        value: an output.
        autocast: the forward pass ran under autocast; the backward pass may run outside of it.
    """
    parameters = list(parameters)
    device = value.device.type
    dtypes = {value.dtype, *(parameter.dtype for parameter in parameters)}
    if autocast or dtypes & {torch.bfloat16, torch.float16}:
        more = max(1.0, tokens / _TOKENS_OF_BF16)
        return Tolerance(BF16.whole * more, BF16.share * more, BF16.floor * more)
    rounded = torch.get_float32_matmul_precision() != "highest"
    if device == "cuda":
        convolutions = any(parameter.dim() > 3 for parameter in parameters)
        rounded |= torch.backends.cuda.matmul.allow_tf32
        rounded |= convolutions and torch.backends.cudnn.allow_tf32
    return TF32 if rounded else FP32


@dataclass
class Comparison:
    """Sketches of some examples by the taps, and those of autograd's gradients, by parameter.

    Attributes:
        whole: sketch width of the states, for the totals.
        taps: what the taps give, apart by parameter.
        slices: the processes whose taps add up.
        exact: name -> [1, D'] sketch of the parameter's gradient.
        total: [1, D] sketch of the gradient of all parameters.
        square: |gradient of all parameters|^2, before any preconditioner.
    """

    whole: Pass
    taps: Pass
    slices: Slices
    exact: dict[str, Tensor] = field(default_factory=dict)
    total: Tensor | None = None
    square: float = 0.0

    @classmethod
    def of(cls, run: Pass, slices: Slices) -> "Comparison":
        narrow = CountSketch(min(_NARROW, run.sketch.proj_dim), run.sketch.seed)
        return cls(run, run.apart_at(narrow), slices)

    def clear(self) -> None:
        self.taps.outs.clear()
        self.exact.clear()
        self.total = None
        self.square = 0.0

    def receive(self, name: str, gradient: Tensor) -> None:
        width = self.taps.sketch.proj_dim
        self.square += float(gradient.float().norm()) ** 2
        if name not in self.exact:
            self.exact[name] = torch.zeros(1, width, device=gradient.device)
        rows = side_multiplied(self.taps.preconditioner, name, gradient)
        add_multiplied(self.taps, name, rows, self.exact[name])
        if self.total is None:
            self.total = torch.zeros(1, self.whole.sketch.proj_dim, device=gradient.device)
        if self.total.device == gradient.device:
            add_multiplied(self.whole, name, rows, self.total)
            return
        out = torch.zeros(1, self.whole.sketch.proj_dim, device=gradient.device)
        add_multiplied(self.whole, name, rows, out)
        self.total += out.to(self.total.device)

    def noise(self) -> dict[str, float]:
        """Name -> what rounding in one parameter of an error of 1 becomes by the preconditioner.

        A preconditioner divides most where gradients are least, so it raises rounding above the
        gradients themselves; 1 is an error as long as the whole gradient.
        """
        gain = self.whole.preconditioner.noise_gain
        return {name: gain(name) * self.square**0.5 for name in self.exact}

    def errors(self, example: int | None) -> dict[str, tuple[Tensor, Tensor]]:
        """Name -> difference from autograd [D'] or [B, D'], and autograd's sketch.

        Args:
            example: the one whose losses autograd had; the others' sketches must be 0. None: all
                examples' losses were summed.
        """
        found: dict[str, Tensor] = {}
        for (name, _), out in self.taps.outs.items():
            value = out.cpu().double()
            found[name] = found[name] + value if name in found else value
        result = {}
        # Every process sums the same parameters in the same order.
        names = sorted(self.exact) if self.slices.is_divided else found.keys() | self.exact.keys()
        for name in names:
            zeros = torch.zeros(self.taps.size, self.taps.sketch.proj_dim, dtype=torch.float64)
            sketches = self.slices.summed(found.get(name, zeros))
            exact = self.exact.get(name, zeros[:1]).cpu().double()
            self.slices.require_alike(name, exact)
            if example is None:
                difference = sketches.sum(0, keepdim=True) - exact
            else:
                difference = sketches.clone()
                difference[example] -= exact[0]
            result[name] = (difference, exact)
        return result


def wrong_parameters(
    errors: Mapping[str, tuple[Tensor, Tensor]],
    tolerance: Tolerance,
    noise: Mapping[str, float] | None = None,
) -> tuple[dict[str, float], float]:
    """Parameters whose sketches are not autograd's, and the error of the others together.

    Args:
        noise: of ``Comparison.noise``, with a preconditioner.

    Returns:
        Name -> its difference as a share of its own gradient, largest first; and
        |sum of the other differences| / |gradient of all|.
    """
    noise = noise or {}
    if not errors:
        return {}, 0.0
    norm = float(sum((exact for _, exact in errors.values()), torch.zeros(1)).norm())
    sizes = {name: float(difference.norm()) for name, (difference, _) in errors.items()}
    own = {name: float(exact.norm()) for name, (_, exact) in errors.items()}
    scale = max(norm, max(own.values()))
    if not math.isfinite(scale):  # an infinite gradient has no sketch to compare
        return {}, 0.0
    wrong = {
        name
        for name, size in sizes.items()
        if not size
        <= max(tolerance.share * own[name], tolerance.floor * max(scale, noise.get(name, 0.0)))
    }
    bound = tolerance.whole + tolerance.floor * math.hypot(*noise.values()) / (scale or 1.0)
    while True:
        rest = [difference for name, (difference, _) in errors.items() if name not in wrong]
        error = float(torch.stack(rest).sum(0).norm()) / scale if rest and scale else 0.0
        if error <= bound or len(wrong) == len(errors):
            break
        wrong.add(max((name for name in sizes if name not in wrong), key=sizes.__getitem__))
    ordered = sorted(wrong, key=sizes.__getitem__, reverse=True)
    return {name: sizes[name] / own[name] if own[name] else torch.inf for name in ordered}, error


def relative_error(sketch: Tensor, exact: Tensor | None) -> float:
    """|sketch - exact| / |exact|; 0 where both are 0."""
    truth = torch.zeros_like(sketch) if exact is None else exact.to(sketch.device)
    distance = float((sketch.double() - truth.double()).norm())
    return distance / float(truth.double().norm()) if distance else 0.0
