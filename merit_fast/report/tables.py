"""Tables as formatted strings from the manifests; the page and the terminal show the same ones.

A table is (columns, rows). The first column names the row, the others are right-aligned figures.
"""

from collections.abc import Callable, Mapping

from merit_fast.manifests.schemas import (
    ArmResult,
    AuditManifest,
    EvaluateManifest,
    SplitManifest,
    TuneManifest,
)

Table = tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]

ABSENT = "–"  # the figure was not measured, or the arm is not trained

_RESULT_COLUMNS: tuple[tuple[str, Callable[[ArmResult], str]], ...] = (
    ("loss", lambda result: f"{result.loss:z.3f}"),
    ("exact match %", lambda result: f"{100 * result.exact_match:.1f}"),
    ("text loss", lambda result: f"{result.text_loss:z.3f}"),
    ("chat NLL", lambda result: f"{result.chat_nll:z.3f}"),
    ("answer length", lambda result: f"{result.answer_length_tokens:.1f}"),
    ("displacement", lambda result: f"{result.displacement:.2f}"),
    ("trained tokens", lambda result: f"{result.num_tokens:,}" if result.num_tokens else ABSENT),
    ("train s", lambda result: f"{result.train_s:,.1f}" if result.train_s else ABSENT),
    (
        "peak GiB",
        lambda result: (
            f"{result.peak_memory_bytes / 2**30:.2f}" if result.peak_memory_bytes else ABSENT
        ),
    ),
)


def results_rows(evaluation: EvaluateManifest) -> Table:
    """One row per arm, in the manifest's order."""
    return _result_table("arm", evaluation.arms)


def branch_rows(evaluation: EvaluateManifest) -> Table:
    """One row per branch, with the columns of ``results_rows``."""
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
    columns = (first_column, *(heading for heading, _ in _RESULT_COLUMNS))
    rows = tuple(
        (name, *(show(result) for _, show in _RESULT_COLUMNS)) for name, result in results.items()
    )
    return columns, rows
