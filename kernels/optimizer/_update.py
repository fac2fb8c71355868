"""The update of some parameters: their tensors as the op takes them, one call for every kind."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from merit_fast.kernels import _splitmix
from merit_fast.kernels.optimizer import _ops
from merit_fast.kernels.optimizer._checks import local_grad
from merit_fast.kernels.optimizer._sharding import places
from merit_fast.kernels.optimizer._state import Options, in_layout_of, is_dense

Group = dict[str, Any]
State = dict[str, Any]


class Member(NamedTuple):
    """A parameter of the optimizer."""

    group: Group
    number: int  # of the parameter among all groups' parameters
    parameter: Tensor


class Piece(NamedTuple):
    """Tensors of one parameter, or of a run of its elements, in the order of the op."""

    group: Group
    weight: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    scales: Sequence[Tensor]  # of both 8-bit moments, or none
    masters: Sequence[Tensor]  # one or none
    averages: Sequence[Tensor]  # one or none
    rates: tuple[float, float, float]
    key: int
    first: int  # index of its first element in the whole parameter

    @property
    def kind(self) -> tuple[Any, ...]:
        """Tensors of one call agree in this."""
        tensors = (self.weight, self.grad, self.exp_avg, *self.masters)
        return (id(self.group), self.weight.device, *(tensor.dtype for tensor in tensors))


def update(
    members: Sequence[Member],
    states: Sequence[State],
    options: Options,
    clips: Mapping[torch.device, Tensor],
    shard: int | None,
) -> list[Tensor]:
    """Updates members, whose states are given.

    Args:
        members: parameters that have a gradient.
        states: their states, changed in place.
        options: those of the optimizer.
        clips: float32 factors of the gradients of each device.
        shard: number of this process among those that share plain tensors' elements, or None.

    Returns:
        What the op returns of every call.
    """
    if not members:
        return []
    grads = [local_grad(member.parameter) for member in members]  # may refuse one: nothing changes
    torch._foreach_add_([state["step"] for state in states], 1)
    kinds: dict[tuple[Any, ...], list[Piece]] = {}
    copies: list[tuple[Tensor, Tensor]] = []
    zeroed: list[Any] = []  # the op gets copies of these gradients
    for member, state, given in zip(members, states, grads, strict=True):
        weight, grad = _in_one_order(member.parameter, given, copies)
        if options.zero_grad and not _shares_memory(grad, member.parameter.grad):
            zeroed.append(member.parameter.grad)
        for piece in _pieces(member, state, weight, grad, options, shard):
            kinds.setdefault(piece.kind, []).append(piece)
    results = [_call(pieces, options, clips) for pieces in kinds.values()]
    for original, copy in copies:
        original.copy_(copy)
    for original in zeroed:
        original.zero_()
    return results


def _in_one_order(
    parameter: Tensor, grad: Tensor, copies: list[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """The local weight and gradient, dense and with one order of elements.

    A weight that has to be copied for that is added to ``copies``.
    """
    original = places.local(parameter.detach())
    if places.is_sharded(parameter):  # elements are numbered in row-major order
        weight = original.contiguous()
        grad = grad.contiguous()
    else:
        weight = original if is_dense(original) else torch.empty_like(original).copy_(original)
        grad = in_layout_of(original, grad)
    if weight is not original:
        copies.append((original, weight))
    return weight, grad


def _shares_memory(tensor: Tensor, gradient: Any) -> bool:
    return tensor.data_ptr() == places.local(gradient).data_ptr()


def _pieces(
    member: Member,
    state: State,
    weight: Tensor,
    grad: Tensor,
    options: Options,
    shard: int | None,
) -> Iterable[Piece]:
    step = int(state["step"])
    beta1, beta2 = map(float, member.group["betas"])
    share = 0.0
    if "average" in state:
        share = options.average_weight(state["num_averaged"])
        state["num_averaged"] += 1
    rate = float(member.group["lr"]) / (1.0 - beta1**step)
    root = 1.0 / (1.0 - beta2**step) ** 0.5

    def held(*names: str) -> list[Tensor]:
        return [places.local(state[name]) for name in names if name in state]

    whole = Piece(
        group=member.group,
        weight=weight,
        grad=grad,
        exp_avg=places.local(state["exp_avg"]),
        exp_avg_sq=places.local(state["exp_avg_sq"]),
        scales=held("exp_avg_scale", "exp_avg_sq_scale"),
        masters=held("master", "low_bits"),
        averages=held("average"),
        rates=(rate, root, share),
        key=_key(options.seed, step, member.number, shard),
        first=0,
    )
    if not places.is_sharded(member.parameter) or not _is_random(whole, options):
        return [whole]
    runs = places.runs(member.parameter)
    if len(runs) == 1:
        return [whole._replace(first=runs[0].first)]
    return [_cut(whole, run) for run in runs]


def _is_random(piece: Piece, options: Options) -> bool:
    """Whether any of its tensors is rounded with random bits."""
    rounded = piece.exp_avg.dtype != torch.float32
    exact = any(master.dtype != torch.int8 for master in piece.masters)
    if piece.weight.dtype == torch.bfloat16 and not exact:
        rounded = True
    return rounded and options.rounding == "stochastic"


def _cut(piece: Piece, run: places.Run) -> Piece:
    """The piece's elements of one run. 8-bit moments never come here."""

    def part(tensor: Tensor) -> Tensor:
        return tensor.view(-1)[run.start : run.start + run.length]

    return piece._replace(
        weight=part(piece.weight),
        grad=part(piece.grad),
        exp_avg=part(piece.exp_avg),
        exp_avg_sq=part(piece.exp_avg_sq),
        masters=[part(tensor) for tensor in piece.masters],
        averages=[part(tensor) for tensor in piece.averages],
        first=run.first,
    )


def _call(
    pieces: Sequence[Piece], options: Options, clips: Mapping[torch.device, Tensor]
) -> Tensor:
    """One call of the op for pieces of one group and kind."""
    group = pieces[0].group
    decay = 1.0 - float(group["lr"]) * float(group["weight_decay"])
    beta1, beta2 = map(float, group["betas"])
    result: Tensor = _ops.adamw(
        [piece.weight for piece in pieces],
        [piece.grad for piece in pieces],
        [piece.exp_avg for piece in pieces],
        [piece.exp_avg_sq for piece in pieces],
        [piece.scales[k] for k in range(len(pieces[0].scales)) for piece in pieces],
        [tensor for piece in pieces for tensor in piece.masters],
        [tensor for piece in pieces for tensor in piece.averages],
        clips.get(pieces[0].weight.device),
        [rate for piece in pieces for rate in piece.rates],
        [piece.key for piece in pieces],
        [piece.first for piece in pieces],
        [decay, beta1, beta2, float(group["eps"])],
        options.rounding == "stochastic",
        options.zero_grad,
        options.backend,
    )
    return result


def _key(seed: int, step: int, number: int, shard: int | None) -> int:
    """64 signed bits: SplitMix64 of seed, step, parameter number and shard, if any, in turn."""
    key = 0
    for value in (seed, step, number) if shard is None else (seed, step, number, shard):
        key = _splitmix.draw(key + value, 0)
    return key
