"""Puts tables, sentences and figures into the template. No clock, no random ids: same input, same bytes."""

from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.io.json import to_json_plotly
from plotly.offline import get_plotlyjs

from merit_fast.errors import InputError
from merit_fast.manifest import EvaluateManifest, SplitManifest
from merit_fast.report import figures, tables
from merit_fast.report.summary import verdict

TEMPLATE = "page.html.j2"


def render(split: SplitManifest, evaluation: EvaluateManifest | None, title: str, notes: Sequence[str]) -> str:
    """The whole page.

    Raises:
        InputError: a field of ``split`` has the wrong length.
    """
    _check_lengths(split)
    conflict_map = figures.conflict_map(split)
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
        groups=tables.group_rows(split),
        members=tables.group_members(split),
        shares=_shares(split),
        group_colors=figures.GROUP_COLORS,
        datasets=tables.split_rows(split),
        evaluation=None if evaluation is None else _evaluation(split, evaluation),
        conflicts=_json(conflict_map),
        conflict_width=conflict_map.layout.height + 200,  # a square, its row labels and its colour bar
        axes=_json(figures.axes_map(split)),
        themes=_json(figures.THEMES),
        plotly_js=Markup(get_plotlyjs()),
    )


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
    axes = len(split.explained_variance)
    text = (
        f"{len(split.datasets)} datasets ({examples:,} examples, {tokens:,} target tokens) were split into "
        f"{split.groups} groups along {axes} conflict {'axis' if axes == 1 else 'axes'} of their gradients"
    )
    if evaluation is None:
        return f"{text}; nothing was evaluated."
    models = len(evaluation.arms)
    return f"{text}; {models} {'model was' if models == 1 else 'models were'} evaluated on held-out rows."


def _shares(split: SplitManifest) -> list[tuple[int, str]]:
    """(group, CSS width in percent) of each group's part of the target tokens."""
    total = sum(row.num_target_tokens for row in split.datasets) or 1
    tokens = [sum(r.num_target_tokens for r in split.datasets if r.group == g) for g in range(split.groups)]
    return [(group, f"{100 * count / total:.3f}") for group, count in enumerate(tokens)]


def _json(data: Any) -> Markup:
    """JSON for a script element; this engine writes <, > and / as escapes, so that no name can close it."""
    return Markup(to_json_plotly(data, engine="json"))


def _check_lengths(split: SplitManifest) -> None:
    number, axes = len(split.datasets), len(split.explained_variance)
    for key, rows, width in (
        ("similarity", split.similarity, number),
        ("similarity_errors", split.similarity_errors, number),
        ("scores", split.scores, axes),
    ):
        widths = {len(row) for row in rows}
        if len(rows) != number or widths != {width}:
            raise InputError(
                f"split.json: {key}: must be [{number}, {width}], got {len(rows)} rows of {sorted(widths)}"
            )
    if len(split.random_groups) != number:
        raise InputError(f"split.json: random_groups: must have length {number}, got {len(split.random_groups)}")
    if axes < 1:
        raise InputError("split.json: explained_variance: must have at least one axis, got none")
    for row in split.datasets:
        if not 0 <= row.group < split.groups:
            raise InputError(f"split.json: {row.name}: group must be below {split.groups}, got {row.group}")
