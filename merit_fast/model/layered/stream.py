"""Keeps the parameters of at most one layer in memory, and runs the layers of a model so."""

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from merit_fast.errors import MeritFastError
from merit_fast.model.layered.run import LayerRun
from merit_fast.model.layered.unit import Unit


class LayerStream:
    """The layers of one model, of which at most one is in memory.

    A layer's parameters, and in a backward pass the tensors that its graph holds, stay there until
    another layer's are needed. So a forward and a backward pass read every layer twice.
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        self.units = units
        self._current: Unit | None = None
        self._run: LayerRun | None = None  # whose tensors are in memory
        self._is_running = False

    def enter(self, unit: Unit) -> None:
        """Brings a layer into memory, and the one before out of it."""
        if self._current is unit:
            return
        before = self._current
        self._forget_run()
        if before is not None:
            before.free()
        unit.load()
        self._current = unit
        unit.prefetch()
        step = -1 if before is not None and before.number > unit.number else 1
        if 0 <= unit.number + step < len(self.units):
            self.units[unit.number + step].prefetch()

    def call(
        self, unit: Unit, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Runs a layer.

        Raises:
            MeritFastError: it runs inside another layer.
        """
        if self._is_running:
            raise MeritFastError(
                f"load_layered: layer {unit.name} runs inside another layer; load the model into "
                "memory instead"
            )
        self._forget_run()
        self.enter(unit)
        self._is_running = True
        try:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)

            def need(run: LayerRun) -> None:
                self._need(unit, run)

            return LayerRun(unit.name, forward, args, kwargs, need).first()
        finally:
            self._is_running = False

    def _need(self, unit: Unit, run: LayerRun) -> None:
        if self._run is not run:
            self._forget_run()
            self.enter(unit)
            self._run = run

    def _forget_run(self) -> None:
        if self._run is not None:
            self._run.tensors = None
            self._run = None


_streams: "WeakKeyDictionary[nn.Module, tuple[LayerStream, Unit]]" = WeakKeyDictionary()


class _Streamed:
    """Base of a layer's class that runs the layer by its stream."""

    def __init_subclass__(cls) -> None:
        """Leaves the layer's class as it is: transformers' would wrap its forward once more."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stream, unit = _streams[self]  # type: ignore[index]
        return stream.call(unit, super().__call__, args, kwargs)  # type: ignore[misc]


def stream_layer(layer: nn.Module, stream: LayerStream, unit: Unit) -> None:
    """Lets a layer run by a stream."""
    kind = type(layer)
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    layer.__class__ = type(kind.__name__, (_Streamed, kind), names)
    for module in layer.modules():
        _streams[module] = (stream, unit)


def bring_in(module: nn.Module) -> None:
    """Brings the layer that a module belongs to into memory, where the model is a layered one."""
    if module in _streams:
        stream, unit = _streams[module]
        stream.enter(unit)
