"""Tables as formatted strings from the manifests; the page and the terminal show the same ones.

A table is (columns, rows). The first column names the row, the others are right-aligned figures.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import mean, stdev

from merit_fast.manifests.schemas import (
    ArmResult,
    AuditManifest,
    Comparison,
    EvaluateManifest,
    SplitManifest,
    TuneManifest,
)
from merit_fast.report.measured import comparison_of, is_certain

Table = tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]

ABSENT = "–"  # the figure was not measured, or the arm is not trained


@dataclass(frozen=True)
class _Column:
    """One column of the results: a field of ArmResult and its text."""

    heading: str
    measure: str
    show: Callable[[float], str]
    spread: bool = True  # whether its mean over the random controls tells anything


_RESULT_COLUMNS = (
    _Column("loss", "loss", lambda value: f"{value:z.3f}"),
    _Column("exact match %", "exact_match", lambda value: f"{100 * value:z.1f}"),
    _Column("text loss", "text_loss", lambda value: f"{value:z.3f}"),
    _Column("chat NLL", "chat_nll", lambda value: f"{value:z.3f}"),
    _Column("answer length", "answer_length_tokens", lambda value: f"{value:.1f}"),
    _Column("displacement", "displacement", lambda value: f"{value:.2f}"),
    _Column("trained tokens", "num_tokens", lambda n: f"{n:,}" if n else ABSENT, False),
    _Column("train s", "train_s", lambda value: f"{value:,.1f}" if value else ABSENT, False),
    _Column(
        "peak GiB",
        "peak_memory_bytes",
        lambda value: f"{value / 2**30:.2f}" if value else ABSENT,
        False,
    ),
)
_COMPARED = {column.measure: column for column in _RESULT_COLUMNS}


def results_rows(evaluation: EvaluateManifest) -> Table:
    """One row per arm, in the manifest's order, and the spread of several random controls.

    A measure of an arm with several seeds is mean ± standard error.
    """
    columns, rows = _result_table("arm", evaluation.arms)
    controls = [arm for arm in evaluation.arms if re.fullmatch(r"random\d*", arm)]
    if len(controls) < 2:
        return columns, rows
    last = list(evaluation.arms).index(controls[-1]) + 1
    return columns, (*rows[:last], _spread_row(evaluation, controls), *rows[last:])


def _spread_row(evaluation: EvaluateManifest, controls: list[str]) -> tuple[str, ...]:
    """Mean ± standard deviation of each measure between the random controls."""
    cells = [f"random ×{len(controls)} ± sd"]
    for column in _RESULT_COLUMNS:
        values = [float(getattr(evaluation.arms[arm], column.measure)) for arm in controls]
        cells.append(
            f"{column.show(mean(values))} ± {column.show(stdev(values))}"
            if column.spread
            else ABSENT
        )
    return (*cells, *([ABSENT] if _seeds_differ(evaluation.arms) else []))


def comparison_rows(evaluation: EvaluateManifest) -> Table:
    """One row per two arms: first - second on each measure ± error by row ± error by seed.

    A difference within two standard errors is in brackets.
    """
    measures = [key for key in _COMPARED if any(key == c.measure for c in evaluation.comparisons)]
    pairs: dict[frozenset[str], tuple[str, str]] = {}
    for row in evaluation.comparisons:
        pairs.setdefault(frozenset((row.first, row.second)), (row.first, row.second))
    rows = tuple(
        (
            f"{first} − {second}",
            *(_difference(comparison_of(evaluation, first, second, m)) for m in measures),
        )
        for first, second in pairs.values()
    )
    return ("comparison", *(_COMPARED[key].heading for key in measures)), rows


def _difference(row: Comparison | None) -> str:
    if row is None:
        return ABSENT
    show = _COMPARED[row.measure].show
    errors = [
        f" ± {show(error)}" for error in (row.item_error, row.seed_error) if error is not None
    ]
    text = f"{'+' if row.difference > 0 else ''}{show(row.difference)}{''.join(errors)}"
    return text if is_certain(row) else f"({text})"


def branch_rows(evaluation: EvaluateManifest) -> Table:
    """One row per branch, with the columns of ``results_rows`` that are measured for branches."""
    return _result_table("branch", evaluation.branches)


def gain_rows(evaluation: EvaluateManifest) -> Table:
    """One row per merged arm: gain = mean branch loss - merged loss, nats per target token."""
    columns = ("merged arm", "merging gain", "mean branch loss", "merged loss")
    rows = tuple(
        (arm, f"{gain.gain:z.4f}", f"{gain.mean_branch_loss:z.4f}", f"{gain.merged_loss:z.4f}")
        for arm, gain in evaluation.merging_gain.items()
    )
    return columns, rows


def audit_rows(audit: AuditManifest) -> Table:
    """One row per merged arm: its gain, the predicted gain, and the position of the merge."""
    noise = next(iter(audit.arms.values())).noise
    columns = (
        "merged arm",
        "gain",
        "Σ w (gᵀδ + ½ δᵀHδ)",
        "ratio",
        "in one basin",
        "highest barrier",
        "displacement",
        "contraction",
        *(f"noise {share:g}" for share, _ in noise),
    )
    rows = tuple(
        (
            arm,
            f"{result.gain:z.4f}",
            f"{result.predicted_gain:z.4f}",
            f"{result.ratio:.3f}",
            "yes" if result.in_basin else "no",
            f"{max((barrier.height for barrier in result.barriers), default=0.0):z.4f}",
            f"{result.displacement:.2f}",
            f"{result.contraction:.3f}",
            *(f"{rise:+z.4f}" for _, rise in result.noise),
        )
        for arm, result in audit.arms.items()
    )
    return columns, rows


def tuning_rows(tuned: Mapping[str, TuneManifest]) -> Table:
    """One row per number chosen on held-out rows: its value before, as fitted, and as taken."""
    columns = (
        "merged arm",
        "chosen",
        "before",
        "loss before",
        "fitted",
        "loss there",
        "taken",
        "losses tried",
    )
    rows: list[tuple[str, ...]] = []
    for arm, chosen in tuned.items():
        if (by := chosen.weight_search) is not None:
            losses: tuple[float | None, float | None] = (by.start_loss, by.fitted_loss)
            tried = ", ".join(map(_loss, by.losses)) or ABSENT
            rows.append(
                _tuning_row(arm, "weights", by.start, by.fitted, losses, chosen.weights, tried)
            )
        if (along := chosen.scale_search) is not None:
            loss_of = dict(zip(along.scales, along.losses, strict=True))
            at_minimum = None if along.minimum is None else (along.minimum,)
            losses = (loss_of[1.0], loss_of.get(along.minimum or 0.0) if at_minimum else None)
            tried = ", ".join(f"{_loss(loss)} at {scale:g}" for scale, loss in loss_of.items())
            taken = (chosen.scale or 0.0,)
            rows.append(_tuning_row(arm, "scale", (1.0,), at_minimum, losses, taken, tried))
    return columns, tuple(rows)


def _tuning_row(
    arm: str,
    number: str,
    before: tuple[float, ...],
    fitted: tuple[float, ...] | None,
    losses: tuple[float | None, float | None],
    taken: tuple[float, ...],
    tried: str,
) -> tuple[str, ...]:
    def shown(values: tuple[float, ...] | None) -> str:
        return ABSENT if values is None else " ".join(f"{value:.4g}" for value in values)

    return (
        arm,
        number,
        shown(before),
        _loss(losses[0]),
        shown(fitted),
        _loss(losses[1]),
        shown(taken),
        tried,
    )


def _loss(loss: float | None) -> str:
    return ABSENT if loss is None else f"{loss:z.4f}"


def dataset_result_rows(split: SplitManifest, evaluation: EvaluateManifest) -> Table:
    """One row per dataset, with loss and exact match in percent per arm.

    Datasets outside the split come last.
    """
    names = [row.name for row in split.datasets]
    evaluated = {name for arm in evaluation.arms.values() for name in arm.datasets}
    names += sorted(evaluated - set(names))
    columns = ["dataset"]
    for arm in evaluation.arms:
        columns += [f"{arm} loss", f"{arm} exact match %"]
    rows = []
    for name in names:
        row = [name]
        for result in evaluation.arms.values():
            measured = result.datasets.get(name)
            if measured is None:
                row += [ABSENT, ABSENT]
            else:
                row += [f"{measured.loss:z.3f}", f"{100 * measured.exact_match:.1f}"]
        rows.append(tuple(row))
    return tuple(columns), tuple(rows)


def percent(share: float) -> str:
    """Formats 0.1234 as "12.3 %"; a share above 0 never shows as 0."""
    return "< 0.1 %" if 0 < share < 0.0005 else f"{100 * share:z.1f} %"


def _result_table(first_column: str, results: Mapping[str, ArmResult]) -> Table:
    """One row per result; a column that no result has is left out."""
    seeds = _seeds_differ(results)
    shown = [
        column
        for column in _RESULT_COLUMNS
        if not results or any(getattr(r, column.measure) is not None for r in results.values())
    ]
    columns = (first_column, *(column.heading for column in shown))
    rows = tuple(
        (
            name,
            *(_result_cell(result, column) for column in shown),
            *([str(result.num_seeds)] if seeds else []),
        )
        for name, result in results.items()
    )
    return (*columns, "seeds") if seeds else columns, rows


def _seeds_differ(results: Mapping[str, ArmResult]) -> bool:
    return len({result.num_seeds for arm, result in results.items() if arm != "base"}) > 1


def _result_cell(result: ArmResult, column: _Column) -> str:
    value = getattr(result, column.measure)
    if value is None:
        return ABSENT
    text = column.show(value)
    error = result.errors.get(column.measure)
    return text if error is None else f"{text} ± {column.show(error)}"
