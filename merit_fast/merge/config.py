"""Options of the merge stage."""

from dataclasses import dataclass
from typing import Literal

from merit_fast.config import option, require


@dataclass(frozen=True)
class MergeConfig:
    """How branches are averaged. Results do not depend on ``threads`` or ``chunk_kib``."""

    weights: Literal["tokens", "samples", "uniform"] | tuple[float, ...] = option(
        "tokens", "tokens or samples (from each branch.json), uniform, or a list; normalised to sum 1"
    )
    allow_nonfinite: bool = option(False, "write infinities and NaN instead of stopping at the first")
    threads: int = option(2, "worker threads")
    chunk_kib: int = option(512, "bytes each worker reads from each input at a time, in KiB")

    def __post_init__(self) -> None:
        require(self.threads >= 1, "threads", "at least 1", self.threads)
        require(4 <= self.chunk_kib <= 1 << 20, "chunk_kib", "between 4 and 1048576", self.chunk_kib)
        if not isinstance(self.weights, str):
            require(len(self.weights) > 0, "weights", "a list of at least one number", list(self.weights))
            finite = all(abs(weight) < float("inf") for weight in self.weights)
            require(finite, "weights", "finite numbers", list(self.weights))
            require(abs(sum(self.weights)) > 1e-12, "weights", "of a sum other than 0", list(self.weights))
