"""Options of the merge stage."""

from collections.abc import Mapping
from typing import Any, Literal

from merit_fast.errors import InputError
from merit_fast.kernels.average.dtypes import SHORT_NAMES, SPELLINGS
from merit_fast.merge.form_options import FormOptions
from merit_fast.merge.method import MergeMethod
from merit_fast.merge.method_checks import check_given, check_numbers
from merit_fast.merge.parameters import (
    DENSITY,
    EPSILON,
    GAMMA,
    SELECT_TOPK,
    ModelSettings,
    Setting,
    T,
)
from merit_fast.merge.registry import method_named
from merit_fast.merge.rules.kinds import FromGram, WeightedSum
from merit_fast.merge.sizes import parse_bytes
from merit_fast.merge.table import DEFAULT_METHOD, METHODS
from merit_fast.merge.tokenizer_options import TokenizerOptions, tokenizer_options
from merit_fast.options.fields import option, require
from merit_fast.options.parser import parse, to_plain
from merit_fast.records import record, replace

FP8_BLOCK = "fp8-block128"  # a quantised output; the other dtypes are of plain tensors


@record
class MergeConfig(FormOptions):
    """Options of a merge. Neither threads, chunk_kib nor max_memory change the result.

    A Setting is a number, a gradient over the layers, or a list of {filter, value}.
    """

    weights: Literal["auto", "tokens", "samples", "uniform", "fit"] | tuple[float, ...] = option(
        "auto",
        "auto: tokens where every model has a branch.json, uniform where none has; tokens or "
        "samples (from each branch.json), uniform, a list of numbers, or fit: chosen on held-out "
        "rows",
    )
    normalize: bool = option(
        True,
        "divide the weights by their sum, and elected deltas by the weights of those that agree",
    )
    method: str = option(
        DEFAULT_METHOD,
        "how models are combined; docs/method.md has the formulas; or a registered method",
        choices=tuple(METHODS),
    )
    scale: Setting | Literal["auto"] = option(
        1.0,
        "factor on the step from the base (linear with 1 needs no base); "
        "auto: chosen on held-out rows",
    )
    ridge: float = option(
        0.1, "with weights fit: pull towards the token weights, as a share of the mean curvature"
    )
    tune_rows: int = option(
        256, "with scale auto or weights fit: held-out rows that choose, at most half of them"
    )
    density: Setting | None = option(
        None, f"{DENSITY.help}, usually 0.2 to 0.5 (ties, dare, breadcrumbs, della)"
    )
    gamma: Setting = option(GAMMA.default, f"breadcrumbs: {GAMMA.help}")
    epsilon: Setting | None = option(
        None, f"{EPSILON.help}; default 0.15; ram: a delta counts where it is larger, default 1e-5"
    )
    select_topk: Setting = option(SELECT_TOPK.default, SELECT_TOPK.help)
    t: Setting | None = option(None, f"{T.help}, default 0.5; nearswap: largest step from the base")
    vectors: Literal["tensor", "row", "column"] = option(
        "tensor",
        "nuslerp, model_stock: lengths and angles of whole tensors, of rows (along the last "
        "dimension) or of columns (along the first)",
        omit_default=True,
    )
    rescale: bool | None = option(
        None,
        "true: ties and breadcrumbs enlarge kept deltas until their sizes sum to those of all; "
        "false: dare and della do not divide by the keep probability; None: as published",
        omit_default=True,
    )
    seed: int = option(0, "seed of the random choices of dare and della")
    parameters: dict[str, Setting] | None = option(
        None,
        "numbers that single methods take (r, alpha, max_iter, tol, eps), or those of a registered "
        "method, as {name: value}",
        form="{NAME: NUMBER, ...}",
        omit_default=True,
    )
    models: tuple[ModelSettings, ...] = option(
        (),
        "for each model in order: its own weight, density, gamma, epsilon",
        flag="--settings-per-model",
        form="[{weight: NUMBER, ...}, ...]",
    )
    missing: Literal["error", "base", "drop"] = option(
        "error",
        "a tensor that some input lacks: error; base: use the base's; drop: leave it out",
    )
    tokenizer: str | TokenizerOptions | None = option(
        None,
        "tokens of the output: union of all models', base's, those of a model, or ids: rows by id; "
        "absent: ids and texts must agree; docs/checkpoints/vocabularies.md",
        form="union|base|ids|MODEL",
        omit_default=True,
    )
    chat_template: str | None = option(
        None,
        "chat template of the output: auto (the models' most common), alpaca, chatml, exaone, "
        "llama3, mistral, or a Jinja text; absent: the tokenizer's own",
        omit_default=True,
    )
    dtype: Literal["bf16", "fp16", "fp32", "fp64", "fp8-block128"] | None = option(
        None,
        "dtype of the output, bfloat16, float16, float32 and float64 too; None: the models' own, "
        "whatever the base's is",
        spellings=SPELLINGS,
    )
    rank: int | None = option(
        None,
        "adapters without a base: cut their sum to this rank; absent: exact, of the sum of ranks",
        omit_default=True,
    )
    shard_size: str | None = option(
        None, "most bytes of an output file, as 5G or 400M; absent: the first model's files"
    )
    unscaled_fp8: bool = option(
        False,
        "take 8-bit floats that have no scale next to them as values",
        omit_default=True,
    )
    stats: bool = option(
        False, "also write geometry.json: the models' deltas from the base, in the same pass"
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
        require(self.rank is None or self.rank >= 1, "rank", "at least 1", self.rank)
        names = (*SHORT_NAMES, FP8_BLOCK)
        require(self.dtype in (None, *names), "dtype", f"one of {', '.join(names)}", self.dtype)
        require(0 <= self.seed < 1 << 63, "seed", "between 0 and 2^63 - 1", self.seed)
        for name in ("shard_size", "max_memory"):
            if getattr(self, name) is not None:
                parse_bytes(name, getattr(self, name))
        self.check_form(shard_size=self.shard_size, stats=self.stats, checksum=self.checksum)
        method = self.method_entry
        check_numbers(self, method)
        self._check_weights(method)
        self._check_tuning(method)
        check_given(self, method)

    @property
    def method_entry(self) -> MergeMethod:
        """The declaration of ``method``."""
        return method_named(self.method)

    def _check_weights(self, method: MergeMethod) -> None:
        if isinstance(self.weights, str):
            return
        weights = list(self.weights)
        rule = f"absent: method {self.method} takes no weights"
        require(method.takes_weights, "weights", rule, weights)
        require(len(weights) > 0, "weights", "a list of at least one number", weights)
        finite = all(abs(weight) < float("inf") for weight in weights)
        require(finite, "weights", "finite numbers", weights)
        has_sum = not self.normalize or abs(sum(weights)) > 1e-12
        require(has_sum, "weights", "of a sum other than 0", weights)

    def _check_tuning(self, method: MergeMethod) -> None:
        require(0 <= self.ridge < float("inf"), "ridge", "a number of at least 0", self.ridge)
        require(self.tune_rows >= 1, "tune_rows", "at least 1", self.tune_rows)
        has_step = self.scale != "auto" or method.base != "unused"
        require(has_step, "scale", f"a number with method {self.method}", self.scale)
        has_tokens = self.is_tuned and self.tokenizer is not None
        rule = "absent where held-out rows choose a number: they are tokens of the models"
        require(not has_tokens, "tokenizer", rule, self.tokenizer)
        if self.weights == "fit":
            is_sum = isinstance(method.rule, WeightedSum) and method.takes_weights
            rule = f"other than fit with method {self.method}: its result is no sum"
            require(is_sum, "weights", rule, "fit")
            shared = all(model.weight is None for model in self.models)
            rule = "other than fit where models have weights of their own"
            require(shared, "weights", rule, "fit")

    @property
    def tokenizer_options(self) -> TokenizerOptions | None:
        """``tokenizer`` in full."""
        return tokenizer_options(self.tokenizer)

    @property
    def is_tuned(self) -> bool:
        """Whether held-out rows choose a number of this merge."""
        return self.scale == "auto" or self.weights == "fit"

    def filled(self, weights: tuple[float, ...], scale: float | None) -> "MergeConfig":
        """Replaces ``fit`` and ``auto`` by the numbers that were chosen."""
        chosen = weights if self.weights == "fit" else self.weights
        return replace(self, weights=chosen, scale=self.scale if scale is None else scale)

    @property
    def needs_base(self) -> bool:
        """Whether the merge cannot do without a base."""
        base = self.method_entry.base
        return (
            base == "required"
            or (base == "with scale" and self.scale != 1.0)
            or self.missing == "base"
        )

    @property
    def takes_gram(self) -> bool:
        """Whether a first pass over the inputs decides the coefficients."""
        return isinstance(self.method_entry.rule, FromGram) and self.vectors == "tensor"

    @property
    def takes_weights(self) -> bool:
        """Whether the method reads the models' weights."""
        return self.method_entry.takes_weights


def config_of(
    caller: str,
    config: MergeConfig | None,
    options: Mapping[str, Any],
    weights: Any = None,
) -> MergeConfig:
    """A call's config: the one given, or one of its keyword options, with the call's weights.

    Raises:
        InputError: both are given, or an option is unknown or wrong; ``caller`` is named.
    """
    if config is not None and weights is None and not options:
        return config
    if config is not None and options:
        raise InputError(f"{caller}: config: must be absent next to {', '.join(options)}")
    plain = dict(options) if config is None else to_plain(config)
    if weights is not None:
        plain["weights"] = (
            weights if isinstance(weights, str) else [float(weight) for weight in weights]
        )
    return parse(MergeConfig, plain, caller)
