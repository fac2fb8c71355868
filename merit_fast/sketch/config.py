"""Options of the sketch stage."""

import functools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

from merit_fast.errors import InputError, show
from merit_fast.kernels.average.dtypes import SPELLINGS
from merit_fast.manifests.hashes import checksum
from merit_fast.options.fields import option, require
from merit_fast.records import record, replace


@record
class SketchConfig:
    """Options that decide the sketches."""

    examples: int | Literal["all"] = option(
        200,
        "calibration examples per dataset (the paper: up to 200; fewer if it has fewer), or all",
    )
    precision: float = option(
        0.0,
        "stop sketching a dataset once the relative standard error of its signal fraction is this "
        "small; 0: sketch all examples",
    )
    weight: Literal["tokens", "examples"] | None = option(
        None,
        "what a row's gradient of its token mean counts: its target tokens, as in training, or 1 "
        "[preset: tokens]",
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

    memory: Literal["auto", "whole", "layers", "divided"] = option(
        "auto",
        "whole: the model in memory; layers: one layer at a time, read from its files in every "
        "pass; divided: among the processes of torchrun (FSDP2); auto: layers if the model does "
        "not fit (does not change the sketch)",
        omit_default=True,
    )
    span: int = option(
        2048,
        "examples whose gradients are summed before the sums are added up, in order: a dataset of "
        "more can be sketched by several machines (changes the last bits of its sums)",
        omit_default=True,
    )
    parts: dict[str, str] | None = option(
        None,
        "parts of the model whose conflicts are measured too, each a regex on parameter names; "
        "what is in none counts in the whole only",
        form="{NAME: REGEX}",
        omit_default=True,
    )
    store: bool = option(
        False,
        "keep the sketch of every example, for select, duplicates and open_rows (does not change "
        "the sketch)",
        omit_default=True,
    )
    store_dim: int = option(
        8192,
        "width of the kept sketches, a multiple of 4096 from 4096 to 65536, at most proj_dim; a "
        "row takes 2 bytes for each",
        omit_default=True,
    )

    def __post_init__(self) -> None:
        require(self.parts != {}, "parts", "at least one part, or absent", self.parts)
        check_parts(self.parts or {})
        enough = self.examples == "all" or self.examples >= 2
        require(enough, "examples", "at least 2, or all", self.examples)
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
        require(self.span >= 1, "span", "at least 1", self.span)
        width = self.store_dim
        is_width = 4096 <= width <= 65536 and width % 4096 == 0
        require(is_width, "store_dim", "a multiple of 4096 from 4096 to 65536", width)
        fits = not self.store or width <= self.proj_dim
        require(fits, "store_dim", f"at most proj_dim ({self.proj_dim})", width)
        require(
            (self.normalize == "adam") == (self.optimizer is not None),
            "optimizer",
            "a folder with normalize adam, and only then",
            self.optimizer,
        )
        is_held = self.normalize == "adam" and self.memory in ("layers", "divided")
        rule = "auto or whole with normalize adam, whose second moments are all in memory"
        require(not is_held, "memory", rule, self.memory)
        if self.damping is not None:
            rule = "above 0 and finite, with normalize kfac only"
            is_right = self.normalize == "kfac" and 0 < self.damping < math.inf
            require(is_right, "damping", rule, self.damping)

    def without_store(self) -> Self:
        """The options that decide the sums: without stored rows."""
        return replace(self, store=False, store_dim=type(self).store_dim)

    def num_spans(self, num_examples: int) -> int:
        """Number of spans of a dataset from which so many examples are drawn.

        With ``precision`` it is 1: the sums so far decide how many examples are sketched.
        """
        drawn = num_examples if self.examples == "all" else min(self.examples, num_examples)
        return 1 if self.precision else max(1, -(-drawn // self.span))

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


def check_parts(parts: Mapping[str, str]) -> None:
    """Checks the names of parts, which become folders, and their regular expressions.

    Raises:
        InputError: a rule is broken.
    """
    for part, pattern in parts.items():
        is_name = re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", part) is not None
        rule = "file names of letters, digits, '.', '_' and '-', none with '.' first"
        require(is_name, "parts", rule, part)
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(
                f"parts.{part}: must be a regular expression, got {show(pattern)} ({error})"
            ) from None
    lowered = [part.lower() for part in parts]
    same = next((part for part in parts if lowered.count(part.lower()) > 1), None)
    require(same is None, "parts", "names that differ by more than their case", same)


@functools.cache
def _hash_of(file: Path, size: int, changed: int) -> str:
    return checksum(file)
