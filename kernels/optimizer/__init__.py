"""AdamW in one pass over each parameter: clip, moments, decay, rounding, average of weights."""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from merit_fast.kernels.optimizer._backward.hooks import InBackward
from merit_fast.kernels.optimizer._backward.spent import SpentGradient
from merit_fast.kernels.optimizer._base import OptimizerWithStates
from merit_fast.kernels.optimizer._checks import (
    check_group,
    check_in_backward,
    refuse_overlaps,
    take_options,
)
from merit_fast.kernels.optimizer._sharding.norms import (
    Sums,
    clip_factors,
    square_sums,
    total_square_sum,
)
from merit_fast.kernels.optimizer._sharding.places import shard_number
from merit_fast.kernels.optimizer._state import Options, second_moments
from merit_fast.kernels.optimizer._update import Group, Member, update

__all__ = ["FusedAdamW", "InBackward", "SpentGradient", "second_moments"]


class FusedAdamW(OptimizerWithStates):
    """AdamW (Loshchilov & Hutter 2019) that reads and writes every element once a step.

    For every parameter p with gradient g, in float32 whatever the dtypes:

        g = g * min(1, max_norm / (norm of all gradients + 1e-6))       # with max_norm
        m = m + (1 - beta1) * (g - m);  v = beta2 * v + (1 - beta2) * g * g
        p = p * (1 - lr * weight_decay) - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)
        average = average + (p - average) * (1 - average_decay)         # with average_decay
        p.grad = 0                                                      # with zero_grad, in place

    A bf16 weight keeps 8 significant bits, and a step of lr 1e-5 is less than the last of them:
    rounded to nearest, most updates are lost. Three options keep them: ``rounding="stochastic"``
    (up or down with the probabilities that make the mean exact; Gupta et al. 2015),
    ``master="fp32"`` (4 more bytes) and ``master="split"`` (2 more bytes: the difference of the
    weight and its float32 master, so that the master is exact; the weight is its master rounded
    to nearest, halves away from zero). ``master="split8"`` (1 more byte) keeps the upper 8 bits of
    that difference: the master has 16 significant bits, and a step rounds it to the next of them
    as ``rounding`` says, off by less than 2^-15 of its size without bias ("stochastic") or by at
    most 2^-16 ("nearest", which loses smaller updates). A float32 weight needs none of them and
    ignores both options.

    Args:
        params: parameters, named parameters or groups of them, as torch takes them; float32 or
            bfloat16, in any layout. A group may set its own lr, betas, eps and weight_decay;
            learning-rate schedulers work.
        lr: as in ``torch.optim.AdamW``.
        betas: as in ``torch.optim.AdamW``.
        eps: as in ``torch.optim.AdamW``.
        weight_decay: as in ``torch.optim.AdamW``, whose default is 0.01.
        rounding: "stochastic" or "nearest", for bf16 weights without a master, for 8-bit
            remainders and for moments that are not float32. The random bits are a function of
            (seed, step, number of the parameter, element): the same on every backend, ISA level
            and number of threads.
        master: "none", "fp32", "split" or "split8", for bf16 weights. A weight that someone else
            wrote becomes its "fp32" master at the next step; with "split" and "split8" it keeps the
            remainder of the old one, which is at most half a unit of its last place.
        moments: "fp32", "bf16" or "int8". 8-bit moments share a float32 scale in blocks of 256:
            m = sign * (code / 127)^2 * scale, v = (code / 255)^4 * scale. A v above zero never
            rounds to zero. One draw rounds the weight and both codes of an element.
        average_decay: keep ``state[p]["average"]`` in float32: 0 <= decay < 1, or "mean" for the
            mean of all weights. It begins as the first updated weight. None: no average.
        max_norm: clip the norm of all gradients together. The norm is computed before the update,
            in float64 sums of fixed order (on a GPU in torch's float32 norms, one a gradient), and
            left in ``grad_norm``, a float64 scalar; ``p.grad`` keeps its values. ``inf`` only
            measures; 0 turns clipping off. Shards count together.
        zero_grad: write zeros into the gradients in the same pass. Where gradients can be None,
            ``zero_grad()`` costs less.
        seed: seed of stochastic rounding.
        skip_nonfinite: leave out a step whose gradients hold a NaN or an infinity: nothing changes,
            no step is counted, ``num_skipped`` grows by one. Costs the norm, and on a GPU a wait.
        shard_group: the processes over which plain tensors are sharded (FSDP1, ZeRO), for the
            norm and the rounding. None: plain tensors are whole; with a norm and several processes
            every step compares their norms, so every process must take it.
        backend: "eager" (PyTorch), "cpu" (native), "triton"; None chooses by device.

    DTensors (FSDP2, tensor parallelism) are updated in place, with states of the same mesh and
    placements. Their rounding depends on an element's place in the whole parameter, so no mesh
    changes a bit of it.

    The state has torch's keys (step, exp_avg, exp_avg_sq) and ours (exp_avg_scale,
    exp_avg_sq_scale, master, low_bits, average, num_averaged). With float32 moments
    ``torch.optim.AdamW`` loads it, and the other way round. States of bitsandbytes' and torchao's
    AdamW with 8-bit moments are decoded when loaded. A run resumed by ``load_state_dict`` gives the
    bits of an unbroken one. State dicts hold the options: the loaded seed replaces this one, and
    any other difference is a warning.

    Raises:
        ValueError: an option out of its range; parameters that overlap in memory; a sparse
            gradient.
        TypeError: a parameter or gradient of another dtype.
        BackendUnavailableError: ``backend`` cannot run here.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rounding: str = "stochastic",
        master: str = "none",
        moments: str = "fp32",
        average_decay: float | str | None = None,
        max_norm: float = 0.0,
        zero_grad: bool = False,
        seed: int = 0,
        skip_nonfinite: bool = False,
        shard_group: Any = None,
        backend: str | None = None,
    ) -> None:
        # State dicts hold the options as JSON, which knows no numbers of NumPy or torch.
        self.options = Options(
            rounding=rounding,
            master=master,
            moments=moments,
            average_decay=average_decay,
            max_norm=float(max_norm),
            zero_grad=bool(zero_grad),
            seed=operator.index(seed),
            backend=backend,
            skip_nonfinite=bool(skip_nonfinite),
        )
        self.shard_group = shard_group
        self.grad_norm: Tensor | None = None
        self.last_norm: float | None = None
        self.num_skipped = 0
        self._in_backward: InBackward | None = None
        self._written = {}
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(param_group)
        options = {**vars(self.options), "shard_group": self.shard_group}
        try:
            take_options(self.param_groups[-1], options)
            check_group(self.param_groups[-1])
            refuse_overlaps(self._parameters())
            if self._in_backward is not None:
                self._in_backward.refresh()
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Updates every parameter that has a gradient. Returns the loss of ``closure``, if any."""
        self.read_notes()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._in_backward is not None and not self._in_backward.removed:
            self._in_backward.finish_step()
            return loss
        members = [member for member in self.members() if member.parameter.grad is not None]
        clips: Mapping[torch.device, Tensor] = {}
        if self.options.max_norm or self.options.skip_nonfinite:
            sums = square_sums([member.parameter for member in members], self.options.backend)
            norm = self.measured(sums, compare=True)
            clips = self.clips(norm)
            if self.skips(norm):
                if self.options.zero_grad:
                    super().zero_grad(set_to_none=False)
                return loss
        self.update(members, clips)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients, spent ones too."""
        if self._in_backward is not None:
            self._in_backward.drop_step()
        super().zero_grad(set_to_none)

    def step_in_backward(
        self,
        *,
        clip: str | None = None,
        accumulation: int = 1,
        ddp: Any = None,
        reduced: bool = False,
    ) -> InBackward:
        """Updates every parameter inside the backward pass from now on. See ``InBackward``.

        A parameter is updated as soon as its gradient is complete, and the gradient is freed, so
        that only a few gradients are in memory at once. Call ``step`` as ever.

        Args:
            clip: how ``max_norm`` clips, since the norm of all gradients is known only after the
                pass. "previous": by the norm of the step before; the first step keeps its gradients
                and clips by its own. "two-pass": by its own norm, which a backward pass inside
                ``InBackward.measuring()`` takes first. With ``accumulation`` above 1 or ``ddp`` all
                gradients are in memory anyway, and one pass is enough.
            accumulation: backward passes that make a step; the last one updates. Counted are the
                passes that reduce gradients: those inside DDP's ``no_sync`` or FSDP2's
                ``set_requires_gradient_sync(False)`` only accumulate. A ``step`` after fewer passes
                takes what is there.
            ddp: the DistributedDataParallel that holds the parameters. Its communication hook is
                taken; the update uses reduced gradients, when the pass ends.
            reduced: promises, for plain parameters among several processes without ``ddp``, that
                hooks see gradients that need no reduction, as in a model of this process only.

        Raises:
            ValueError: ``max_norm`` without ``clip`` or the reverse; ``skip_nonfinite`` without
                "two-pass"; plain parameters among several processes; hooks that are there already.
        """
        check_in_backward(self._parameters(), self.options, clip, accumulation, ddp, reduced)
        if self._in_backward is not None and not self._in_backward.removed:
            raise ValueError("FusedAdamW: step_in_backward is on already; remove() it first")
        self._in_backward = InBackward(self, clip, accumulation, ddp)
        return self._in_backward

    def square_sum(self, parameter: Tensor) -> Tensor:
        """Float64 scalar: the sum of squares of the local part of a parameter's gradient."""
        return square_sums([parameter], self.options.backend)[0][1]

    def measured(self, sums: Sums, compare: bool = False) -> Tensor:
        """The norm of whole gradients, left in ``grad_norm``."""
        norm = total_square_sum(self._parameters(), sums, self.shard_group, compare).sqrt()
        self.grad_norm = norm
        return norm

    def clips(self, norm: Tensor | float) -> dict[torch.device, Tensor]:
        """Float32 factors for the gradients of each device, whose norm is ``norm``."""
        return clip_factors(self._parameters(), norm, self.options.max_norm)

    def skips(self, norm: Tensor) -> bool:
        """Whether a step whose gradients have this norm is left out; counts it."""
        if not self.options.skip_nonfinite or bool(norm.isfinite()):
            return False
        self.num_skipped += 1
        return True

    def update(self, members: Sequence[Member], clips: Mapping[torch.device, Tensor]) -> None:
        """Updates members that have a gradient."""
        states = [self.state_of(member.parameter) for member in members]
        shard = shard_number(self.shard_group)
        self.note_written(update(members, states, self.options, clips, shard))
