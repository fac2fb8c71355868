"""Fills the template with tables, sentences and figures. The same input gives the same bytes."""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.io.json import to_json_plotly
from plotly.offline import get_plotlyjs

from merit_fast.manifests.schemas import (
    AuditManifest,
    EvaluateManifest,
    SplitManifest,
    TuneManifest,
)
from merit_fast.report import figures, split_figures, split_tables, style, tables
from merit_fast.report.downloads import branch_steps, data_files, json_text
from merit_fast.report.reasons import COSINE_NOTE, exceeds_one, shown_cosine
from merit_fast.report.split_tables import group_name
from merit_fast.report.summary import method_sentence, part_rows, verdict

TEMPLATE = "page.html.j2"
_LISTED_PAIRS = 10  # at each end


def render_page(
    split: SplitManifest,
    evaluation: EvaluateManifest | None,
    data: dict[str, Any],
    notes: Sequence[str],
    audit: AuditManifest | None = None,
    tuned: Mapping[str, TuneManifest] | None = None,
) -> str:
    """Returns the whole page.

    Args:
        split: the split and its figures.
        evaluation: None for a page before training.
        data: the content of report.json, which the page embeds and draws from.
        notes: lines for "How this was made".
        audit: None if the merges were not audited.
        tuned: merged arm -> the numbers that held-out rows chose for it.
    """
    steps = branch_steps(split, evaluation)
    drawn = _figures(split, steps)
    said = {data["advice"]["sentence"], *data["advice"]["reasons"]}
    environment = Environment(
        loader=PackageLoader("merit_fast.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(TEMPLATE).render(
        title=data["title"],
        notes=list(notes),
        split=split,
        summary=_summary(split, evaluation),
        advice=data["advice"],
        measured=data["measured"],
        verdict=[text for text in verdict(split, steps) if text not in said],
        control_note=data["split"]["control_note"],
        groups=split_tables.group_rows(split, steps),
        group_colors=[style.group_color(group) for group in range(split.groups)],
        members=[
            (group_name(g), style.group_color(g), names)
            for g, names in split_tables.group_members(split).items()
        ],
        separations=split_tables.separation_rows(split),
        tried=split_tables.tried_rows(split) if split.numbers_tried else None,
        datasets=split_tables.split_rows(split),
        pairs=_pairs(split),
        parts=part_rows(split),
        known_pairs=len(split.known_pairs),
        within=split_tables.signed(split.within_cosine),
        across=split_tables.signed(split.across_cosine),
        cosine_note=COSINE_NOTE if exceeds_one(split) else "",
        unresolved=any(cosine is None for row in split.similarity for cosine in row),
        evaluation=None if evaluation is None else _evaluation(split, evaluation),
        audit=None if audit is None else tables.audit_rows(audit),
        tuned=tables.tuning_rows(tuned) if tuned else None,
        choosing_rows=max((arm.num_examples for arm in (tuned or {}).values()), default=0),
        specs={name: _json(figure) for name, figure in drawn.items()},
        # a square, its row labels and its colour bar
        conflict_width=drawn["conflicts"].layout.height + 200,
        data=Markup(json_text(data)),
        files=list(data_files(data)),
        themes=_json(style.THEMES),
        plotly_js=Markup(get_plotlyjs()),
    )


def _figures(split: SplitManifest, steps: list[int] | None) -> dict[str, Any]:
    """The figures by name in the page's order; separations only if some were measured."""
    drawn = {
        "conflicts": figures.conflict_map(split),
        **{f"part-{part}": figures.conflict_map(split, part) for part in split.parts},
        "axes": figures.axes_map(split),
        "tree": split_figures.dendrogram(split),
        "separations": split_figures.separation_map(split),
        "balance": split_figures.balance_map(split, steps),
        "datasets": split_figures.dataset_map(split),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _pairs(split: SplitManifest) -> list[tuple[str, str, str, str]]:
    """(name, name, groups, cosine) of the pairs with the lowest and the highest cosines.

    The lowest comes first; a few datasets show every pair.
    """
    pairs = sorted(split.known_pairs, key=lambda pair: (pair[2], pair[:2]))
    if len(pairs) > 2 * _LISTED_PAIRS:
        pairs = [*pairs[:_LISTED_PAIRS], *pairs[-_LISTED_PAIRS:]]
    return [
        (
            split.datasets[i].name,
            split.datasets[j].name,
            ", ".join(split_tables.short_group(split.datasets[k].group) for k in (i, j)),
            shown_cosine(cosine, split.similarity_errors[i][j]),
        )
        for i, j, cosine in pairs
    ]


def _evaluation(split: SplitManifest, evaluation: EvaluateManifest) -> dict[str, Any]:
    results = tables.results_rows(evaluation)
    return {
        "arms": list(evaluation.arms),
        "results": results,
        "branches": tables.branch_rows(evaluation),
        "gains": tables.gain_rows(evaluation),
        "comparisons": tables.comparison_rows(evaluation),
        "spread": len(results[1]) > len(evaluation.arms),
        "seeds": max(result.num_seeds for result in evaluation.arms.values()),
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
