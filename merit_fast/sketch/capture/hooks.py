"""Hooks on a model, which divide a pass into examples and tap every sketched parameter's output."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from merit_fast.errors import MeritFastError
from merit_fast.kernels.sketch import CountSketch
from merit_fast.sketch.capture.coverage import Cover, Tap, cover_of, replay
from merit_fast.sketch.capture.layout import Pass, Site
from merit_fast.sketch.capture.replay import is_replaying
from merit_fast.sketch.capture.towers import check_images, find_towers, read_grid
from merit_fast.sketch.capture.uses import RawUses, UseAudit


class ModelHooks:
    """Hooks that ``GradientSketcher`` puts into a model and takes out again.

    Attributes:
        run: the forward pass whose sketches are not taken yet.
        packed: cu_seqlens of the next forward pass, if it is a packed row.

    Raises:
        MeritFastError: a parameter cannot be covered.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Mapping[int, str],
        sketch: CountSketch,
        scales: Mapping[str, Tensor],
    ) -> None:
        self.model = model
        self.names = names
        self.sketch = sketch
        self.scales = scales
        self.run: Pass | None = None
        self.packed: Tensor | None = None
        self._towers = find_towers(model)
        self._covers = [(site, cover_of(site)) for site in self._sites()]
        self._anchor = torch.zeros(0, requires_grad=True)
        self._audit: UseAudit | None = None
        self._audited: set[frozenset[str]] = set()
        self._restore: list[Callable[[], object]] = []

    def attach(self) -> None:
        for site, cover in self._covers:
            if cover is None:
                self._wrap_forward(site.module, functools.partial(self._forward_raw, site))
            else:
                hook = site.module.register_forward_hook(
                    functools.partial(self._hook, cover), with_kwargs=True
                )
                self._restore.append(hook.remove)
        for name, tower in self._towers.items():
            first = next((site for site, _ in self._covers if site.tower == name), None)
            if first is not None:
                hook = tower.register_forward_pre_hook(
                    functools.partial(self._enter_tower, first), with_kwargs=True
                )
                self._restore.append(hook.remove)
        if isinstance(head := _submodule(self.model, "get_output_embeddings"), nn.Linear):
            self._restore.append(head.register_forward_pre_hook(_contiguous_input).remove)
        if any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules()):
            for embedding in {
                _submodule(module, "get_input_embeddings") for module in self.model.modules()
            }:
                if embedding is not None:
                    self._restore.append(embedding.register_forward_hook(self._begin_graph).remove)
        self._wrap_forward(self.model, self._forward_model)

    def detach(self) -> None:
        while self._restore:
            self._restore.pop()()
        self.discard()

    def discard(self) -> None:
        if self.run is not None:
            self.run.done = True
        self.run = None

    def _sites(self) -> list[Site]:
        sites: list[Site] = []
        owned_names: set[str] = set()
        for path, module in self.model.named_modules():
            parameters = module.named_parameters(recurse=False, remove_duplicate=False)
            owned = {
                local: self.names[id(parameter)]
                for local, parameter in parameters
                if id(parameter) in self.names
            }
            if owned:
                tower = next((t for t in self._towers if f"{path}.".startswith(f"{t}.")), None)
                sites.append(Site(module, owned, tower))
                owned_names.update(owned.values())
        for name in self.names.values():
            if name not in owned_names:
                raise MeritFastError(f"sketch_gradients: parameter {name} is not the model's")
        return sites

    def _forward_model(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        graph_task = torch._C._current_graph_task_id()  # type: ignore[attr-defined]
        recomputing = self.run is not None and graph_task != -1
        if not torch.is_grad_enabled() or recomputing:
            return original(*args, **kwargs)
        if self.run is not None:
            raise MeritFastError(
                "sketch_gradients: a second forward pass before update(): call update() or "
                "discard() first, and run passes that are not sketched under torch.no_grad()"
            )
        self.run = run = self._begin(args, kwargs)
        kinds = frozenset(key for key, value in kwargs.items() if value is not None)
        try:
            if kinds in self._audited:
                output = original(*args, **kwargs)
            else:
                output = self._audited_call(original, *args, **kwargs)
                self._audited.add(kinds)
        except BaseException:
            self.discard()
            raise
        run.open = False
        return output

    def _audited_call(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Watches a pass with new arguments for uses of parameters that no hook sees."""
        self._audit = UseAudit(self.names)
        try:
            with self._audit:
                output = original(*args, **kwargs)
            for name, function in self._audit.stray.items():
                raise MeritFastError(
                    f"sketch_gradients: parameter {name} is used outside its module's forward, "
                    f"in {function}; leave it out (requires_grad_(False), or parameters=...)"
                )
        finally:
            self._audit = None
        return output

    def _begin(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Pass:
        values = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args, *kwargs.values()]
        source = next((value for value in values if isinstance(value, Tensor)), None)
        if source is None or source.dim() < 1:
            raise MeritFastError(
                "sketch_gradients: the model must be called with a tensor that begins with the "
                "batch"
            )
        cu_seqlens = kwargs.get("cu_seq_lens_q") if self.packed is None else self.packed
        size = len(source)
        tokens = source.shape[1] if source.dim() > 1 else 1
        self.packed = None
        if cu_seqlens is not None:
            steps = cu_seqlens.diff()
            if (
                size != 1
                or int(cu_seqlens[0]) != 0
                or int(cu_seqlens[-1]) != tokens
                or bool((steps < 1).any())
            ):
                raise MeritFastError(
                    "sketch_gradients: cu_seqlens must rise from 0 to N of an input [1, N], "
                    f"got {cu_seqlens.tolist()} for {list(source.shape)}"
                )
            size = len(steps)
            cu_seqlens = cu_seqlens.to(source.device, torch.int64)
        ids = source if not source.is_floating_point() else None
        run = Pass(self.sketch, self.scales, size, tokens, cu_seqlens, ids)
        pixels = kwargs.get("pixel_values")
        several = size > 1 and not self._towers
        if several and isinstance(pixels, Tensor) and pixels is not source and self._has_tower():
            check_images(run, getattr(self.model, "config", None), pixels)
        return run

    def _has_tower(self) -> bool:
        """Whether parameters outside decoder and head are sketched."""
        known: set[int] = set()
        for getter in ("get_decoder", "get_output_embeddings"):
            submodule = _submodule(self.model, getter)
            if submodule is not None:
                known.update(id(parameter) for parameter in submodule.parameters())
        return any(key not in known for key in self.names)

    def _hook(
        self, cover: Cover, module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any
    ) -> Any:
        if is_replaying():
            return output
        if self._audit is not None:
            self._audit.covered(cover.site.owned.values())
        return self._tap(cover, output, [*args, *kwargs.values()])

    def _forward_raw(
        self, site: Site, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Covers a module without hook: taps F.linear and F.embedding, replays it for the rest."""
        if is_replaying():
            return original(*args, **kwargs)
        with RawUses(site, self._tap) as uses:
            output = original(*args, **kwargs)
        if self._audit is not None:
            self._audit.covered(site.owned.values())
        left = {local: name for local, name in site.owned.items() if name not in uses.seen}
        if left:
            rest = replay(Site(site.module, left, site.tower))
            return self._tap(rest, output, [*args, *kwargs.values()])
        return output

    def _tap(self, cover: Cover, output: Any, values: list[Any]) -> Any:
        run = self.run
        site = cover.site
        if not torch.is_grad_enabled():
            if run is not None and run.open:
                run.ran_without_grad.update(site.owned.values())
            return output
        if run is None:
            raise site.refusal("ran outside the forward pass of the model that is sketched")
        if run.ran_without_grad:
            run.ran_without_grad.difference_update(site.owned.values())
        if not isinstance(output, Tensor):
            raise site.refusal(
                f"cannot be covered: its module returns a {type(output).__name__}, not one tensor"
            )
        if site.tower in run.twice and not run.open:
            raise site.refusal(
                "is in a tower that ran twice, under reentrant checkpointing; give "
                "use_reentrant=False"
            )
        inputs = [value.detach() for value in cover.inputs(site, values)]
        if (
            cover.lookup
            and len(output) == 1
            and run.size > 1
            and run.cu_seqlens is None
            and output.dim() == 3
        ):
            # Positions: dy would arrive summed over the examples.
            output = output.expand(run.size, -1, -1)
            inputs = [inputs[0].expand(run.size, -1)]
        sink = functools.partial(_sink, cover, run)
        return Tap.apply(self._anchor, output, sink, *inputs)  # type: ignore[no-untyped-call]

    def _begin_graph(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Gives reentrant checkpointing an input that requires a gradient."""
        needs_tap = isinstance(output, Tensor) and not output.requires_grad
        if not torch.is_grad_enabled() or not needs_tap or is_replaying():
            return output
        return Tap.apply(self._anchor, output, lambda dy: None)  # type: ignore[no-untyped-call]

    def _enter_tower(
        self, site: Site, tower: nn.Module, args: tuple[Any, ...], kwargs: Any
    ) -> None:
        if self.run is not None and self.run.open and self.run.size > 1:
            read_grid(self.run, site, tower, getattr(self.model, "config", None), args, kwargs)

    def _wrap_forward(self, module: nn.Module, around: Callable[..., Any]) -> None:
        """Replaces ``module.forward(...)`` by ``around(module.forward, ...)`` until ``detach``."""
        original = module.forward
        before = module.__dict__.get("forward")
        module.forward = functools.wraps(original)(functools.partial(around, original))
        if before is None:
            self._restore.append(functools.partial(module.__dict__.pop, "forward"))
        else:
            self._restore.append(functools.partial(module.__dict__.__setitem__, "forward", before))


def _sink(cover: Cover, run: Pass, dy: Tensor, *inputs: Tensor) -> None:
    if run.done:
        raise MeritFastError(
            "sketch_gradients: a backward pass through a forward pass that was updated or discarded"
        )
    run.fired = True
    cover.backward(cover.site, run, dy, *inputs)


def _submodule(module: nn.Module, getter: str) -> nn.Module | None:
    """Calls get_input_embeddings(), get_output_embeddings() or get_decoder(); None without such."""
    try:
        submodule: nn.Module | None = getattr(module, getter)()
    except (AttributeError, NotImplementedError):
        return None
    return submodule


def _contiguous_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Makes the inputs contiguous.

    With a frozen weight and strided input (a head after a slice) torch copies the weight once per
    example.
    """
    return tuple(arg.contiguous() if isinstance(arg, Tensor) else arg for arg in args)
