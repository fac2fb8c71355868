"""One run of a layer in a forward pass, which runs again where its backward pass needs tensors.

The forward pass keeps the layer's arguments only: Chen et al. 2016 (arXiv 1604.06174), with a layer
as the segment.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree

from merit_fast.errors import MeritFastError

_LEAST_TOLERANCE = 1e-5  # of an output when a layer runs again on a GPU, whose sums have no order


class LayerRun:
    """A call of a layer under autograd, without the tensors that its graph would hold.

    Args:
        name: of the layer.
        forward: the layer's; called with ``args`` and ``kwargs``, now and in the backward pass.
        need: called before the layer runs again, so that its parameters are there.

    Attributes:
        tensors: those that the graph holds, in the order in which they were saved; None: not there.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        need: Callable[["LayerRun"], None],
    ) -> None:
        self.name = name
        self.tensors: list[Tensor] | None = None
        self._forward = forward
        self._args = args
        self._kwargs = kwargs
        self._need = need
        self._given = [(v, v._version) for v in _tensors_of((args, kwargs))]
        self._state = _State.now([tensor for tensor, _ in self._given])
        self._num_saved = 0
        self._outputs: list[tuple[Tensor, int]] = []
        _refuse_caches(name, args, kwargs)

    def first(self) -> Any:
        """Runs the layer in the forward pass."""
        with saved_tensors_hooks(self._pack, self._unpack), self._state.autocast():
            output = self._forward(*self._args, **self._kwargs)
        kept = [value.detach() for value in _tensors_of(output)]
        self._outputs = [(value, value._version) for value in kept]
        return output

    def _pack(self, tensor: Tensor) -> int:
        self._num_saved += 1
        return self._num_saved - 1

    def _unpack(self, number: int) -> Tensor:
        self._need(self)
        if self.tensors is None:
            self.tensors = self._again()
        return self.tensors[number]

    def _again(self) -> list[Tensor]:
        """Runs the layer once more; returns the tensors that its graph holds.

        Raises:
            MeritFastError: it computes something else than before.
        """
        if any(tensor._version != version for tensor, version in self._given):
            raise self._error("an argument of it was changed in place after it ran")
        tensors: list[Tensor] = []

        def keep(tensor: Tensor) -> None:
            tensors.append(tensor.detach())

        with self._state.restored(), saved_tensors_hooks(keep, _never):
            output = self._forward(*self._args, **self._kwargs)
        if len(tensors) != self._num_saved:
            raise self._error(f"{self._num_saved} tensors were saved first, then {len(tensors)}")
        for (before, version), now in zip(self._outputs, _tensors_of(output), strict=True):
            if before._version == version and not _are_close(before, now.detach()):
                raise self._error("its output is another")
        return tensors

    def _error(self, reason: str) -> MeritFastError:
        return MeritFastError(
            f"load_layered: layer {self.name} must compute the same when it runs again in the "
            f"backward pass, but {reason}; load the model into memory instead"
        )


class _State:
    """Random state and autocast under which a layer runs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self._is_autocast = torch.is_autocast_enabled(device.type)
        self._autocast_dtype = torch.get_autocast_dtype(device.type)

    @classmethod
    def now(cls, tensors: list[Tensor]) -> "_State":
        return cls(tensors[0].device if tensors else torch.device("cpu"))

    def autocast(self) -> torch.autocast:
        """Autocast as it is now, but without a cache of weights, which would keep every layer's."""
        return torch.autocast(
            self._device.type, self._autocast_dtype, self._is_autocast, cache_enabled=False
        )

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        devices = [] if self._cuda is None else [self._device]
        with torch.random.fork_rng(devices), self.autocast(), torch.enable_grad():
            torch.set_rng_state(self._cpu)
            if self._cuda is not None:
                torch.cuda.set_rng_state(self._cuda, self._device)
            yield


def _tensors_of(tree: Any) -> list[Tensor]:
    return [value for value in pytree.tree_leaves(tree) if isinstance(value, Tensor)]


def _never(packed: None) -> Tensor:
    raise AssertionError("no backward pass runs through the second graph of a layer")


def _are_close(before: Tensor, now: Tensor) -> bool:
    """Whether both are equal, NaN included; on a GPU up to rounding."""
    if torch.equal(before.nan_to_num(), now.nan_to_num()):
        return True
    if before.device.type == "cpu" or not before.is_floating_point():
        return False
    tolerance = max(_LEAST_TOLERANCE, torch.finfo(before.dtype).eps)
    distance = (before.float() - now.float()).norm()
    return bool(distance <= tolerance * before.float().norm())


def _refuse_caches(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for value in pytree.tree_leaves((args, kwargs)):
        if type(value).__name__.endswith("Cache"):
            raise MeritFastError(
                f"load_layered: layer {name} got a {type(value).__name__}, which a second run "
                "would fill twice; call the model with use_cache=False"
            )
