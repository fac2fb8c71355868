"""AdamW in one pass over each parameter: clip, moments, decay, rounding, average of weights."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from merit_fast.kernels import _splitmix
from merit_fast.kernels.optimizer import _ops
from merit_fast.kernels.optimizer._checks import check_group, checked_grad, refuse_overlaps
from merit_fast.kernels.optimizer._in_backward import InBackward
from merit_fast.kernels.optimizer._state import Options, adopted, in_layout_of, is_dense, new_state

__all__ = ["FusedAdamW", "InBackward"]

Group = dict[str, Any]


class _Member(NamedTuple):
    """A parameter that has a gradient."""

    group: Group
    number: int  # of the parameter among all groups' parameters
    parameter: Tensor


class FusedAdamW(torch.optim.Optimizer):
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
            wrote becomes its float32 master at the next step.
        moments: "fp32", "bf16" or "int8". 8-bit moments share a float32 scale in blocks of 256:
            m = sign * (code / 127)^2 * scale, v = (code / 255)^4 * scale. A v above zero never
            rounds to zero.
        average_decay: keep ``state[p]["average"]`` in float32: 0 <= decay < 1, or "mean" for the
            mean of all weights. It begins as the first updated weight. None: no average.
        max_norm: clip the norm of all gradients together. The norm is computed before the update,
            in float64 sums of fixed order, and left in ``grad_norm``, a float64 scalar; ``p.grad``
            keeps its values. ``inf`` only measures; 0 turns clipping off.
        zero_grad: write zeros into the gradients in the same pass. Where gradients can be None,
            ``zero_grad()`` costs less.
        seed: seed of stochastic rounding.
        backend: "eager" (PyTorch), "cpu" (native), "triton"; None chooses by device.

    The state has torch's keys (step, exp_avg, exp_avg_sq) and ours (exp_avg_scale,
    exp_avg_sq_scale, master, low_bits, average, num_averaged). With float32 moments
    ``torch.optim.AdamW`` loads it, and the other way round. A run resumed by ``load_state_dict``
    gives the bits of an unbroken one.

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
        backend: str | None = None,
    ) -> None:
        self.options = Options(
            rounding, master, moments, average_decay, max_norm, zero_grad, seed, backend
        )
        self.grad_norm: Tensor | None = None
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1])
            refuse_overlaps(self._parameters())
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Updates every parameter that has a gradient. Returns the loss of ``closure``, if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        numbered = enumerate(
            (group, parameter) for group in self.param_groups for parameter in group["params"]
        )
        members = [
            _Member(group, number, parameter)
            for number, (group, parameter) in numbered
            if parameter.grad is not None
        ]
        clips = self._clip([member.parameter for member in members])
        self._update(members, clips)
        return loss

    def step_in_backward(self) -> InBackward:
        """Updates every parameter inside the backward pass from now on. See ``InBackward``.

        A parameter is updated as soon as its gradient is complete, and the gradient is freed, so
        that only a few gradients are in memory at once.

        Raises:
            ValueError: with ``max_norm``, which needs all gradients before the first update.
        """
        if self.options.max_norm:
            raise ValueError(
                "FusedAdamW: step_in_backward needs max_norm=0, since the norm of all gradients is "
                f"known only after the backward pass; got {self.options.max_norm}"
            )
        return InBackward(self.param_groups, lambda *member: self._update([_Member(*member)], {}))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of ours or of ``torch.optim.AdamW``; states keep their own dtypes."""
        for group in state_dict["param_groups"]:
            for name in ("amsgrad", "maximize"):
                if group.get(name):
                    raise ValueError(
                        f"FusedAdamW: has no {name}, the loaded state was made with it"
                    )
        # torch casts states to the parameters' dtypes; ``adopted`` puts back the dtypes they need.
        super().load_state_dict(state_dict)
        names = [name for group in state_dict["param_groups"] for name in group["params"]]
        for name, parameter in zip(names, self._parameters(), strict=True):
            if name in state_dict["state"]:
                self.state[parameter] = adopted(parameter, state_dict["state"][name], self.options)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "options": self.options, "grad_norm": self.grad_norm}

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _clip(self, parameters: Iterable[Tensor]) -> dict[torch.device, Tensor]:
        """Factors for the gradients of each device. Leaves the norm of all in ``grad_norm``."""
        if not self.options.max_norm:
            return {}
        kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for parameter in parameters:
            grad = checked_grad(parameter)
            grad = grad if is_dense(grad) else grad.contiguous()
            kinds.setdefault((grad.device, grad.dtype), []).append(grad)
        sums = [_ops.grad_square_sum(grads, self.options.backend) for grads in kinds.values()]
        total = torch.zeros((), dtype=torch.float64, device=sums[0].device if sums else None)
        for each in sums:
            total += each.to(total.device)
        self.grad_norm = total.sqrt()
        clip = (self.options.max_norm / (self.grad_norm + 1e-6)).clamp(max=1.0).float()
        return {device: clip.to(device) for device, _ in kinds}

    def _update(self, members: Iterable[_Member], clips: Mapping[torch.device, Tensor]) -> None:
        """Updates the members, with one call of the op for all tensors of a group and a kind."""
        kinds: dict[tuple[Any, ...], list[_Member]] = {}
        for member in members:
            parameter = member.parameter
            grad = checked_grad(parameter)
            kind = (id(member.group), parameter.device, parameter.dtype, grad.dtype)
            kinds.setdefault(kind, []).append(member)
        for (_, device, *_), alike in kinds.items():
            self._call(alike, clips.get(device))

    def _call(self, members: Sequence[_Member], clip: Tensor | None) -> None:
        """Updates members of one group and kind."""
        parameters = [member.parameter.detach() for member in members]
        originals = [checked_grad(member.parameter) for member in members]
        states = [self.state_of(member.parameter) for member in members]
        torch._foreach_add_([state["step"] for state in states], 1)
        steps = [int(state["step"]) for state in states]
        weights = [p if is_dense(p) else torch.empty_like(p).copy_(p) for p in parameters]
        grads = [
            in_layout_of(member.parameter, grad)
            for member, grad in zip(members, originals, strict=True)
        ]

        def held(*names: str) -> list[Tensor]:
            return [state[name] for name in names for state in states if name in state]

        group = members[0].group
        lr = float(group["lr"])
        beta1, beta2 = map(float, group["betas"])
        numbers = [1.0 - lr * float(group["weight_decay"]), beta1, beta2, float(group["eps"])]
        _ops.adamw(
            weights,
            grads,
            held("exp_avg"),
            held("exp_avg_sq"),
            held("exp_avg_scale", "exp_avg_sq_scale"),
            held("master", "low_bits"),
            held("average"),
            clip,
            list(self._rates(lr, beta1, beta2, steps, states)),
            [
                _key(self.options.seed, step, member.number)
                for step, member in zip(steps, members, strict=True)
            ],
            [0] * len(members),
            numbers,
            self.options.rounding == "stochastic",
            self.options.zero_grad,
            self.options.backend,
        )
        for parameter, weight in zip(parameters, weights, strict=True):
            if weight is not parameter:
                parameter.copy_(weight)
        for grad, original in zip(grads, originals, strict=True):
            if self.options.zero_grad and grad is not original:
                original.zero_()

    def _rates(
        self, lr: float, beta1: float, beta2: float, steps: list[int], states: list[dict[str, Any]]
    ) -> Iterator[float]:
        for step, state in zip(steps, states, strict=True):
            share = 0.0
            if "average" in state:
                share = self.options.average_weight(state["num_averaged"])
                state["num_averaged"] += 1
            yield from (lr / (1.0 - beta1**step), 1.0 / (1.0 - beta2**step) ** 0.5, share)

    def state_of(self, parameter: Tensor) -> dict[str, Any]:
        """The state of a parameter; makes it if needed. Its master exists before the first step."""
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state.update(new_state(parameter, self.options))
        return state


def _key(seed: int, step: int, number: int) -> int:
    """64 signed bits: SplitMix64 of seed, step and parameter number in turn."""
    key = 0
    for value in (seed, step, number):
        key = _splitmix.draw(key + value, 0)
    return key
