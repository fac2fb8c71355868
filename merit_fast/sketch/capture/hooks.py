"""Wrappers round a model's modules, which tap the outputs of all that own sketched parameters."""

import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from merit_fast.errors import MeritFastError, one_line
from merit_fast.sketch.capture.convolutions import depthwise_call_backward
from merit_fast.sketch.capture.coverage import (
    Cover,
    cover_of,
    embedding_backward,
    filters_of,
    linear_backward,
)
from merit_fast.sketch.capture.layout import Pass, Refusal, Site
from merit_fast.sketch.capture.local import local_backward, replaced, slot_of
from merit_fast.sketch.capture.shared_rows import SharedRows
from merit_fast.sketch.capture.taps import begin_at_output, extra_pass, tap
from merit_fast.sketch.capture.towers import find_towers
from merit_fast.sketch.capture.trees import map_tensors, tensors_of
from merit_fast.sketch.capture.uses import RawUses
from merit_fast.sketch.divided.places import is_around_fsdp2
from merit_fast.sketch.divided.wrapping import contiguous_input, submodule, wrap_forward
from merit_fast.sketch.frozen_linear import faster_forward

Backward = Callable[..., None]  # (site, its target or targets, dy or dys, *inputs)


class ModuleTaps:
    """Taps of every module that owns sketched parameters.

    A module of a known formula is tapped at its output. Elsewhere F.linear and F.embedding are; for
    all other uses of a parameter a backward pass per example runs through its module.

    Args:
        names: id of every sketched parameter -> its name; ``slow``: those that are not tapped.
        refuse: called where no tap can cover the parameters of a site.

    Attributes:
        run: the forward pass whose sketches are not taken yet.
        covered: name -> how many modules that run now are known to use the parameter.
        elsewhere: parameters that another process counts.
        require_here: called with every module that runs and the parameters of its site.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Mapping[int, str],
        refuse: Callable[[Refusal], None],
        slow: Collection[str],
    ) -> None:
        self.model = model
        self.names = names
        self.refuse = refuse
        self.slow = slow
        self.run: Pass | None = None
        self.covered = Counter[str]()
        self.towers = find_towers(model)
        self.anchor = torch.zeros(0, requires_grad=True)
        self.elsewhere: Collection[str] = ()
        self.require_here: Callable[[nn.Module, Mapping[str, str]], None] = lambda *site: None
        self.sites = self._sites()
        self._covers = [(site, self._cover(site)) for site in self.sites]
        self._used = dict[nn.Module, set[str]]()
        self._restore: list[Callable[[], object]] = []

    def attach(self) -> None:
        for site, cover in self._covers:
            around = functools.partial(self._forward_site, site, cover)
            self._restore.append(wrap_forward(site.module, around))
        head = submodule(self.model, "get_output_embeddings")
        if isinstance(head, nn.Linear):
            self._restore.append(head.register_forward_pre_hook(contiguous_input).remove)
        if any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules()):
            inputs = {submodule(module, "get_input_embeddings") for module in self.model.modules()}
            begin_graph = functools.partial(begin_at_output, self.anchor)
            for embedding in filter(None, inputs):
                self._restore.append(embedding.register_forward_hook(begin_graph).remove)

    def detach(self) -> None:
        while self._restore:
            self._restore.pop()()

    def _sites(self) -> list[Site]:
        sites: list[Site] = []
        owned_names: set[str] = set()
        for path, module in self.model.named_modules():
            parameters = module.named_parameters(recurse=False, remove_duplicate=False)
            owned = {
                local: self.names[id(parameter)]
                for local, parameter in [*parameters, *filters_of(module)]
                if id(parameter) in self.names
            }
            if owned:
                tower = next((t for t in self.towers if f"{path}.".startswith(f"{t}.")), None)
                sites.append(Site(module, owned, tower))
                owned_names.update(owned.values())
        for name in self.names.values():
            if name not in owned_names:
                raise MeritFastError(f"sketch_gradients: parameter {name} is not the model's")
        return sites

    def _cover(self, site: Site) -> Cover | None:
        cover = cover_of(site)
        if cover is None or not cover.names & site.owned.keys():
            return None
        known = [name for local, name in site.owned.items() if local in cover.names]
        if len(known) < len(site.owned):
            left = site.without(known)
            self.refuse(left.refusal("is no part of its layer's formula"))
        return cover

    def _forward_site(
        self,
        site: Site,
        cover: Cover | None,
        original: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        run = self.run
        site = site.without(self.slow)
        if not site.owned:
            return original(*args, **kwargs)
        self.require_here(site.module, site.owned)
        if not torch.is_grad_enabled():
            if run is not None and run.open:
                run.ran_without_grad.update(site.owned.values())
            with self._covering(site):
                return original(*args, **kwargs)
        if run is None:
            raise site.error("ran outside the forward pass of the model that is sketched")
        run.ran_without_grad.difference_update(site.owned.values())
        if site.tower in run.twice and not run.open:
            raise site.error(
                "is in a tower that ran twice, under reentrant checkpointing; give "
                "use_reentrant=False"
            )
        inputs = cover.inputs(site.module, args, kwargs) if cover else None
        if cover is None or inputs is None:
            return self._forward_local(site, run, original, args, kwargs)
        with self._covering(site):
            output = faster_forward(original)(*args, **kwargs)
        return self._tap_output(cover.backward, site, run, output, inputs)

    def _forward_local(
        self,
        site: Site,
        run: Pass,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Any,
    ) -> Any:
        """Covers whatever a module does with its parameters, by stand-ins for them in this call."""
        module = site.module
        used = self._used.setdefault(module, set())
        stand_ins: dict[str, Tensor] = {}
        with self._covering(site):
            for local in site.owned:
                parameters, key = slot_of(module, local)
                parameter = parameters[key]
                assert parameter is not None
                if id(parameter) not in self.names:  # another sketcher's stand-in
                    stand_ins[local] = parameter
                elif parameter.requires_grad:  # its own gradient is wanted too
                    stand_ins[local] = parameter.view_as(parameter)
                else:
                    wanted = run.exploring or local in used
                    stand_ins[local] = nn.Parameter(parameter.detach(), wanted)
        ids = {id(value): local for local, value in stand_ins.items()}
        uses = RawUses(ids, lambda local: self.covered[site.owned[local]] > 0)
        uses.tap_use = functools.partial(self._tap_use, site, run, uses)
        with replaced(module, stand_ins), uses:
            output = original(*args, **kwargs)
        if returned := {uses.owned[id(v)] for v in tensors_of(output) if id(v) in uses.owned}:
            kept = [n for local, n in site.owned.items() if local not in returned]
            self.refuse(site.without(kept).refusal("is returned by its module"))
            site = site.without(self.slow)
        if uses.other and is_around_fsdp2(module):
            self.refuse(site.refusal("is used by a module around others that are divided"))
            site = site.without(self.slow)
        others = site.without([n for local, n in site.owned.items() if local not in uses.other])
        if run.exploring:
            used.update(uses.other)
        elif uses.other - used:
            self.refuse(others.refusal("is used in another way than before"))
            return output
        return self._tap_all(others, run, output, stand_ins) if others.owned else output

    def _tap_all(self, site: Site, run: Pass, output: Any, stand_ins: Mapping[str, Tensor]) -> Any:
        outputs = {id(value): value for value in tensors_of(output) if value.requires_grad}
        if not outputs:
            return output
        inner = list(outputs.values())
        refusals = [refusal for value in inner if (refusal := run.refusal(site, value))]
        if len(refusals) == len(inner):
            self.refuse(refusals[0])
            return output

        def backward(live: Site, targets: list[Pass], dys: tuple[Tensor | None, ...]) -> None:
            local_backward(live, targets, run, inner, stand_ins, dys)

        sink = functools.partial(self._sink, backward, site, run)
        tapped = dict(zip(outputs, tap(self.anchor, inner, sink), strict=True))
        return map_tensors(output, lambda value: tapped.get(id(value), value))

    def _tap_use(
        self, site: Site, run: Pass, uses: RawUses, function: Any, result: Tensor, given: Any
    ) -> Tensor:
        """Taps one F.linear or F.embedding that got stand-ins."""
        keys = [key for key in ("weight", "bias") if id(given.get(key)) in uses.owned]
        locals_of = {key: uses.owned[id(given[key])] for key in keys}
        part = Site(site.module, {k: site.owned[n] for k, n in locals_of.items()}, site.tower)
        if function is F.linear:
            formula: Backward = linear_backward
        elif function is F.conv1d:
            formula = functools.partial(depthwise_call_backward, given)
        else:
            padding = given.get("padding_idx")
            if padding is not None and padding < 0:
                padding += len(given["weight"])
            formula = functools.partial(embedding_backward, padding_idx=padding)

        def backward(live: Site, target: Pass, dy: Tensor, *kept: Tensor) -> None:
            # The pass through the module takes all uses of a parameter that has others too.
            doubled = [part.owned[key] for key in keys if locals_of[key] in uses.other]
            formula(live.without(doubled), target, dy, *kept)

        return self._tap_output(backward, part, run, result, [given["input"]])

    def _tap_output(
        self, backward: Backward, site: Site, run: Pass, output: Tensor, inputs: list[Tensor]
    ) -> Tensor:
        def formula(live: Site, targets: list[Pass], dys: tuple[Tensor], *kept: Tensor) -> None:
            for target in targets:
                backward(live, target, dys[0], *kept)

        sink = functools.partial(self._sink, formula, site, run)
        refusal = run.refusal(site, output)
        ids = inputs[0]
        if refusal is None:
            return tap(self.anchor, [output], sink, *inputs)[0]
        is_shared = ids.dim() == 1 or (ids.dim() == 2 and len(ids) == 1)
        if ids.is_floating_point() or not is_shared or run.cu_seqlens is not None:
            self.refuse(refusal)
            return output

        def copies() -> Tensor:
            rows = output.expand(run.size, *output.shape[-2:])
            return tap(self.anchor, [rows], sink, ids.expand(run.size, ids.shape[-1]))[0]

        refuse = functools.partial(self.refuse, refusal)
        return SharedRows.of(output, copies, run.size, refuse)

    def _sink(
        self,
        backward: Backward,
        site: Site,
        run: Pass,
        dys: tuple[Tensor | None, ...],
        *inputs: Tensor,
    ) -> None:
        """Gets the gradients of a tapped output, in the user's backward pass or one of ours."""
        extra = extra_pass()
        if extra is None:
            if run.done:
                raise MeritFastError(
                    "sketch_gradients: a backward pass through a forward pass that was updated "
                    "or discarded"
                )
            run.fired = True
        elif extra.run is not run or extra.target is None:
            return
        live = site.without([*self.slow, *self.elsewhere])
        if not live.owned:
            return
        try:
            backward(live, [run, *run.also] if extra is None else [extra.target], dys, *inputs)
        except Refusal as refusal:
            self.refuse(refusal)
        except Exception as error:
            if extra is None or isinstance(error, MeritFastError):
                raise
            self.refuse(live.refusal(f"fails where its gradient is taken ({one_line(error)})"))

    @contextmanager
    def _covering(self, site: Site) -> Iterator[None]:
        self.covered.update(site.owned.values())
        try:
            yield
        finally:
            self.covered.subtract(site.owned.values())
