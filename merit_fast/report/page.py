"""Fills the template with tables, sentences and figures. The same input gives the same bytes."""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.io.json import to_json_plotly
from plotly.offline import get_plotlyjs

from merit_fast.errors import InputError
from merit_fast.manifests.schemas import (
    AuditManifest,
    EvaluateManifest,
    SplitManifest,
    TuneManifest,
)
from merit_fast.report import figures, split_figures, split_tables, style, tables
from merit_fast.report.split_tables import group_name
from merit_fast.report.summary import method_sentence, verdict

TEMPLATE = "page.html.j2"


def render_page(
    split: SplitManifest,
    evaluation: EvaluateManifest | None,
    title: str,
    notes: Sequence[str],
    audit: AuditManifest | None = None,
    tuned: Mapping[str, TuneManifest] | None = None,
) -> str:
    """Returns the whole page.

    Raises:
        InputError: a field of ``split`` has the wrong length.
    """
    _check_lengths(split)
    steps = _branch_steps(split, evaluation)
    drawn = _figures(split, steps)
    environment = Environment(
        loader=PackageLoader("merit_fast.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(TEMPLATE).render(
        title=title,
        notes=list(notes),
        split=split,
        summary=_summary(split, evaluation),
        verdict=verdict(split),
        groups=split_tables.group_rows(split, steps),
        group_colors=[style.group_color(group) for group in range(split.groups)],
        members=[
            (group_name(g), style.group_color(g), names)
            for g, names in split_tables.group_members(split).items()
        ],
        separations=split_tables.separation_rows(split),
        datasets=split_tables.split_rows(split),
        unresolved=any(cosine is None for row in split.similarity for cosine in row),
        evaluation=None if evaluation is None else _evaluation(split, evaluation),
        audit=None if audit is None else tables.audit_rows(audit),
        tuned=tables.tuning_rows(tuned) if tuned else None,
        choosing_rows=max((arm.num_examples for arm in (tuned or {}).values()), default=0),
        specs={name: _json(figure) for name, figure in drawn.items()},
        # a square, its row labels and its colour bar
        conflict_width=drawn["conflicts"].layout.height + 200,
        themes=_json(style.THEMES),
        plotly_js=Markup(get_plotlyjs()),
    )


def _figures(split: SplitManifest, steps: list[int] | None) -> dict[str, Any]:
    """The figures by name in the page's order; separations only if some were measured."""
    drawn = {
        "conflicts": figures.conflict_map(split),
        "axes": figures.axes_map(split),
        "tree": split_figures.dendrogram(split),
        "separations": split_figures.separation_map(split),
        "balance": split_figures.balance_map(split, steps),
        "datasets": split_figures.dataset_map(split),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _branch_steps(split: SplitManifest, evaluation: EvaluateManifest | None) -> list[int] | None:
    """Optimizer steps [K] of each group's branch; None before all are trained."""
    branches = {} if evaluation is None else evaluation.branches
    steps = [
        branches[name].steps for k in range(split.groups) if (name := f"merit-{k}") in branches
    ]
    return steps if len(steps) == split.groups and all(steps) else None


def _evaluation(split: SplitManifest, evaluation: EvaluateManifest) -> dict[str, Any]:
    return {
        "arms": list(evaluation.arms),
        "results": tables.results_rows(evaluation),
        "branches": tables.branch_rows(evaluation),
        "gains": tables.gain_rows(evaluation),
        "datasets": tables.dataset_result_rows(split, evaluation),
    }


def _summary(split: SplitManifest, evaluation: EvaluateManifest | None) -> str:
    examples = sum(row.num_examples for row in split.datasets)
    tokens = sum(row.num_target_tokens for row in split.datasets)
    text = f"{method_sentence(split)}; {examples:,} examples, {tokens:,} target tokens"
    if evaluation is None:
        return f"{text}; nothing was evaluated."
    count = len(evaluation.arms)
    models = "1 model was" if count == 1 else f"{count} models were"
    return f"{text}; {models} evaluated on held-out rows."


def _json(data: Any) -> Markup:
    """JSON for a script element; plotly escapes <, > and /, so that no name can close it."""
    return Markup(to_json_plotly(data, engine="json"))


def _check_lengths(split: SplitManifest) -> None:
    number = len(split.datasets)
    axes = len(split.explained_variance)
    for key, rows, width in (
        ("similarity", split.similarity, number),
        ("similarity_errors", split.similarity_errors, number),
        ("scores", split.scores, axes),
        ("score_errors", split.score_errors, axes),
    ):
        widths = {len(row) for row in rows}
        if len(rows) != number or widths != {width}:
            raise InputError(
                f"split.json: {key}: must be [{number}, {width}], "
                f"got {len(rows)} rows of {sorted(widths)}"
            )
    for control in split.controls:
        if len(control) != number:
            raise InputError(f"split.json: controls: must have length {number}, got {len(control)}")
    if axes < 2:
        raise InputError(f"split.json: explained_variance: must have at least two axes, got {axes}")
    for row in split.datasets:
        if not -1 <= row.group < split.groups:
            raise InputError(
                f"split.json: {row.name}: group must be -1 or below {split.groups}, got {row.group}"
            )
