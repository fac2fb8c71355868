"""Options of the sketch stage."""

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from merit_fast.errors import InputError
from merit_fast.kernels.average.dtypes import SPELLINGS
from merit_fast.manifests.hashes import checksum
from merit_fast.options.fields import option, require


@dataclass(frozen=True)
class SketchConfig:
    """Options that decide the sketches."""

    examples: int = option(
        200, "calibration examples per dataset (the paper: up to 200; fewer if it has fewer)"
    )
    precision: float = option(
        0.0,
        "stop sketching a dataset once the relative standard error of its signal fraction is this "
        "small; 0: sketch all examples",
    )
    parameters: str = option(
        "all",
        "parameters to sketch: all, blocks (the transformer blocks), or a regex on their names",
    )
    proj_dim: int = option(65536, "width of the CountSketch, a multiple of 4096")
    seed: int = option(
        0, "seed of the sketch's hash, of the choice of examples and of the random control"
    )
    blocks: int = option(8, "blocks of examples per dataset, for standard errors")
    warmup: float = option(
        0.0,
        "share of every dataset's rows for a joint warm-up; sketch and branches start after it "
        "(the paper: 0)",
    )
    batch_size: int = option(
        8, "examples per backward pass (does not change the sketch beyond rounding)"
    )
    dtype: Literal["auto", "bf16", "fp32"] = option(
        "auto",
        "precision of the model's forward and backward pass; auto: bf16 where this machine "
        "multiplies it fast, else fp32",
        spellings=SPELLINGS,
    )
    check: Literal["first", "always", "never"] = option(
        "first",
        "passes whose sketches are compared with autograd: the first of every kind of call, all, "
        "or none (does not change the sketch)",
    )
    uncovered: Literal["autograd", "error"] = option(
        "autograd",
        "parameters that no hook covers: take a backward pass per example, or stop and name them",
    )
    normalize: Literal["adam", "kfac"] | None = option(
        None,
        "multiplies every gradient: adam, by the second moments in split.optimizer; kfac, by the "
        "inverse square root of K-FAC factors of the rows that are sketched [not at all]",
    )
    optimizer: str | None = option(
        None, "with normalize adam: a checkpoint of transformers' Trainer, with optimizer.pt"
    )
    damping: float | None = option(
        None,
        "with normalize kfac: the damping, as a share of each parameter's mean eigenvalue [0.1]",
    )

    def __post_init__(self) -> None:
        require(self.examples >= 2, "examples", "at least 2", self.examples)
        require(0 <= self.precision < 1, "precision", "at least 0 and below 1", self.precision)
        require(
            self.proj_dim >= 4096 and self.proj_dim % 4096 == 0,
            "proj_dim",
            "a multiple of 4096",
            self.proj_dim,
        )
        require(self.blocks >= 2, "blocks", "at least 2", self.blocks)
        require(0 <= self.warmup < 1, "warmup", "at least 0 and below 1", self.warmup)
        require(self.batch_size >= 1, "batch_size", "at least 1", self.batch_size)
        require(
            (self.normalize == "adam") == (self.optimizer is not None),
            "optimizer",
            "a folder with normalize adam, and only then",
            self.optimizer,
        )
        if self.damping is not None:
            rule = "above 0 and finite, with normalize kfac only"
            is_right = self.normalize == "kfac" and 0 < self.damping < math.inf
            require(is_right, "damping", rule, self.damping)

    def optimizer_hash(self) -> str | None:
        """Hash of the optimizer's state; None without one.

        Raises:
            InputError: it is absent.
        """
        if self.optimizer is None:
            return None
        file = Path(self.optimizer) / "optimizer.pt"
        if not file.is_file():
            raise InputError(f"split.optimizer: must hold optimizer.pt, {file} is absent")
        status = file.stat()
        return _hash_of(file, status.st_size, status.st_mtime_ns)


@functools.cache
def _hash_of(file: Path, size: int, changed: int) -> str:
    return checksum(file)
