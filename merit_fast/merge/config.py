"""Options of the merge stage."""

from dataclasses import dataclass
from typing import Literal

from merit_fast.config import option, require


@dataclass(frozen=True)
class MergeConfig:
    """How checkpoints are combined. The result depends on neither ``threads`` nor ``chunk_kib``."""

    weights: Literal["tokens", "samples", "uniform"] | tuple[float, ...] = option(
        "tokens", "tokens or samples (from each branch.json), uniform, or a list of numbers"
    )
    normalize: bool = option(True, "divide the weights by their sum")
    method: Literal["linear", "task_arithmetic", "slerp", "model_stock"] = option(
        "linear",
        "linear: base + scale (mean - base); task_arithmetic: base + scale * sum of weighted deltas; slerp: of two "
        "models; model_stock: a step from the base by the deltas' mean cosine",
    )
    t: float = option(0.5, "slerp's place on the arc from the first model (0) to the second (1)")
    scale: float = option(1.0, "factor on the step from the base; linear with 1 needs no base")
    dtype: Literal["bf16", "fp16", "fp32"] | None = option(None, "dtype of the output; None: the inputs' own")
    geometry: bool = option(False, "also write geometry.json: the branches' deltas from the base, in the same pass")
    allow_nonfinite: bool = option(False, "write infinities and NaN instead of stopping at the first")
    threads: int = option(2, "worker threads")
    chunk_kib: int = option(512, "bytes each worker reads from each input at a time, in KiB")

    def __post_init__(self) -> None:
        require(self.threads >= 1, "threads", "at least 1", self.threads)
        require(4 <= self.chunk_kib <= 1 << 20, "chunk_kib", "between 4 and 1048576", self.chunk_kib)
        require(abs(self.scale) < float("inf"), "scale", "a finite number", self.scale)
        require(0 <= self.t <= 1, "t", "between 0 and 1", self.t)
        if self.takes_gram:
            rule = f"absent: method {self.method} has coefficients of its own"
            require(self.scale == 1.0, "scale", rule, self.scale)
            require(not self.geometry, "geometry", rule, self.geometry)
            require(isinstance(self.weights, str), "weights", rule, list(self.weights))
        if not isinstance(self.weights, str):
            require(len(self.weights) > 0, "weights", "a list of at least one number", list(self.weights))
            finite = all(abs(weight) < float("inf") for weight in self.weights)
            require(finite, "weights", "finite numbers", list(self.weights))
            total = abs(sum(self.weights))
            require(not self.normalize or total > 1e-12, "weights", "of a sum other than 0", list(self.weights))

    @property
    def needs_base(self) -> bool:
        """Whether the base enters the result."""
        return self.method in ("task_arithmetic", "model_stock") or self.scale != 1.0

    @property
    def takes_gram(self) -> bool:
        """Whether a first pass over the inputs decides the coefficients; weights play no part then."""
        return self.method in ("slerp", "model_stock")
