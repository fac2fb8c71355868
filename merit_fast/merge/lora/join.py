"""Several adapters as one: the weighted sum of their changes, exact or cut to a rank.

    sum_k c_k s_k B_k A_k = [c_1 s_1 B_1, c_2 s_2 B_2, ...] [A_1; A_2; ...]

A module that an adapter lacks counts as unchanged there.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from merit_fast.errors import InputError
from merit_fast.kernels.average.dtypes import SHORT_NAMES
from merit_fast.manifests.directories import output_directory
from merit_fast.manifests.io import stage_manifest
from merit_fast.merge.combine.combination import combine
from merit_fast.merge.config import FP8_BLOCK, MergeConfig
from merit_fast.merge.engine.layout import StoredTensor
from merit_fast.merge.engine.opened import OpenFiles, open_files
from merit_fast.merge.lora.files import (
    Array,
    Group,
    rank_keys,
    write_config,
    write_weights,
)
from merit_fast.merge.lora.products import Form, form_of, joined, read_product, stored_factors
from merit_fast.merge.lora.settings import joined_config, layer_ranks
from merit_fast.merge.lora.singular import Cut, cut_product
from merit_fast.merge.lora.whole import WholeSums
from merit_fast.merge.read.adapters.adapter import read_adapter
from merit_fast.merge.read.adapters.keys import Layer
from merit_fast.merge.read.companions import copy_companions
from merit_fast.merge.read.entries import TensorEntry
from merit_fast.merge.read.remote import Location, RemotePath
from merit_fast.merge.write.fingerprints import input_fingerprints
from merit_fast.progress import Progress
from merit_fast.records import record

METHODS = ("linear", "task_arithmetic")
_TARGET = tuple[str, int]  # a module, and how many LoRA layers wrap the layer there


@record
class Term:
    """One adapter's product in a joined layer."""

    layer: Layer
    factor: float  # the adapter's coefficient times the layer's scaling


@record
class JoinedLayer:
    """A layer of the output: a sum of products, of this rank and scaling."""

    module: str
    depth: int
    form: Form
    terms: tuple[Term, ...]
    rank: int
    scaling: float
    is_cut: bool

    def values(self, files: OpenFiles) -> tuple[Array, Array, list[Cut]]:
        """(left [E, out, r], right [E, r, in], a cut per expert if the rank is lower)."""
        products = [
            (term.factor / self.scaling, *read_product(term.layer, self.form, files))
            for term in self.terms
        ]
        left, right = joined(products)
        if not self.is_cut:
            return left, right, []
        cuts = [cut_product(*pair, self.rank) for pair in zip(left, right, strict=True)]
        return np.stack([cut.left for cut in cuts]), np.stack([c.right for c in cuts]), cuts


class JoinedAdapters:
    """A checked join: it can be summarised and written."""

    def __init__(
        self, models: Sequence[Location], weights: Sequence[float], config: MergeConfig
    ) -> None:
        _check_options(models, config)
        self.models = tuple(models)
        self.weights = tuple(weights)
        self.config = config
        self.adapters = [read_adapter(path) for path in models]
        names = {layer.module for adapter in self.adapters for layer in adapter.parts.layers}
        # The first adapter stands for the base, which only has to be there.
        combination = combine(models, weights, models[0], config, [f"{n}.weight" for n in names])
        self._rule = combination.rule
        self.layers = self._join_layers()
        self.whole = WholeSums(self.adapters, self._coefficients)
        self.dtype = self._dtype()
        self._lost: dict[str, tuple[float, float]] = {}

    def summary(self, out: Location) -> dict[str, Any]:
        """JSON-ready facts; errors of a cut are there once the adapter is written."""
        ranks = [layer.rank for layer in self.layers]
        total = sum(total for total, _ in self._lost.values())
        lost = sum(lost for _, lost in self._lost.values())
        errors = {name: _relative(*pair) for name, pair in self._lost.items()}
        return {
            "merged": str(out),
            "method": self.config.method,
            "models": [
                [str(path), weight] for path, weight in zip(self.models, self.weights, strict=True)
            ],
            "adapter": True,
            "rank": [min(ranks, default=0), max(ranks, default=0)],
            "layers": len(self.layers),
            "whole_tensors": len(self.whole.names),
            "parameters": sum(math.prod(planned.shape) for planned in self._planned()),
            "dtype": self.dtype.lower(),
            "lacking": self._lacking(),
            "is_exact": not any(layer.is_cut for layer in self.layers),
            "error": _relative(total, lost) if self._lost else 0.0,
            "largest_error": max(errors.items(), key=lambda pair: pair[1], default=None),
            "finished": True,
        }

    def write(self, out: Location, progress: Progress) -> None:
        """Writes the adapter; the same call resumes, and replaces an earlier output of ours."""
        if isinstance(out, RemotePath):
            raise InputError(f"{out}: an adapter is written to a local directory only")
        files = {entry.file for adapter in self.adapters for entry in adapter.parts.stored}
        inputs = input_fingerprints(self.models, files)
        manifest = stage_manifest("merge", self.config, inputs)
        planned = list(self._planned())
        with (
            output_directory(out, manifest, self.config.fsync) as directory,
            open_files(files, None) as opened,
            progress.task(f"join {out.name}", len(planned), "tensors") as task,
        ):
            copy_companions(self.models[0], directory)
            write_weights(directory, self._groups(opened), lambda count: task.advance(count))
            write_config(directory, self._config())

    def _planned(self) -> Iterator[StoredTensor]:
        for layer in self.layers:
            yield from _planned(layer, self.dtype)
        yield from self.whole.planned()

    def _groups(self, files: OpenFiles) -> Iterator[Group]:
        for layer in self.layers:
            yield _planned(layer, self.dtype), partial(self._factors, layer, files)
        yield from self.whole.groups(files)

    def _factors(self, layer: JoinedLayer, files: OpenFiles) -> list[Array]:
        left, right, cuts = layer.values(files)
        if cuts:
            name = layer.form.a_name
            self._lost[name] = (sum(c.total for c in cuts), sum(c.lost for c in cuts))
        return stored_factors(left, right, layer.form)

    def _config(self) -> dict[str, Any]:
        ranks = {
            module: (layer.rank, layer.scaling)
            for layer in self.layers
            for module in layer_ranks(self.adapters[0], layer.module)
        }
        modules = sorted({layer.module for layer in self.layers})
        return joined_config(self.adapters, modules) | rank_keys(ranks)

    def _join_layers(self) -> list[JoinedLayer]:
        terms: dict[_TARGET, list[tuple[Term, Form]]] = {}
        for number, adapter in enumerate(self.adapters):
            for layer in adapter.parts.layers:
                _refuse_nonlinear(layer)
                rank, scaling = layer_ranks(adapter, layer.module).popitem()[1]
                form = form_of(layer, rank)
                factor = self._coefficients(layer.module, layer.a)[number] * scaling
                listed = terms.setdefault((layer.module, layer.depth), [])
                listed.append((Term(layer, factor), form))
        return [self._join(target, listed) for target, listed in terms.items()]

    def _join(self, target: _TARGET, listed: Sequence[tuple[Term, Form]]) -> JoinedLayer:
        first, form = listed[0]
        for term, other in listed[1:]:
            if (other.experts, other.out, other.inner) != (form.experts, form.out, form.inner):
                entry = term.layer.a
                raise InputError(
                    f"{entry.file}: {entry.name}: changes a tensor of another shape than in "
                    f"{first.layer.a.file}"
                )
        terms = tuple(term for term, _ in listed)
        ranks = sum(term.layer.a.shape[0] // form.experts for term in terms)
        asked = self.config.rank
        rank = ranks if asked is None else min(asked, ranks)
        is_cut = rank < ranks
        scaling = 1.0 if is_cut else max(abs(term.factor) for term in terms) or 1.0
        return JoinedLayer(*target, form, terms, rank, scaling, is_cut)

    def _coefficients(self, module: str, entry: TensorEntry) -> tuple[float, ...]:
        """Each adapter's coefficient in a module: by weights, filters and gradients."""
        at = TensorEntry(f"{module}.weight", "F32", entry.shape, entry.file, 0, 0)
        rule = self._rule(at)
        assert isinstance(rule, tuple)
        return rule[: len(self.models)]

    def _dtype(self) -> str:
        """The dtype asked for; else the factors' own if it holds them exactly, else F32."""
        if self.config.dtype == FP8_BLOCK:
            raise InputError(f"merge: dtype: {FP8_BLOCK} is for models, an adapter stays plain")
        if self.config.dtype:
            return SHORT_NAMES[self.config.dtype]
        entries = [entry for adapter in self.adapters for entry in adapter.parts.factors]
        dtypes = {entry.dtype for entry in entries}
        is_exact = all(
            not layer.is_cut
            and all(_is_power_of_two(term.factor / layer.scaling) for term in layer.terms)
            for layer in self.layers
        )
        return dtypes.pop() if len(dtypes) == 1 and is_exact else "F32"

    def _lacking(self) -> list[tuple[str, int]]:
        """Adapters that lack layers of the union, and how many."""
        union = {(layer.module, layer.depth) for layer in self.layers}
        counts = []
        for adapter in self.adapters:
            own = {(layer.module, layer.depth) for layer in adapter.parts.layers}
            if missing := len(union - own):
                counts.append((str(adapter.path), missing))
        return counts


def _planned(layer: JoinedLayer, dtype: str) -> list[StoredTensor]:
    form = layer.form
    return [
        StoredTensor(form.a_name, dtype, form.a_shape(layer.rank)),
        StoredTensor(form.b_name, dtype, form.b_shape(layer.rank)),
    ]


def _check_options(models: Sequence[Location], config: MergeConfig) -> None:
    if config.method not in METHODS:
        raise InputError(
            f"merge: method {config.method} works on whole tensors: give the adapters' base; "
            f"adapters without a base are joined by {' or '.join(METHODS)}"
        )
    defaults = MergeConfig()
    for name in ("shard_size", "stats", "checksum", "missing", "allow_nonfinite"):
        value = getattr(config, name)
        if value != getattr(defaults, name):
            raise InputError(f"merge.{name}: must be absent for adapters without a base")


def _refuse_nonlinear(layer: Layer) -> None:
    entry = layer.magnitude or layer.bias
    if entry is not None:
        raise InputError(
            f"{entry.file}: {entry.name}: the sum of such changes is no LoRA; merge the adapters "
            "with their base"
        )


def _relative(total: float, lost: float) -> float:
    return math.sqrt(lost / total) if total > 0.0 else 0.0


def _is_power_of_two(number: float) -> bool:
    return number != 0.0 and abs(math.frexp(number)[0]) == 0.5
