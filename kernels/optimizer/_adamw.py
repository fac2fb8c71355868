"""``FusedAdamW``: arguments checked, states made and loaded, tensors sorted into calls of the custom ops."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from merit_fast.kernels.optimizer import _ops
from merit_fast.kernels.optimizer._in_backward import InBackward
from merit_fast.kernels.optimizer._state import Options, adopted, in_layout_of, is_dense, new_state

Group = dict[str, Any]
_MASK = (1 << 64) - 1


class FusedAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019) that reads and writes every element once a step.

    For every parameter p with gradient g, in float32 whatever the dtypes:

        g = g * min(1, max_norm / (norm of all gradients + 1e-6))       # with max_norm
        m = m + (1 - beta1) * (g - m);  v = beta2 * v + (1 - beta2) * g * g
        p = p * (1 - lr * weight_decay) - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)
        average = average + (p - average) * (1 - average_decay)         # with average_decay
        p.grad = 0                                                      # with zero_grad, in place

    A bf16 weight keeps 8 bits of a number, and a step of lr 1e-5 is less than the last of them: rounded to nearest,
    most updates are lost. Three ways out: ``rounding="stochastic"`` (up or down with the probabilities that make the
    mean exact; Gupta et al. 2015), ``master="fp32"`` (4 more bytes), ``master="split"`` (2 more bytes: the 16 bits by
    which the weight differs from its float32 master, which is the same to the bit; the weight is its master rounded to
    nearest, halves away from zero). A float32 weight needs none and ignores both.

    Args:
        params: parameters, named parameters or groups of them, as torch takes them; float32 or bfloat16, any layout. A
            group's own options are lr, betas, eps and weight_decay; learning-rate schedulers work.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``, whose default weight_decay is 0.01.
        rounding: "stochastic" or "nearest": of bf16 weights without a master, and of moments that are not float32.
            The random bits are a function of (seed, step, parameter's place, element): the same on every backend, ISA
            level and number of threads.
        master: "none", "fp32" or "split", of bf16 weights. What is written to such a weight by hand must go to
            ``state[p]["master"]`` too.
        moments: "fp32", "bf16" or "int8". 8-bit moments share a float32 scale in blocks of 256: m = sign * (code /
            127)^2 * scale, v = (code / 255)^4 * scale. A v above zero never rounds to zero.
        average_decay: keep ``state[p]["average"]`` in float32: 0 <= decay < 1, or "mean" for the mean of all weights.
            It begins as the first updated weight. None: no average.
        max_norm: clip the norm of all gradients together; it is read beforehand, in float64 sums of fixed order. The
            norm is left in ``grad_norm``, a float64 scalar; ``inf`` only measures; 0 turns it off. ``p.grad`` is left
            as it is.
        zero_grad: write zeros into the gradients in the same pass. Where they can be None, ``zero_grad()`` costs less.
        seed: of stochastic rounding.
        backend: "eager" (PyTorch), "cpu" (native), "triton"; None chooses by device.

    The state has torch's keys (step, exp_avg, exp_avg_sq) and ours (exp_avg_scale, exp_avg_sq_scale, master, low_bits,
    average, num_averaged). With float32 moments ``torch.optim.AdamW`` loads it, and the other way round. A run that is
    resumed by ``load_state_dict`` gives the same bits as an unbroken one.

    Raises:
        ValueError: an option out of its range; parameters that overlap in memory; a sparse gradient.
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
            _check_group(self.param_groups[-1])
            _refuse_overlaps(self._parameters())
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter that has a gradient. Returns what ``closure`` returns, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        members = []
        place = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    members.append((group, place, parameter))
                place += 1
        clips = self._clip([parameter for _, _, parameter in members])
        self._update(members, clips)
        return loss

    def step_in_backward(self) -> InBackward:
        """From now on every parameter is updated in the backward pass, as soon as its gradient is complete, and the
        gradient is freed: no more than a few are in memory at once. See ``InBackward``.

        Raises:
            ValueError: with ``max_norm``, which needs all gradients before the first update.
        """
        if self.options.max_norm:
            raise ValueError(
                "FusedAdamW: step_in_backward needs max_norm=0, since the norm of all gradients is known only when the "
                f"backward pass is over; got {self.options.max_norm}"
            )
        return InBackward(self.param_groups, lambda *member: self._update([member], {}))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, from a state of ours or of ``torch.optim.AdamW``; states keep their own dtypes."""
        for group in state_dict["param_groups"]:
            for name in ("amsgrad", "maximize"):
                if group.get(name):
                    raise ValueError(
                        f"FusedAdamW: has no {name}, the loaded state was made with it"
                    )
        super().load_state_dict(state_dict)  # which casts states to the parameters' dtypes
        names = [name for group in state_dict["param_groups"] for name in group["params"]]
        for name, parameter in zip(names, self._parameters(), strict=True):
            if name in state_dict["state"]:
                self.state[parameter] = adopted(parameter, state_dict["state"][name], self.options)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "options": self.options, "grad_norm": self.grad_norm}

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _clip(self, parameters: Iterable[Tensor]) -> dict[torch.device, Tensor]:
        """What to multiply gradients with, on each device. Leaves their norm in ``grad_norm``."""
        if not self.options.max_norm:
            return {}
        kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for parameter in parameters:
            grad = _checked_grad(parameter)
            grad = grad if is_dense(grad) else grad.contiguous()
            kinds.setdefault((grad.device, grad.dtype), []).append(grad)
        sums = [_ops.grad_square_sum(grads, self.options.backend) for grads in kinds.values()]
        total = torch.zeros((), dtype=torch.float64, device=sums[0].device if sums else None)
        for part in sums:
            total += part.to(total.device)
        self.grad_norm = total.sqrt()
        clip = (self.options.max_norm / (self.grad_norm + 1e-6)).clamp(max=1.0).float()
        return {device: clip.to(device) for device, _ in kinds}

    def _update(
        self, members: Iterable[tuple[Group, int, Tensor]], clips: Mapping[torch.device, Tensor]
    ) -> None:
        """One call for all tensors of a group and a kind."""
        kinds: dict[tuple[Any, ...], list[tuple[int, Tensor, Tensor]]] = {}
        groups = {}
        for group, place, parameter in members:
            grad = _checked_grad(parameter)
            groups[id(group)] = group
            kind = id(group), parameter.device, parameter.dtype, grad.dtype
            kinds.setdefault(kind, []).append((place, parameter, grad))
        for (group_id, device, *_), rows in kinds.items():
            self._call(groups[group_id], rows, clips.get(device))

    def _call(
        self, group: Group, rows: list[tuple[int, Tensor, Tensor]], clip: Tensor | None
    ) -> None:
        states = [self.state_of(parameter) for _, parameter, _ in rows]
        torch._foreach_add_([state["step"] for state in states], 1)
        steps = [int(state["step"]) for state in states]
        parameters = [parameter.detach() for _, parameter, _ in rows]
        weights = [p if is_dense(p) else torch.empty_like(p).copy_(p) for p in parameters]
        grads = [in_layout_of(parameter, grad) for _, parameter, grad in rows]
        lists = [
            [state[name] for name in names for state in states if name in state]
            for names in (
                ["exp_avg"],
                ["exp_avg_sq"],
                ["exp_avg_scale", "exp_avg_sq_scale"],
                ["master", "low_bits"],
                ["average"],
            )
        ]
        lr, (beta1, beta2) = float(group["lr"]), map(float, group["betas"])
        numbers = [1.0 - lr * float(group["weight_decay"]), beta1, beta2, float(group["eps"])]
        rates = list(self._rates(lr, beta1, beta2, steps, states))
        stochastic = self.options.rounding == "stochastic"
        keys = [
            _key(self.options.seed, step, place)
            for step, (place, _, _) in zip(steps, rows, strict=True)
        ]
        zero = self.options.zero_grad
        _ops.adamw(
            weights,
            grads,
            *lists,
            clip,
            rates,
            keys,
            numbers,
            stochastic,
            zero,
            self.options.backend,
        )
        for parameter, weight, grad, (_, _, given) in zip(
            parameters, weights, grads, rows, strict=True
        ):
            if weight is not parameter:
                parameter.copy_(weight)
            if zero and grad is not given:
                given.zero_()

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
        """The state of a parameter, made if it has none yet: its master and average exist before the first step."""
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state.update(new_state(parameter, self.options))
        return state


def _check_group(group: Group) -> None:
    (beta1, beta2), numbers = (
        group["betas"],
        {name: group[name] for name in ("lr", "eps", "weight_decay")},
    )
    for name, value in numbers.items():
        if not value >= 0:
            raise ValueError(f"FusedAdamW: {name} must be at least 0, got {value}")
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"FusedAdamW: betas must be from 0 to below 1, got {group['betas']}")
    for parameter in group["params"]:
        if parameter.dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(
                f"FusedAdamW: parameters must be float32 or bfloat16, got {parameter.dtype}"
            )


def _refuse_overlaps(parameters: Iterable[Tensor]) -> None:
    """Dense parameters that share memory would be updated at once by several threads."""
    spans = sorted(
        (p.data_ptr(), p.data_ptr() + p.numel() * p.itemsize)
        for p in parameters
        if p.numel() and p.device.type != "meta" and is_dense(p)
    )
    for (_, stop), (start, _) in zip(spans, spans[1:], strict=False):
        if start < stop:
            raise ValueError(
                "FusedAdamW: parameters must not overlap in memory; give a tied weight once"
            )


def _checked_grad(parameter: Tensor) -> Tensor:
    grad = parameter.grad
    assert grad is not None
    if grad.layout != torch.strided:
        raise ValueError(
            f"FusedAdamW: gradients must be dense, got {grad.layout} of shape {list(grad.shape)}"
        )
    if grad.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"FusedAdamW: gradients must be float32 or bfloat16, got {grad.dtype}")
    return grad.detach()


def _key(seed: int, step: int, place: int) -> int:
    """64 bits, signed: Steele's splitmix64 of each in turn."""
    key = 0
    for number in (seed, step, place):
        key = (key + number + 0x9E3779B97F4A7C15) & _MASK
        key = ((key ^ key >> 30) * 0xBF58476D1CE4E5B9) & _MASK
        key = ((key ^ key >> 27) * 0x94D049BB133111EB) & _MASK
        key ^= key >> 31
    return key - (1 << 64) if key >> 63 else key
