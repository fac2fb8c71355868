"""The work of the sketch stage: datasets, or spans of large ones, that are summed in one go."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from merit_fast.progress import Progress
from merit_fast.sketch.config import SketchConfig
from merit_fast.sketch.divided.crew import ONE_PROCESS, Crew
from merit_fast.sketch.mixture.drawing import DrawnDataset, DrawnMixture
from merit_fast.sketch.mixture.spans import Spans


@dataclass(frozen=True)
class SketchWork:
    """The arguments of ``sketch_mixture`` that every dataset shares; ``mixture`` is the whole."""

    model_path: str
    model_fingerprint: str
    pad_token_id: int
    config: SketchConfig
    directory: Path
    progress: Progress
    mixture: DrawnMixture
    freeze: Sequence[str] | None
    factors: Path | None = None
    with_factors: Sequence[Path] = ()  # outputs that may hold the factors, which stay there
    crew: Crew = ONE_PROCESS


@dataclass(frozen=True)
class Job:
    """Examples that are summed in one go, and folder and name of their files.

    Attributes:
        place: name of the dataset, and number of its span, or None.
    """

    drawn: DrawnDataset
    folder: Path
    name: str
    place: tuple[str, int | None]


def jobs_of(
    work: SketchWork,
    drawn: DrawnDataset,
    earlier: Sequence[Path],
    chosen: Collection[int] | None = None,
) -> list[Job]:
    """The work on one dataset: itself, or its ``chosen`` spans that are not known (None: all)."""
    if drawn.num_spans == 1:
        return [job_at(work, drawn.name, None)]
    spans = Spans(drawn, work.directory, work.config)
    known = spans.reuse(earlier)
    if known:
        count = f"{len(known)} of {drawn.num_spans}"
        work.progress.note(f"sketch: {drawn.name}: {count} spans are there already")
    numbers = range(drawn.num_spans) if chosen is None else sorted(chosen)
    return [job_at(work, drawn.name, number) for number in numbers if number not in known]


def job_at(work: SketchWork, name: str, span: int | None) -> Job:
    """The work on a dataset, or on one span of it."""
    drawn = next(drawn for drawn in work.mixture.datasets if drawn.name == name)
    if span is None:
        return Job(drawn, work.directory, name, (name, span))
    return Job(*Spans(drawn, work.directory, work.config).place(span), (name, span))
