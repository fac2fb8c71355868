"""The figures that show how reliable a split is: tree, eta squared, balance, signal, stability."""

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from merit_fast.manifests.schemas import SplitManifest
from merit_fast.report.linkage import Join, dataset_tree, group_order, leaf_order
from merit_fast.report.split_tables import group_totals
from merit_fast.report.style import (
    GROUP_COLORS,
    HOVER,
    LEGEND,
    NEUTRAL,
    ROW,
    group_color,
    group_symbol,
)


def dendrogram(split: SplitManifest) -> go.Figure:
    """Average linkage of the datasets on max(0, 1 - cosine); an unresolved cosine counts as 0."""
    joins = dataset_tree(split)
    order = leaf_order(joins)
    x, y, joints = _tree(joins, order)
    figure = go.Figure()
    figure.add_scatter(
        x=x, y=y, mode="lines", line={"width": 1.5, "color": NEUTRAL}, hoverinfo="skip"
    )
    figure.add_scatter(
        x=[join.height for join in joins],
        y=joints,
        customdata=[[join.size] for join in joins],
        mode="markers",
        marker={"size": 6, "color": NEUTRAL},
        hovertemplate=(
            "%{customdata[0]} datasets<br>mean distance of the two sides %{x:.3f}<extra></extra>"
        ),
    )
    figure.add_scatter(
        x=[0.0] * len(order),
        y=list(range(len(order))),
        meta={"datasets": order},
        mode="markers",
        marker=_marks(split, order),
        cliponaxis=False,
        hovertemplate=HOVER,
    )
    _lay_out_rows(figure, order)
    figure.update_layout(showlegend=False)
    figure.update_xaxes(
        side="top", title={"text": "1 − cosine, mean over pairs", "standoff": 4}, zeroline=False
    )
    figure.update_yaxes(showgrid=False)
    return figure


def separation_map(split: SplitManifest) -> go.Figure | None:
    """Eta squared against K, with mean and two standard deviations of its null.

    Returns None if no K was measured.
    """
    rows = split.separations
    if not rows:
        return None
    tried = [str(row.groups) for row in rows]
    figure = go.Figure()
    figure.add_scatter(
        name="random groups, ± 2 standard deviations",
        x=tried,
        y=[row.null_mean for row in rows],
        error_y={
            "type": "data",
            "array": [None if row.null_std is None else 2 * row.null_std for row in rows],
        },
        customdata=[[row.null_mean, row.null_std] for row in rows],
        hovertemplate=(
            "%{x} random groups<br>η² %{y:.4f}, "
            "standard deviation %{customdata[1]:.4f}<extra></extra>"
        ),
        mode="lines+markers",
        line={"color": NEUTRAL, "dash": "dot"},
        marker={"symbol": "square", "size": 8},
    )
    measures = (
        ("cross-validated", [row.cross_validated for row in rows], GROUP_COLORS[0], "circle"),
        ("debiased", [row.eta_squared for row in rows], GROUP_COLORS[1], "diamond"),
    )
    for name, values, color, symbol in measures:
        figure.add_scatter(
            name=f"the split, {name}",
            x=tried,
            y=values,
            mode="lines+markers",
            line={"color": color},
            marker={"symbol": symbol, "size": 10},
            hovertemplate=f"%{{x}} groups<br>η² {name} %{{y:.4f}}<extra></extra>",
        )
    if str(split.groups) in tried:
        figure.add_vline(x=tried.index(str(split.groups)), line={"dash": "dash"}, layer="below")
    _plain_layout(figure, 380)
    figure.update_xaxes(
        type="category", title={"text": "number of groups"}, range=[-0.5, len(tried) - 0.5]
    )
    figure.update_yaxes(title={"text": "η²"}, rangemode="tozero")
    return figure


def balance_map(split: SplitManifest, steps: Sequence[int] | None = None) -> go.Figure:
    """Bars per group: its share of the target tokens, the examples and, if known, the steps."""
    names = [str(group) for group in range(split.groups)]
    totals = group_totals(split)
    measures: list[tuple[str, Sequence[float], str]] = [
        ("target tokens", [tokens for _, tokens in totals], ""),
        ("examples", [examples for examples, _ in totals], "/"),
    ]
    if steps:
        measures.append(("optimizer steps", steps, "x"))
    figure = go.Figure()
    for unit, amounts, pattern in measures:
        total = sum(amounts) or 1
        figure.add_bar(
            name=unit,
            x=names,
            y=[100 * amount / total for amount in amounts],
            customdata=[[round(amount)] for amount in amounts],
            marker={
                "color": [group_color(group) for group in range(split.groups)],
                "pattern": {"shape": pattern},
            },
            hovertemplate=(
                f"group %{{x}}<br>%{{customdata[0]:,}} {unit}<br>%{{y:.2f}} %<extra></extra>"
            ),
        )
    figure.add_hline(y=100 / split.groups, line={"dash": "dash"})
    _plain_layout(figure, 340)
    figure.update_layout(barmode="group", bargap=0.3)
    figure.update_xaxes(type="category", title={"text": "group"})
    figure.update_yaxes(title={"text": "share, %"}, rangemode="tozero")
    return figure


def dataset_map(split: SplitManifest) -> go.Figure:
    """One line per dataset, in the order of ``group_order``: signal, stability, margin."""
    order = group_order(split)
    rows = [split.datasets[i] for i in order]
    panels: list[tuple[str, list[float], list[float | None] | None]] = [
        ("signal", [row.signal_fraction for row in rows], [row.signal_error for row in rows]),
        ("stability", [row.stability for row in rows], None),
        ("margin", [row.margin for row in rows], None),
    ]
    figure = go.Figure()
    for column, (title, values, errors) in enumerate(panels):
        axis = "x" if column == 0 else f"x{column + 1}"
        figure.add_scatter(
            x=values,
            y=list(range(len(order))),
            xaxis=axis,
            meta={"datasets": order},
            mode="markers",
            marker=_marks(split, order),
            error_x=None
            if errors is None
            else {"type": "data", "array": errors, "color": NEUTRAL, "width": 3},
            hovertemplate=HOVER,
        )
        figure.update_layout(
            {
                f"{axis[0]}axis{axis[1:]}": {
                    "side": "top",
                    "anchor": "y",
                    "title": {"text": title, "standoff": 4},
                    "domain": [0.35 * column, 0.35 * column + 0.3],
                    "nticks": 4,
                    "tickangle": 0,
                }
            }
        )
    _lay_out_rows(figure, order)
    figure.update_layout(showlegend=False)
    return figure


def _tree(
    joins: Sequence[Join], order: Sequence[int]
) -> tuple[list[float | None], list[float | None], list[float]]:
    """The lines of a dendrogram (x along the distance, y along the rows) and the y of each join."""
    number = len(order)
    row_of = [0.0] * (number + len(joins))
    for row, leaf in enumerate(order):
        row_of[leaf] = float(row)
    height = [0.0] * number + [join.height for join in joins]
    x: list[float | None] = []
    y: list[float | None] = []
    for step, join in enumerate(joins):
        a = join.first
        b = join.second
        row_of[number + step] = (row_of[a] + row_of[b]) / 2
        x += [height[a], join.height, join.height, height[b], None]
        y += [row_of[a], row_of[a], row_of[b], row_of[b], None]
    return x, y, row_of[number:]


def _marks(split: SplitManifest, order: Sequence[int]) -> dict[str, Any]:
    groups = [split.datasets[i].group for i in order]
    return {
        "size": 8,
        "color": [group_color(g) for g in groups],
        "symbol": [group_symbol(g) for g in groups],
    }


def _lay_out_rows(figure: go.Figure, order: Sequence[int]) -> None:
    """Gives each dataset one line from the top down; the figure grows with their number.

    The page's script names the lines by ``layout.meta.rows``, shortened to the figure's width.
    """
    figure.update_layout(
        template="none",
        height=110 + ROW * len(order),
        margin={"l": 10, "r": 20, "t": 90, "b": 10},
        meta={"rows": list(order)},
    )
    figure.update_yaxes(
        tickvals=list(range(len(order))),
        tickfont={"size": 11},
        range=[len(order) - 0.5, -0.5],
        automargin=True,
        zeroline=False,
        ticks="",
    )


def _plain_layout(figure: go.Figure, height: int) -> None:
    figure.update_layout(
        template="none", height=height, margin={"l": 10, "r": 10, "t": 40, "b": 10}, legend=LEGEND
    )
    figure.update_xaxes(automargin=True)
    figure.update_yaxes(automargin=True)
