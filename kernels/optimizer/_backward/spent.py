"""The tensor in ``p.grad`` for a gradient that an update inside the backward pass has used."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from merit_fast.kernels.optimizer._sharding import places

_aten = torch.ops.aten
_VIEWS = (_aten.detach.default, _aten.alias.default, _aten.view.default)
_NORMS = (_aten.linalg_vector_norm.default, _aten._foreach_norm.Scalar)
_PRODUCTS = (
    _aten.mul_.Tensor,
    _aten.mul_.Scalar,
    _aten._foreach_mul_.Tensor,
    _aten._foreach_mul_.Scalar,
)
_SUMS = (_aten.add.Tensor, _aten.add_.Tensor, _aten._foreach_add_.List)
_SCALERS = (_aten._amp_foreach_non_finite_check_and_unscale_.default,)


class SpentGradient(Tensor):
    """A gradient without memory that knows its norm and refuses every other use in words.

    Trainers may take its norm, and may multiply it by 1, which is what clipping does where the norm
    is small enough. Whatever would change the update comes too late and raises.
    """

    square_sum: Tensor  # float64 scalar

    @staticmethod
    def __new__(
        cls, like: Tensor, square_sum: Tensor, device: torch.device | None = None
    ) -> "SpentGradient":
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=device or like.device
        )
        return made  # type: ignore[no-any-return]

    def __init__(
        self, like: Tensor, square_sum: Tensor, device: torch.device | None = None
    ) -> None:
        self.square_sum = square_sum

    def _viewed(self, view: Callable[..., Tensor], arguments: Sequence[Any]) -> "SpentGradient":
        """A view of all elements, whose norm is that of this gradient."""
        like = torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device="meta")
        return SpentGradient(view(like, *arguments), self.square_sum, self.device)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"SpentGradient(shape={list(self.shape)}, norm={float(self.square_sum.sqrt()):.6g})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Any = None,
    ) -> Any:
        if func in _VIEWS:
            return args[0]._viewed(func, args[1:])
        if func in _NORMS and _is_whole_2_norm(args, kwargs):
            if isinstance(args[0], Tensor):
                return _norm(args[0])
            return [_norm(gradient) for gradient in args[0]]
        if func in _PRODUCTS:
            if float(args[1]) == 1.0:
                return args[0] if isinstance(args[0], Tensor) else None
            raise RuntimeError(
                f"FusedAdamW: these gradients cannot be multiplied by {float(args[1]):.6g} any "
                "more: step_in_backward has used them. Switch the trainer's clipping off (Trainer: "
                "max_grad_norm=0) and clip by FusedAdamW(max_norm=...) with "
                'step_in_backward(clip="previous") or clip="two-pass"'
            )
        if func in _SUMS:
            raise RuntimeError(
                "FusedAdamW: a gradient was added to one that step_in_backward has used: call "
                "step() or zero_grad() after the update, and pass accumulation=N to "
                "step_in_backward if N backward passes make one step"
            )
        if func in _SCALERS:
            raise RuntimeError(
                "FusedAdamW: a GradScaler cannot unscale gradients that step_in_backward has used; "
                "train in bfloat16, which needs no scaler, or without step_in_backward"
            )
        raise RuntimeError(
            f"FusedAdamW: step_in_backward has used and freed this gradient; {func} cannot read it"
        )


def _is_whole_2_norm(args: Sequence[Any], kwargs: Any) -> bool:
    order = args[1] if len(args) > 1 else (kwargs or {}).get("ord", 2)
    return float(order) == 2.0 and (len(args) < 3 or args[2] is None)


def _norm(gradient: Tensor) -> Tensor:
    if isinstance(gradient, SpentGradient):
        return gradient.square_sum.sqrt().float()
    norm: Tensor = torch.linalg.vector_norm(gradient)
    return norm


def is_spent(gradient: Tensor | None) -> bool:
    """Whether a gradient, or the local part of a DTensor, was used."""
    if isinstance(gradient, SpentGradient):
        return True
    return gradient is not None and isinstance(
        getattr(gradient, "_local_tensor", None), SpentGradient
    )


def spend(parameter: Tensor, square_sum: Tensor) -> None:
    """Puts a spent gradient in the place of the parameter's gradient, whose memory is freed."""
    spent = SpentGradient(places.local(parameter.detach()), square_sum)
    parameter.grad = places.like(parameter, spent)
