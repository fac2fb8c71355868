"""The sketch stage: a model and datasets in, one file of sums per dataset out.

A dataset's sums depend only on the model, the options and its rows, not on its name. datasets.json
holds a fingerprint of these (``reuse``): only new datasets cost time. With ``normalize: kfac`` the
sums depend on the rows of all datasets too.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import nn

from merit_fast.data import Dataset
from merit_fast.kernels.sketch import CountSketch
from merit_fast.manifests.sketch_check import merged_checks
from merit_fast.model import freeze_parameters
from merit_fast.model.layered.choose import load_model_for
from merit_fast.progress import Progress, Task
from merit_fast.row_store.identity import StoreIdentity
from merit_fast.row_store.reuse import has_rows, reuse_rows
from merit_fast.row_store.writer import ROWS_FOLDER, RowWriter
from merit_fast.sketch.config import SketchConfig
from merit_fast.sketch.divided.crew import ONE_PROCESS, Crew
from merit_fast.sketch.mixture.dataset import ERROR_RATE, FIRST_LOOK, DatasetSketcher
from merit_fast.sketch.mixture.drawing import DrawnDataset, DrawnMixture, draw_mixture
from merit_fast.sketch.mixture.files import write_states
from merit_fast.sketch.mixture.multipliers import Multipliers, keep_factors, stage_multipliers
from merit_fast.sketch.mixture.reuse import has_states, record_state, reuse_states
from merit_fast.sketch.mixture.sampling import check_blocks, describe_signal
from merit_fast.sketch.mixture.spans import Spans, remove_spans
from merit_fast.sketch.mixture.work import Job, SketchWork, job_at, jobs_of
from merit_fast.sketch.passes.parts import describe_rest
from merit_fast.sketch.selection import select_parameters
from merit_fast.sketch.sketcher import GradientSketcher


def sketch_mixture(  # noqa: PLR0913
    model_path: str,
    model_fingerprint: str,
    datasets: Sequence[Dataset],
    pad_token_id: int,
    config: SketchConfig,
    directory: Path,
    progress: Progress,
    earlier: Sequence[Path] = (),
    freeze: Sequence[str] | None = None,
    factors: Path | None = None,
    only: str | None = None,
    share: tuple[int, int] | None = None,
    crew: Crew = ONE_PROCESS,
) -> None:
    """Sketches every dataset's per-example gradients into one ``NAME.safetensors`` of sums.

    The sums of a part of the model go to ``parts/PART/NAME.safetensors``. The loss of an example is
    the mean over its target tokens. With ``config.weight`` "tokens" (the default) its gradient
    counts as often as it has target tokens. A row that several datasets have lies in the same block
    of all. A file that a killed run finished in ``directory`` is kept if its dataset, the model and
    the options are as they were. A dataset of more than ``config.span`` examples is cut into spans
    of so many, whose sums are added up in their order.

    Args:
        earlier: finished outputs of any mixture and options. Their undamaged files with equal
            fingerprints are reused; they have the bytes that sketching would give.
        freeze: parameters that training leaves as they are, as ``freeze_parameters`` takes them;
            they are not sketched.
        factors: file of the K-FAC factors that ``normalize`` kfac multiplies by; None: those of
            these datasets are collected first.
        only: the one dataset to sketch; the others only decide the blocks of shared rows. None:
            all.
        share: (i, n), with ``only``: sketch every n-th span of that dataset from the i-th on, for a
            later call that gets ``directory`` in ``earlier``; none where it has one span only.
        crew: the processes that all call this, with equal arguments, and share the passes. The
            files have the bytes of one process; the first one writes them.

    Raises:
        InputError: a dataset of one example, or of too few rows that no other dataset has; a part
            that matches nothing, or a parameter in two of them; parameters that select nothing;
            blocks too few for ``precision``.
    """
    mixture = draw_mixture(datasets, model_fingerprint, config, freeze, factors)
    if config.precision:
        check_blocks(config.blocks, FIRST_LOOK, mixture.most_examples, ERROR_RATE)
    work = SketchWork(
        model_path,
        model_fingerprint,
        pad_token_id,
        config,
        directory,
        progress,
        mixture,
        freeze,
        factors,
        () if only is None else tuple(earlier),
        crew,
    )
    if crew.leads:
        directory.mkdir(parents=True, exist_ok=True)
        keep_factors(config, mixture.multipliers, directory, earlier if only is None else ())
    if only is not None:
        mixture = mixture.only(only)
    if share is not None:
        _sketch_share(work, mixture.datasets[0], share, earlier)
        return
    _sketch_datasets(work, _todo(work, mixture, earlier))
    if crew.leads:
        remove_spans(directory)


def collect_factors(  # noqa: PLR0913
    model_path: str,
    model_fingerprint: str,
    datasets: Sequence[Dataset],
    pad_token_id: int,
    config: SketchConfig,
    directory: Path,
    progress: Progress,
    earlier: Sequence[Path] = (),
    freeze: Sequence[str] | None = None,
) -> None:
    """Collects the K-FAC factors of all datasets into ``directory``; arguments as for the sketch.

    Raises:
        InputError: as ``sketch_mixture``.
        MeritFastError: a gradient is not finite.
    """
    mixture = draw_mixture(datasets, model_fingerprint, config, freeze)
    work = SketchWork(
        model_path, model_fingerprint, pad_token_id, config, directory, progress, mixture, freeze
    )
    directory.mkdir(parents=True, exist_ok=True)
    keep_factors(config, mixture.multipliers, directory, earlier)
    model, parameters = _loaded_model(work)
    _multipliers(work, model, parameters)


def _todo(
    work: SketchWork, mixture: DrawnMixture, earlier: Sequence[Path]
) -> list[tuple[DrawnDataset, list[Job]]]:
    """Datasets without known sums, as the first process finds them, and the work on each."""
    todo: list[tuple[DrawnDataset, list[Job]]] = []
    if work.crew.leads:
        missing = _reuse(mixture, work.config, work.directory, work.progress, earlier)
        todo = [(drawn, jobs_of(work, drawn, earlier)) for drawn in missing]
    if work.crew.size == 1:
        return todo
    places = [(drawn.name, [job.place for job in jobs]) for drawn, jobs in todo]
    by_name = {drawn.name: drawn for drawn in mixture.datasets}
    return [
        (by_name[name], [job_at(work, *place) for place in spans])
        for name, spans in work.crew.exchange(places)[0]
    ]


def _reuse(
    mixture: DrawnMixture,
    config: SketchConfig,
    directory: Path,
    progress: Progress,
    earlier: Sequence[Path],
) -> list[DrawnDataset]:
    """Takes over what is known already; returns the datasets that are not."""
    sums = {drawn.name: drawn.sums for drawn in mixture.datasets}
    rows = {drawn.name: drawn.stored for drawn in mixture.datasets if config.store}
    kept, reused = reuse_states(directory, earlier, sums, tuple(config.parts or ()))
    stored = reuse_rows(directory, earlier, rows)
    if config.store:
        kept &= stored
        reused &= stored
    for names, what in (
        (kept, "were finished by a run that was interrupted, their sketches are kept"),
        (reused, "are as before, their sketches are reused"),
    ):
        if names:
            progress.note(f"sketch: {len(names)} of {len(mixture.datasets)} datasets {what}")
    return [drawn for drawn in mixture.datasets if drawn.name not in kept | reused]


def _sketch_datasets(work: SketchWork, todo: Sequence[tuple[DrawnDataset, list[Job]]]) -> None:
    """Sketches datasets, and adds up the spans of each; without any work no model is loaded."""
    num_examples = sum(len(job.drawn.indices) for _, jobs in todo for job in jobs)
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(_passes(work, num_examples)) if num_examples else None
        for drawn, jobs in todo:
            for job in jobs:
                assert opened is not None
                _do(work, job, *opened)
            if drawn.num_spans > 1 and work.crew.leads:
                Spans(drawn, work.directory, work.config).add_up()


def _sketch_share(
    work: SketchWork, drawn: DrawnDataset, share: tuple[int, int], earlier: Sequence[Path]
) -> None:
    """Sketches every n-th span of a dataset from the i-th on, of a share (i, n)."""
    number, count = share
    config = work.config
    numbers = range(number - 1, drawn.num_spans, count)
    is_known = has_states(earlier, drawn.sums, tuple(config.parts or ())) and (
        not config.store or has_rows(earlier, drawn.stored)
    )
    if is_known or drawn.num_spans == 1 or not numbers:
        work.progress.note(f"sketch: {drawn.name}: has no span that share {number} must sketch")
        return
    jobs = jobs_of(work, drawn, earlier, numbers)
    if jobs:
        with _passes(work, sum(len(job.drawn.indices) for job in jobs)) as (passes, task):
            for job in jobs:
                _do(work, job, passes, task)


@contextlib.contextmanager
def _passes(work: SketchWork, num_examples: int) -> Iterator[tuple[DatasetSketcher, Task]]:
    """Loads the model and gives what sketches with it, and the display of so many examples."""
    config = work.config
    model, parameters = _loaded_model(work)
    multipliers = _multipliers(work, model, parameters)
    with (
        GradientSketcher(
            model,
            CountSketch(config.proj_dim, config.seed),
            parameters,
            multipliers.scales,
            multipliers.factors,
            blocks=config.blocks,
            weight=config.weight or "tokens",
            fingerprint=work.model_fingerprint,
            check=config.check,
            uncovered=config.uncovered,
            parts=config.parts,
            notify=work.progress.note,
        ) as sketcher,
        work.progress.task("sketch gradients", num_examples, "examples") as task,
    ):
        if rest := describe_rest(config.parts or {}, parameters):
            work.progress.note(rest)
        yield DatasetSketcher(model, sketcher, work.pad_token_id, config, work.crew), task


def _loaded_model(work: SketchWork) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """The model, and the parameters that are sketched, by name."""
    config = work.config
    if work.crew.load is not None:
        model = work.crew.load()
    else:
        memory = "auto" if config.memory == "divided" else config.memory  # one process only
        memory = "whole" if config.normalize == "adam" else memory
        model = load_model_for(
            work.model_path,
            config.dtype,
            memory,
            lambda line: work.progress.note(f"sketch: {line}"),
        )
    freeze_parameters(model, work.freeze)
    return model, select_parameters(model, config.parameters)


def _multipliers(
    work: SketchWork, model: nn.Module, parameters: Mapping[str, nn.Parameter]
) -> Multipliers:
    return stage_multipliers(
        model,
        parameters,
        work.mixture,
        work.pad_token_id,
        work.config,
        work.directory,
        work.progress,
        work.factors,
        work.with_factors,
    )


def _do(work: SketchWork, job: Job, passes: DatasetSketcher, task: Task) -> None:
    """Sketches examples and writes their rows, sums and record."""
    config = work.config
    store = None
    if config.store and work.crew.leads:
        identity = StoreIdentity.of(passes.sketcher.identity, config.store_dim)
        store = RowWriter(job.folder / ROWS_FOLDER / job.name, identity, job.drawn.stored)
    state, of_parts = passes.sketch(job.drawn, task, store)
    if store is not None:
        store.finish()
    checked = merged_checks(work.crew.exchange(passes.sketcher.checked))
    if not work.crew.leads:
        return
    write_states(job.folder, job.name, state, of_parts)
    record_state(job.folder, job.name, job.drawn.sums, checked, tuple(of_parts))
    if config.precision:
        signal = describe_signal(state, len(job.drawn.indices), first=FIRST_LOOK)
        work.progress.note(f"{job.name}: {signal}")
