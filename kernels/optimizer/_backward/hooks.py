"""Updates inside the backward pass, so that only a few gradients are in memory at once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from merit_fast.kernels.optimizer._backward.spent import is_spent, spend
from merit_fast.kernels.optimizer._update import Member


class Updates(Protocol):
    """The part of an optimizer that ``InBackward`` uses."""

    grad_norm: Tensor | None
    last_norm: float | None

    def members(self) -> list[Member]:
        """All parameters, with the groups that they are in now."""

    def square_sum(self, parameter: Tensor) -> Tensor:
        """Float64 scalar: the sum of squares of a gradient's local part."""

    def measured(self, sums: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The norm of whole gradients, left in ``grad_norm``."""

    def clips(self, norm: float | Tensor) -> Mapping[torch.device, Tensor]:
        """Factors of gradients whose norm is ``norm``."""

    def skips(self, norm: Tensor) -> bool:
        """Whether a step with this norm is left out; counts it."""

    def update(self, members: Sequence[Member], clips: Mapping[torch.device, Tensor]) -> None:
        """Updates members that have a gradient."""


class InBackward:
    """Hooks that update a parameter as soon as its gradient is complete and then free the gradient.

    ``FusedAdamW.step_in_backward`` makes them; ``remove`` or the end of a with-block ends them.
    Call ``step`` after each step as ever: it updates what no pass updated, ends the step, and
    schedulers rely on it. Learning rates and other options are looked up at every update.

    Between an update and ``step`` or ``zero_grad``, ``p.grad`` is a ``SpentGradient``: it has no
    memory, knows its norm, and raises a RuntimeError when a clipper that would change it, a
    GradScaler or a further backward pass touches it. A weight with several uses, such as a tied
    one, is updated once, after the gradients of all its uses.

    Checkpointing with ``use_reentrant=True`` runs passes of its own, which are counted as passes;
    use False.
    """

    def __init__(
        self, optimizer: Updates, clip: str | None, accumulation: int, ddp: Any | None
    ) -> None:
        self._optimizer = optimizer
        self._clip = clip
        self._accumulation = accumulation
        self._ddp = ddp
        self._handles: dict[int, tuple[Tensor, Any]] = {}
        self._members: dict[int, Member] = {}  # of the running pass, by the parameter's id
        self._pass: int | None = None  # the engine's number of the running pass
        self._passes = 0  # finished ones of this step
        self._sums: dict[int, tuple[Tensor, Tensor]] = {}  # by the parameter's number
        self._measuring = False
        self._clips: Mapping[torch.device, Tensor] | None = None  # None: not known yet
        self._skips = False  # whether this step is left out
        self._measured = False
        self.removed = False
        if ddp is not None:
            self._take_communication(ddp)
        self.refresh()

    def refresh(self) -> None:
        """Hooks the parameters that the optimizer has now, and no others."""
        if self._ddp is not None or self.removed:
            return
        wanted = {id(member.parameter): member.parameter for member in self._optimizer.members()}
        for parameter in wanted.values():
            self._refuse_other_hooks(parameter)
        for key in list(self._handles):
            if key not in wanted:
                self._handles.pop(key)[1].remove()
        for key, parameter in wanted.items():
            if key not in self._handles and parameter.requires_grad:
                register: Any = parameter.register_post_accumulate_grad_hook
                handle = register(self._complete)
                self._handles[key] = (parameter, handle)

    def _refuse_other_hooks(self, parameter: Tensor) -> None:
        hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
        owners = (getattr(hook, "__self__", None) for hook in hooks.values())
        if any(isinstance(owner, InBackward) and owner is not self for owner in owners):
            raise ValueError(
                "FusedAdamW: another optimizer updates a parameter of shape "
                f"{list(parameter.shape)} in the backward pass; remove() its hooks first"
            )

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Makes the backward pass inside measure the norm and free every gradient unused.

        The first of the two passes of ``clip="two-pass"``::

            with layerwise.measuring():
                loss.backward(retain_graph=True)
            loss.backward()

        Raises:
            RuntimeError: no second pass is asked for, or none is needed: with ``accumulation`` or
                ``ddp`` all gradients are in memory when the last pass ends, and are clipped then.
        """
        if not self._measures:
            raise RuntimeError(
                'FusedAdamW: measuring() is for step_in_backward(clip="two-pass") with one pass a '
                "step; with accumulation or ddp the norm is known without it"
            )
        self.refresh()  # a parameter without a hook would keep the gradient of this pass
        self._measuring = True
        try:
            yield
        finally:
            self._measuring = False

    @property
    def _measures(self) -> bool:
        return self._clip == "two-pass" and self._accumulation == 1 and self._ddp is None

    @torch.no_grad()
    def _complete(self, parameter: Tensor) -> None:
        """The hook of a parameter whose gradient of this pass is complete."""
        self._begin_pass()
        member = self._members.get(id(parameter))
        if member is None:
            return
        if self._measuring:
            self._sum_squares([member])
            parameter.grad = None
        elif self._passes + 1 >= self._accumulation and not self._waits:
            self._sum_squares([member])
            self._update([member])

    @property
    def _waits(self) -> bool:
        """Whether updates wait for the end of the last pass, because the norm is not known yet."""
        return self._clip is not None and self._clips is None

    def _begin_pass(self) -> None:
        current = torch._C._current_graph_task_id()
        if self._pass == current:
            return
        self._members = {id(member.parameter): member for member in self._optimizer.members()}
        self._check_count()
        self._take_previous_norm()
        self._pass = current
        self._at_end_of_pass(self._end_pass)

    def _take_previous_norm(self) -> None:
        """Clips by the norm of the last step, once a step; the first step has none and waits."""
        last = self._optimizer.last_norm
        if self._clip == "previous" and self._clips is None and last is not None:
            self._clips = self._optimizer.clips(last)

    def _check_count(self) -> None:
        spent = any(is_spent(member.parameter.grad) for member in self._members.values())
        if self._passes >= self._accumulation and not spent:
            self._begin_step()
        if self._passes >= self._accumulation > 1:
            raise RuntimeError(
                f"FusedAdamW: pass {self._passes + 1} of a step for which step_in_backward was "
                f"told accumulation={self._accumulation}; call step() after that many"
            )
        if self._measures and not self._measuring and not self._measured:
            raise RuntimeError(
                'FusedAdamW: step_in_backward(clip="two-pass") needs a first pass inside '
                "measuring() before the one that updates"
            )

    def _at_end_of_pass(self, call: Callable[[], None]) -> None:
        engine = torch.autograd.Variable._execution_engine  # type: ignore[attr-defined]
        if self._ddp is None:
            engine.queue_callback(call)
        else:  # DDP queues its own call, which fills p.grad, before the inner one
            engine.queue_callback(lambda: engine.queue_callback(call))

    @torch.no_grad()
    def _end_pass(self) -> None:
        self._pass = None
        if self._measuring:
            self._measured = True
            self._know_norm()
            self._sums = {}
            return
        self._passes += 1
        if self._passes >= self._accumulation:
            self._flush()

    def _take_communication(self, ddp: Any) -> None:
        """Registers DDP's hook: the mean over processes, and an update when all of it is there."""
        from torch.distributed import GradBucket  # type: ignore[attr-defined]
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        def reduce(group: Any, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
            if not self.removed:
                self._begin_pass()
            return allreduce_hook(group, bucket)

        ddp.register_comm_hook(ddp.process_group, reduce)

    def _flush(self) -> None:
        """Updates the parameters whose gradients are still there, and measures the step."""
        members = self._optimizer.members()
        rest = [member for member in members if _has_gradient(member.parameter)]
        self._sum_squares(rest)
        if self._waits:
            self._know_norm()
        elif self._clip is not None:
            self._optimizer.measured(self._ordered_sums())
        self._update(rest)
        self._remember_norm()

    def _remember_norm(self) -> None:
        """Keeps the norm for the next step. One that is not finite would clip it to nothing."""
        norm = self._optimizer.grad_norm
        if self._clip == "previous" and norm is not None:
            self._optimizer.last_norm = float(norm) if bool(norm.isfinite()) else None

    def _know_norm(self) -> None:
        """Takes the norm of this step's gradients, by which it is clipped or left out."""
        norm = self._optimizer.measured(self._ordered_sums())
        self._clips = self._optimizer.clips(norm)
        self._skips = self._optimizer.skips(norm)

    def _ordered_sums(self) -> list[tuple[Tensor, Tensor]]:
        return [self._sums[number] for number in sorted(self._sums)]

    def _sum_squares(self, members: Sequence[Member]) -> None:
        for number, parameter in ((member.number, member.parameter) for member in members):
            self._sums[number] = (parameter, self._optimizer.square_sum(parameter))

    def _update(self, members: Sequence[Member]) -> None:
        """Updates members whose squares are summed, and spends their gradients."""
        if not self._skips:
            self._optimizer.update(members, self._clips or {})
        for member in members:
            spend(member.parameter, self._sums[member.number][1])

    @torch.no_grad()
    def finish_step(self) -> None:
        """Updates what no pass updated, and forgets the spent gradients: the next step begins."""
        if any(_has_gradient(member.parameter) for member in self._optimizer.members()):
            self._take_previous_norm()
            self._flush()
        self.forget_spent()
        self._begin_step()
        self.refresh()

    def forget_spent(self) -> None:
        """Puts None in the place of spent gradients."""
        for member in self._optimizer.members():
            if is_spent(member.parameter.grad):
                member.parameter.grad = None

    def drop_step(self) -> None:
        """Begins the step again, as its gradients are dropped; a measured norm is kept."""
        self.forget_spent()
        if self._passes or not self._measured:
            self._begin_step()

    def _begin_step(self) -> None:
        self._passes = 0
        self._sums = {}
        self._clips = None
        self._skips = False
        self._measured = False

    def remove(self) -> None:
        """Removes the hooks: gradients are kept again, for ``step``."""
        for _, handle in self._handles.values():
            handle.remove()
        self._handles = {}
        self.removed = True
        self.forget_spent()

    def __enter__(self) -> "InBackward":
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def _has_gradient(parameter: Tensor) -> bool:
    return parameter.grad is not None and not is_spent(parameter.grad)
