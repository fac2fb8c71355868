"""AdamW over fp32 master weights, with a state that saves to and loads from plain tensors."""

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor, nn

from merit_fast.errors import InputError
from merit_fast.kernels import dispatch
from merit_fast.kernels.optimizer import FusedAdamW
from merit_fast.train.config import TrainConfig
from merit_fast.train.parallel.pieces import is_divided, own_part
from merit_fast.train.parallel.ranks import ONE_PROCESS, Ranks

_LAST_NORM = "last_norm."  # no parameter has this name
_WEIGHT = "master"  # the key of the weights themselves, or of their masters


class MasterAdamW:
    """AdamW (Loshchilov & Hutter 2019) that loses no update, for any model dtype.

    Plain bf16 loses updates: at a learning rate of 1e-5 a weight moves 11 % of what it should. With
    ``adamw`` weights have fp32 masters and moments; an fp32 model is its own master. With
    ``adamw-8bit`` moments have 8 bits and a bf16 weight keeps 8 more bits of its master.
    ``backend`` is that of ``FusedAdamW``; "eager" runs torch's fused AdamW on widened gradients,
    but ``FusedAdamW`` for weights that ``ranks`` divide.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        backend: str | None = None,
        ranks: Ranks = ONE_PROCESS,
    ) -> None:
        self.ranks = ranks
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.parameters: list[Tensor] = [p for _, p in named]
        device = self.parameters[0].device.type if named else "cpu"
        self.is_divided = any(is_divided(parameter) for parameter in self.parameters)
        is_plain = config.optimizer == "adamw" and config.update_in_backward is None
        is_plain = is_plain and not self.is_divided
        is_eager = dispatch.choose("adamw", device, backend) == "eager"
        kernel = _Torch if is_eager and is_plain else _OnePass
        self._adamw = kernel(self.parameters, config, backend)

    @property
    def masters(self) -> list[Tensor]:
        """The fp32 weights: the parameters themselves, or their unrounded copies.

        With ``adamw-8bit`` always the parameters.
        """
        return self._adamw.masters

    def backward(self, loss: Tensor, learning_rate: float) -> None:
        """Adds the gradients of a micro-batch, or updates the weights by them in the same pass."""
        self._adamw.backward(loss, learning_rate)

    def step(self, learning_rate: float) -> float:
        """Updates, then frees the gradients; returns their norm before clipping.

        Raises:
            NonFiniteGradient: the norm is not finite. Weights, state and gradients are as before;
                with ``update_in_backward: previous`` they are lost.
        """
        norm = self._adamw.step(learning_rate)
        if not norm < float("inf"):
            raise NonFiniteGradient(self.first_not_finite())
        for parameter in self.parameters:
            parameter.grad = None
        return norm

    def end_updates(self) -> None:
        """Lets a backward pass only add gradients, as without ``update_in_backward``."""
        self._adamw.end_updates()

    def state(self) -> dict[str, Tensor]:
        """Masters, moments and step counts by parameter name, for ``load_state``."""
        tensors = {}
        for name, master, state in zip(self.names, self.masters, self._adamw.states, strict=True):
            tensors[f"{_WEIGHT}.{name}"] = master.detach()
            tensors |= {f"{key}.{name}": value for key, value in state.items() if key != _WEIGHT}
        return tensors | self._adamw.own_state()

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Resumes from the tensors of ``state``.

        Raises:
            KeyError: a tensor is missing: the checkpoint is of another recipe.
            InputError: a tensor is of another form.
        """
        self._adamw.load_own_state(tensors)
        keys = {name.partition(".")[0] for name in tensors} - {_WEIGHT, "last_norm"}
        for name, parameter, master, state in zip(
            self.names, self.parameters, self.masters, self._adamw.states, strict=True
        ):
            with torch.no_grad():
                master.copy_(tensors[f"{_WEIGHT}.{name}"])
                if master is not parameter:
                    parameter.copy_(master)
            # torch makes the state of a parameter in its first step
            for key in {*keys, *state} - {_WEIGHT}:
                if key in state or f"{key}.{name}" in tensors:
                    device = torch.device("cpu") if key == "step" else master.device
                    loaded = tensors[f"{key}.{name}"].to(device)
                    state[key] = _in_layout_of(state.get(key), loaded, f"{key}.{name}")

    def fill_state(self, names: Container[str], fill: Callable[[str, Tensor], None]) -> None:
        """Resumes divided weights.

        Args:
            names: of the tensors of ``state`` that are stored.
            fill: writes the values of a stored tensor into the one that it gets.
        """
        if _LAST_NORM in names:
            norm = torch.zeros((), dtype=torch.float64)
            fill(_LAST_NORM, norm)
            self._adamw.load_own_state({_LAST_NORM: norm})
        for name, tensor in self.state().items():
            fill(name, tensor)
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter:
                with torch.no_grad():
                    own_part(parameter).copy_(own_part(master))

    def first_not_finite(self) -> str | None:
        """Name of the first parameter whose gradient is not finite, in any of the processes."""
        counts = torch.zeros(len(self.parameters), dtype=torch.int32)
        for number, parameter in enumerate(self.parameters):
            if parameter.grad is not None:
                counts[number] = not own_part(parameter.grad).isfinite().all()
        if self.is_divided:
            self.ranks.add(counts)
        return next((n for n, count in zip(self.names, counts, strict=True) if count), None)


class NonFiniteGradient(Exception):
    """The gradient's norm is not finite. ``parameter``: the first that is not; None: all are."""

    def __init__(self, parameter: str | None) -> None:
        super().__init__(parameter)
        self.parameter = parameter


def _in_layout_of(tensor: Tensor | None, loaded: Tensor, name: str) -> Tensor:
    """``loaded`` in the order of elements of a tensor of its kind: files are in row-major order."""
    if tensor is None:
        return loaded
    if (tensor.shape, tensor.dtype) != (loaded.shape, loaded.dtype):
        raise InputError(
            f"checkpoint: {name}: must be {list(tensor.shape)} of {tensor.dtype}, got "
            f"{list(loaded.shape)} of {loaded.dtype}, as another train.shard writes it"
        )
    return torch.empty_like(tensor).copy_(loaded)


def _groups(tensors: list[Tensor], config: TrainConfig) -> list[dict[str, Any]]:
    decayed = {"params": [t for t in tensors if t.dim() >= 2], "weight_decay": config.weight_decay}
    plain = {"params": [t for t in tensors if t.dim() < 2], "weight_decay": 0.0}
    return [group for group in (decayed, plain) if group["params"]]


def _settings(config: TrainConfig) -> dict[str, Any]:
    return {"lr": config.learning_rate, "betas": (config.beta1, config.beta2)}


class _OnePass:
    """Our kernel: reads gradients in their own dtype and clips them in the same pass."""

    def __init__(self, parameters: list[Tensor], config: TrainConfig, backend: str | None) -> None:
        is_small = config.optimizer == "adamw-8bit"
        self.optimizer = FusedAdamW(
            _groups(parameters, config),
            **_settings(config),
            master="split8" if is_small else "fp32",
            moments="int8" if is_small else "fp32",
            max_norm=config.clip_norm or float("inf"),
            skip_nonfinite=config.update_in_backward != "previous",
            backend=backend,
        )
        self.in_backward = None
        self.measures = config.update_in_backward == "two-pass"
        if config.update_in_backward is not None:
            self.in_backward = self.optimizer.step_in_backward(clip=config.update_in_backward)
        self.states = [self.optimizer.state_of(parameter) for parameter in parameters]
        self.masters = [
            state.get("master", p) for p, state in zip(parameters, self.states, strict=True)
        ]

    def backward(self, loss: Tensor, learning_rate: float) -> None:
        self._set_rate(learning_rate)
        if self.in_backward is not None and self.measures:
            with self.in_backward.measuring():
                loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
        loss.backward()  # type: ignore[no-untyped-call]

    def own_state(self) -> dict[str, Tensor]:
        """The norm of the last step, by which the next one is clipped."""
        norm = self.optimizer.last_norm
        return {} if norm is None else {_LAST_NORM: torch.tensor(norm, dtype=torch.float64)}

    def load_own_state(self, tensors: dict[str, Tensor]) -> None:
        if _LAST_NORM in tensors:
            self.optimizer.last_norm = float(tensors[_LAST_NORM])

    def end_updates(self) -> None:
        """Lets a backward pass only add gradients again."""
        if self.in_backward is not None:
            self.in_backward.remove()

    def _set_rate(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    def step(self, learning_rate: float) -> float:
        self._set_rate(learning_rate)
        self.optimizer.step()
        assert self.optimizer.grad_norm is not None
        return float(self.optimizer.grad_norm)


class _Torch:
    """torch's fused AdamW on fp32 masters; gradients of bf16 weights are widened first."""

    def __init__(self, parameters: list[Tensor], config: TrainConfig, backend: str | None) -> None:
        self.parameters = parameters
        self.clip_norm = config.clip_norm
        self.masters = [p.detach().float() if p.dtype != torch.float32 else p for p in parameters]
        self.separate = any(m is not p for m, p in zip(self.masters, parameters, strict=True))
        self.optimizer = torch.optim.AdamW(
            _groups(self.masters, config), **_settings(config), fused=True
        )
        self.states = [self.optimizer.state[master] for master in self.masters]

    def backward(self, loss: Tensor, learning_rate: float) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def own_state(self) -> dict[str, Tensor]:
        return {}

    def load_own_state(self, tensors: dict[str, Tensor]) -> None:
        """Nothing: all of the state belongs to parameters."""

    def end_updates(self) -> None:
        """Nothing: a backward pass only adds gradients."""

    def step(self, learning_rate: float) -> float:
        self._gather_gradients()
        gradients = [master.grad for master in self.masters if master.grad is not None]
        total = nn.utils.get_total_norm(gradients, foreach=True)
        norm = float(total)
        if not norm < float("inf"):
            return norm
        if self.clip_norm:
            nn.utils.clip_grads_with_norm_(self.masters, self.clip_norm, total, foreach=True)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        if self.separate:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, self.masters)
        return norm

    def _gather_gradients(self) -> None:
        """Widens gradients into buffers that are kept: new ones cost a page fault per 4 KiB."""
        if not self.separate:
            return
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            if parameter.grad is None:
                master.grad = None
            elif master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad.copy_(parameter.grad)
