"""What the sketch stage multiplies gradients by: Adam's second moments, or K-FAC's factors.

factors.kfac, in the stage's output, holds the factors, and factors.json the fingerprint of what
they depend on and the file's hash: a run that was killed after them takes them over.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from merit_fast.manifests.atomic import link_file, replace_file, write_text
from merit_fast.manifests.hashes import checksum
from merit_fast.manifests.stages import FACTORS_FILE
from merit_fast.progress import Progress
from merit_fast.sketch.collector import MAX_SIDE, FactorCollector
from merit_fast.sketch.config import SketchConfig
from merit_fast.sketch.mixture.dataset import DatasetSketcher
from merit_fast.sketch.mixture.drawing import DrawnMixture
from merit_fast.sketch.precondition import KfacFactors, adam_scales_of_checkpoint
from merit_fast.sketch.precondition.factors import DAMPING

_RECORD = "factors.json"


@dataclass(frozen=True)
class Multipliers:
    """Arguments of ``GradientSketcher``; at most one of the two.

    Attributes:
        scales: of Adam; None: no such.
        factors: of K-FAC; None: no such.
    """

    scales: Mapping[str, Tensor] | None = None
    factors: KfacFactors | None = None


def stage_multipliers(  # noqa: PLR0913
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    mixture: DrawnMixture,
    pad_token_id: int,
    config: SketchConfig,
    directory: Path,
    progress: Progress,
    known: Path | None = None,
    earlier: Sequence[Path] = (),
) -> Multipliers:
    """The multipliers that ``config.normalize`` asks for.

    Args:
        parameters: to sketch, by name.
        mixture: every dataset and its examples.
        directory: the stage's output, for the factors.
        known: file of K-FAC's factors, if they are not to be collected.
        earlier: outputs whose factors are read where they are, if they are those of this mixture.

    Raises:
        InputError: the optimizer's state cannot be read.
        MeritFastError: it lacks a parameter, or a gradient is not finite.
    """
    if config.normalize == "adam":
        assert config.optimizer is not None
        return Multipliers(adam_scales_of_checkpoint(model, config.optimizer, parameters))
    if config.normalize is None:
        return Multipliers()
    if known is not None:
        return Multipliers(factors=KfacFactors.load(known))
    damping = config.damping or DAMPING
    source = mixture.multipliers
    there = next((folder for folder in earlier if _is_intact(folder, source)), None)
    if there is not None:
        factors = KfacFactors.load(there / FACTORS_FILE)
        is_same = factors.damping == damping
        return Multipliers(factors=factors if is_same else factors.with_damping(damping))
    if not _is_intact(directory, source):
        factors = _collect(model, parameters, mixture, pad_token_id, config, progress)
        _write(factors, source, directory)
        progress.note(f"sketch: {_described(factors)}")
    factors = KfacFactors.load(directory / FACTORS_FILE)
    if factors.damping != damping:  # taken over from a run with another damping
        factors = factors.with_damping(damping)
        _write(factors, source, directory)
    return Multipliers(factors=factors)


def keep_factors(
    config: SketchConfig, source: str | None, directory: Path, earlier: Sequence[Path]
) -> None:
    """Leaves in ``directory`` the factors that this run needs, if they are known, and no others.

    Args:
        source: fingerprint of what they depend on.
        earlier: earlier outputs of any options.
    """
    file = directory / FACTORS_FILE
    if config.normalize == "kfac" and _is_intact(directory, source):
        return
    for name in (_RECORD, FACTORS_FILE):
        (directory / name).unlink(missing_ok=True)
    if config.normalize != "kfac":
        return
    known = next((folder for folder in earlier if _is_intact(folder, source)), None)
    if known is not None:
        link_file(known / FACTORS_FILE, file)  # may be as large as the model
        link_file(known / _RECORD, directory / _RECORD)


def _is_intact(directory: Path, source: str | None) -> bool:
    """Whether a folder holds undamaged factors of this fingerprint."""
    return _record_of(directory) == {"fingerprint": source, "xxh3_128": _hash_of(directory)}


def _collect(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    mixture: DrawnMixture,
    pad_token_id: int,
    config: SketchConfig,
    progress: Progress,
) -> KfacFactors:
    total = sum(len(drawn.indices) for drawn in mixture.datasets)
    collector = FactorCollector.of(
        model, parameters, MAX_SIDE, config.check, config.uncovered, progress.note
    )
    with collector, progress.task("collect K-FAC factors", total, "examples") as task:
        passes = DatasetSketcher(model, collector.sketcher, pad_token_id, config)
        for drawn in mixture.datasets:
            passes.collect(drawn, collector.update, task)
    return collector.factors(config.damping or DAMPING)


def _write(factors: KfacFactors, source: str | None, directory: Path) -> None:
    file = directory / FACTORS_FILE
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    factors.save(temporary)
    replace_file(temporary, file)
    record = {"fingerprint": source, "xxh3_128": _hash_of(directory)}
    write_text(directory / _RECORD, json.dumps(record, indent=1, sort_keys=True) + "\n")


def _described(factors: KfacFactors) -> str:
    line = (
        f"K-FAC factors of {factors.examples} examples for {len(factors.rows)} matrices "
        f"({factors.num_bytes / 2**20:.0f} MiB); {len(factors.diagonals)} parameters have the "
        "mean square of each entry instead"
    )
    if not factors.unseen:
        return line
    return f"{line}; {len(factors.unseen)} have no gradient, such as {factors.unseen[0]}"


def _record_of(directory: Path) -> object:
    try:
        record: object = json.loads((directory / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # a killed run got no factors yet: collect them
    return record


def _hash_of(directory: Path) -> str | None:
    file = directory / FACTORS_FILE
    return checksum(file) if file.is_file() else None
