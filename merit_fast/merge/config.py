"""Options of the merge stage."""

import re
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from merit_fast.merge.parameters import ModelSettings, Setting, numbers_of
from merit_fast.options.fields import option, require

Method = Literal[
    "linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "della",
    "della_linear", "sce", "slerp", "multislerp", "model_stock", "passthrough",
]  # fmt: skip
# Which optional parameters each method takes; "weights" and "scale" as such are optional everywhere they stand.
PARAMETERS: dict[str, tuple[str, ...]] = {
    "linear": ("weights", "scale"),
    "task_arithmetic": ("weights", "scale"),
    "ties": ("weights", "scale", "density"),
    "dare_linear": ("weights", "scale", "density", "seed"),
    "dare_ties": ("weights", "scale", "density", "seed"),
    "breadcrumbs": ("weights", "scale", "density", "gamma"),
    "breadcrumbs_ties": ("weights", "scale", "density", "gamma"),
    "della": ("weights", "scale", "density", "epsilon", "seed"),
    "della_linear": ("weights", "scale", "density", "epsilon", "seed"),
    "sce": ("scale", "select_topk"),
    "slerp": ("t",),
    "multislerp": ("weights",),
    "model_stock": (),
    "passthrough": ("scale",),
}
_NEEDS_BASE = {*PARAMETERS} - {"linear", "slerp", "multislerp", "passthrough"}
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True)
class MergeConfig:
    """How checkpoints are combined. The result depends on neither ``threads``, ``chunk_kib`` nor ``max_memory``.

    A Setting is a number, a gradient over the layers, or a list of {filter, value}.
    """

    weights: Literal["tokens", "samples", "uniform", "fit"] | tuple[float, ...] = option(
        "tokens",
        "tokens or samples (from each branch.json), uniform, a list of numbers, or fit: on held-out rows",
    )
    normalize: bool = option(
        True,
        "divide the weights by their sum, and elected deltas by the weights of those that agree",
    )
    method: Method = option(
        "linear", f"one of {', '.join(PARAMETERS)}; docs/method.md has the formulas"
    )
    scale: Setting | Literal["auto"] = option(
        1.0,
        "factor on the step from the base (linear with 1 needs no base); auto: chosen on held-out rows",
    )
    ridge: float = option(
        0.1, "with weights fit: pull towards the token weights, as a share of the mean curvature"
    )
    tune_rows: int = option(
        256, "with scale auto or weights fit: held-out rows that choose, at most half of them"
    )
    density: Setting | None = option(
        None, "share of every delta that is kept (ties, dare, breadcrumbs, della)"
    )
    gamma: Setting = option(0.01, "share of every delta's largest entries that breadcrumbs drops")
    epsilon: Setting = option(
        0.15, "della keeps the smallest of a row with density - epsilon, the largest with +"
    )
    select_topk: Setting = option(
        1.0, "share of the elements that vary at all which sce keeps, the most varying"
    )
    t: Setting = option(0.5, "slerp's place on the arc from the first model (0) to the second (1)")
    seed: int = option(0, "of the random choices of dare and della")
    models: tuple[ModelSettings, ...] = option(
        (),
        "for each model in order: its own weight, density, gamma, epsilon",
        flag="--settings-per-model",
        form="[{weight: NUMBER, ...}, ...]",
    )
    missing: Literal["error", "base", "drop"] = option(
        "error",
        "a tensor that some input lacks: error, the base's in its place, or drop it from the output",
    )
    dtype: Literal["bf16", "fp16", "fp32"] | None = option(
        None, "dtype of the output; None: the inputs' own"
    )
    shard_size: str | None = option(
        None, "most bytes of an output file, as 5G or 400M; None: the first model's files"
    )
    stats: bool = option(
        False, "also write geometry.json: the branches' deltas from the base, in the same pass"
    )
    checksum: bool = option(
        False, "also write an xxh3 of every output file into the index's metadata"
    )
    allow_nonfinite: bool = option(
        False, "write infinities and NaN instead of stopping at the first"
    )
    fsync: bool = option(True, "wait until the output is on the disk")
    threads: int = option(2, "worker threads; 16 with chunk_kib 4096 for models in an object store")
    chunk_kib: int = option(256, "bytes each worker reads from each input at a time, in KiB")
    max_memory: str | None = option(
        None, "most bytes of the engine's buffers, as 32M; makes chunks smaller"
    )

    def __post_init__(self) -> None:
        require(self.threads >= 1, "threads", "at least 1", self.threads)
        require(
            4 <= self.chunk_kib <= 1 << 20, "chunk_kib", "between 4 and 1048576", self.chunk_kib
        )
        require(0 <= self.seed < 1 << 63, "seed", "between 0 and 2^63 - 1", self.seed)
        for name in ("shard_size", "max_memory"):
            if getattr(self, name) is not None:
                parse_bytes(name, getattr(self, name))
        self._check_parameters()
        self._check_weights()
        self._check_tuning()

    def _check_parameters(self) -> None:
        takes = PARAMETERS[self.method]
        defaults = {field.name: field.default for field in fields(self)}
        for name in ("scale", "density", "gamma", "epsilon", "select_topk", "t", "seed"):
            value = getattr(self, name)
            rule = f"absent: method {self.method} takes no {name}"
            require(name in takes or value == defaults[name], name, rule, value)
            _check_range(name, name, value)
        rule = f"absent: method {self.method} reads its inputs twice for itself"
        require(not (self.stats and self.takes_gram), "stats", rule, self.stats)
        if "density" in takes:
            own = [model.density for model in self.models]
            given = self.density is not None or (
                bool(own) and all(density is not None for density in own)
            )
            require(given, "density", f"given for method {self.method}", self.density)
        for i, model in enumerate(self.models):
            for name in ("density", "gamma", "epsilon"):
                value, key = getattr(model, name), f"models[{i}].{name}"
                require(
                    name in takes or value is None,
                    key,
                    f"absent: method {self.method} takes no {name}",
                    value,
                )
                _check_range(key, name, value)
            rule = f"absent: method {self.method} takes no weights"
            require(
                "weights" in takes or model.weight is None,
                f"models[{i}].weight",
                rule,
                model.weight,
            )
            _check_range(f"models[{i}].weight", "weight", model.weight)

    def _check_weights(self) -> None:
        if not isinstance(self.weights, str):
            rule = f"absent: method {self.method} takes no weights"
            require("weights" in PARAMETERS[self.method], "weights", rule, list(self.weights))
            require(
                len(self.weights) > 0,
                "weights",
                "a list of at least one number",
                list(self.weights),
            )
            finite = all(abs(weight) < float("inf") for weight in self.weights)
            require(finite, "weights", "finite numbers", list(self.weights))
            total = abs(sum(self.weights))
            require(
                not self.normalize or total > 1e-12,
                "weights",
                "of a sum other than 0",
                list(self.weights),
            )

    def _check_tuning(self) -> None:
        require(0 <= self.ridge < float("inf"), "ridge", "a number of at least 0", self.ridge)
        require(self.tune_rows >= 1, "tune_rows", "at least 1", self.tune_rows)
        scaled = self.scale != "auto" or self.method != "passthrough"
        require(scaled, "scale", "a number with method passthrough", self.scale)
        if self.weights == "fit":
            linear = self.method in ("linear", "task_arithmetic")
            require(
                linear,
                "weights",
                f"other than fit with method {self.method}: its result is no sum",
                "fit",
            )
            own = any(model.weight is not None for model in self.models)
            require(
                not own, "weights", "other than fit where models have weights of their own", "fit"
            )

    @property
    def is_tuned(self) -> bool:
        """Whether held-out rows choose a number of this merge."""
        return self.scale == "auto" or self.weights == "fit"

    def filled(self, weights: tuple[float, ...], scale: float | None) -> "MergeConfig":
        """With the numbers that were chosen in the place of ``fit`` and ``auto``."""
        chosen = weights if self.weights == "fit" else self.weights
        return replace(self, weights=chosen, scale=self.scale if scale is None else scale)

    @property
    def needs_base(self) -> bool:
        """Whether the base enters the result."""
        return (
            self.method in _NEEDS_BASE
            or (self.method == "linear" and self.scale != 1.0)
            or self.missing == "base"
        )

    @property
    def takes_gram(self) -> bool:
        """Whether a first pass over the inputs decides the coefficients."""
        return self.method in ("slerp", "multislerp", "model_stock")

    @property
    def takes_weights(self) -> bool:
        return "weights" in PARAMETERS[self.method]


def parse_bytes(key: str, text: str) -> int:
    """400M, 5G, 5GB, 32MiB or a plain number, in powers of 1024."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    count = int(float(found.group(1)) * _UNITS[found.group(2).upper()]) if found else 0
    require(count > 0, key, "a number of bytes such as 32M or 5G", text)
    return count


def _check_range(key: str, name: str, value: Any) -> None:
    if value == "auto":
        return
    if isinstance(value, tuple):
        require(len(value) > 0, key, "a number or a list of at least one", list(value))
    for number in numbers_of(value):
        if name in ("density", "t", "select_topk", "gamma", "epsilon"):
            require(0 <= number <= 1, key, "between 0 and 1", number)
        else:
            require(abs(number) < float("inf"), key, "a finite number", number)
