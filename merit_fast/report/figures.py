"""The two maps of the conflict geometry: cosines of all pairs, datasets on the conflict axes.

All values are plain lists, so that plotly writes numbers instead of base64 and the page's JSON can
be read back.
"""

import math
from collections.abc import Sequence

import plotly.graph_objects as go

from merit_fast.manifests.schemas import SplitManifest
from merit_fast.report.split_tables import group_name, with_error
from merit_fast.report.style import (
    LEGEND,
    NEUTRAL,
    dataset_hover,
    group_color,
    group_symbol,
    label,
    ordered,
    plain,
)

_NAMED_ROWS = 40  # above this number, rows are labelled by group only
_NAMED_POINTS = 16
_TEXT_ROWS = 12  # up to this number, cells have room for their figures
_CORNERS = 24  # points of an ellipse's outline


def conflict_map(split: SplitManifest) -> go.Figure:
    """Heat map of the cosines, rows and columns in the order of ``ordered``.

    The hover text has names, groups, cosine and error. A cell that is not resolved is transparent,
    so that the grey background shows.
    """
    order = ordered(split)
    rows = [split.datasets[i] for i in order]
    names = [plain(row.name) for row in rows]
    groups = [row.group for row in rows]
    texts = [
        [_cosine_text(split.similarity[i][j], split.similarity_errors[i][j]) for j in order]
        for i in order
    ]
    titles = [f"{name} ({group_name(group)})" for name, group in zip(names, groups, strict=True)]
    heat = go.Heatmap(
        z=[[split.similarity[i][j] for j in order] for i in order],
        customdata=[
            [[titles[y], titles[x], texts[y][x]] for x in range(len(rows))]
            for y in range(len(rows))
        ],
        coloraxis="coloraxis",
        hoverongaps=True,
        hovertemplate=(
            "%{customdata[0]}<br>%{customdata[1]}<br>cosine %{customdata[2]}<extra></extra>"
        ),
    )
    if len(rows) <= _TEXT_ROWS:
        heat.text = [
            [_cell_text(split.similarity[i][j], split.similarity_errors[i][j]) for j in order]
            for i in order
        ]
        heat.texttemplate = "%{text}"
        heat.textfont = {"size": 11}
    figure = go.Figure(heat)
    _lay_out_conflicts(figure, [label(row.name) for row in rows], groups)
    return figure


def _lay_out_conflicts(figure: go.Figure, labels: list[str], groups: list[int]) -> None:
    """Draws the borders between groups, the colour scale and the axes of the heat map."""
    count = len(labels)
    borders = [i - 0.5 for i in range(1, count) if groups[i] != groups[i - 1]]
    shapes = [{"x0": at, "x1": at, "y0": 0, "y1": 1, "yref": "y domain"} for at in borders]
    shapes += [{"x0": 0, "x1": 1, "y0": at, "y1": at, "xref": "x domain"} for at in borders]
    centers, group_labels = _group_ticks(groups)
    figure.update_layout(
        template="none",
        height=min(900, max(420, 150 + (46 if count <= _TEXT_ROWS else 32) * count)),
        margin={"l": 10, "r": 10, "t": 50, "b": 10},
        plot_bgcolor=NEUTRAL,
        shapes=[{"type": "line", **shape} for shape in shapes],
        coloraxis={
            "cmin": -1,
            "cmax": 1,
            "colorbar": {
                "title": {"text": "cosine", "side": "right"},
                "tickvals": [-1, -0.5, 0, 0.5, 1],
            },
        },
    )
    bare = {"constrain": "domain", "showgrid": False, "zeroline": False, "ticks": ""}
    figure.update_xaxes(
        bare,
        side="top",
        title={"text": "group", "standoff": 4},
        tickvals=centers,
        ticktext=group_labels,
    )
    figure.update_xaxes(range=[-0.5, count - 0.5])
    figure.update_yaxes(bare, scaleanchor="x", range=[count - 0.5, -0.5], automargin=True)
    if count <= _NAMED_ROWS:
        figure.update_yaxes(tickvals=list(range(count)), ticktext=labels)
    else:
        figure.update_yaxes(title={"text": "group"}, tickvals=centers, ticktext=group_labels)


def axes_map(split: SplitManifest) -> go.Figure:
    """Datasets on conflict axes 1 and 2, with an ellipse of one standard error; cuts are lines."""
    figure = go.Figure()
    _add_groups(figure, split)
    bounds_x = _bounds(split, 0)
    bounds_y = _bounds(split, 1)
    for line in _cut_lines(split, bounds_x, bounds_y):
        figure.add_shape(type="line", line={"dash": "dash"}, layer="below", **line)
    titles = [
        f"axis {axis + 1} ({100 * share:.1f} % of the variance)"
        for axis, share in enumerate(split.explained_variance)
    ]
    figure.update_layout(
        template="none",
        height=600,
        margin={"l": 10, "r": 10, "t": 40, "b": 10},
        legend=LEGEND,
        xaxis={"title": {"text": titles[0]}, "range": list(bounds_x), "automargin": True},
        yaxis={"title": {"text": titles[1]}, "range": list(bounds_y), "automargin": True},
    )
    return figure


def _add_groups(figure: go.Figure, split: SplitManifest) -> None:
    """Adds the ellipses and the points of every group."""
    hover, template = dataset_hover(split)
    positions = _label_positions(split)
    names = [label(row.name) for row in split.datasets]
    groups = {row.group for row in split.datasets}
    for group in sorted(groups, key=lambda group: (group < 0, group)):
        members = [i for i, row in enumerate(split.datasets) if row.group == group]
        x, y = _ellipses(split, members)
        figure.add_scatter(
            x=x, y=y, mode="lines", fill="toself", opacity=0.35, hoverinfo="skip", showlegend=False,
            legendgroup=group_name(group), line={"width": 1, "color": group_color(group)},
        )  # fmt: skip
        figure.add_scatter(
            name=group_name(group),
            legendgroup=group_name(group),
            x=[split.scores[i][0] for i in members],
            y=[split.scores[i][1] for i in members],
            customdata=[hover[i] for i in members],
            text=[names[i] for i in members],
            mode="markers+text" if len(split.datasets) <= _NAMED_POINTS else "markers",
            textposition=[positions[i] for i in members],
            cliponaxis=False,
            marker={
                "size": 9,
                "opacity": 0.9,
                "color": group_color(group),
                "symbol": group_symbol(group),
            },
            hovertemplate=template,
        )


def _cosine_text(cosine: float | None, error: float | None) -> str:
    return "not resolved" if cosine is None else with_error(cosine, error)


def _cell_text(cosine: float | None, error: float | None) -> str:
    """Cosine and error on two short lines; empty for a cell that is not resolved."""
    if cosine is None:
        return ""
    return f"{cosine:z.2f}" + (f"<br>±{error:.2f}" if error else "")


def _ellipses(
    split: SplitManifest, members: Sequence[int]
) -> tuple[list[float | None], list[float | None]]:
    """x and y of ellipses with half axes of one standard error; a gap follows each outline."""
    x: list[float | None] = []
    y: list[float | None] = []
    turns = [2 * math.pi * corner / _CORNERS for corner in range(_CORNERS + 1)]
    for i in members:
        center_x, center_y = split.scores[i][:2]
        error_x, error_y = split.score_errors[i][:2]
        x += [*(round(center_x + error_x * math.cos(turn), 6) for turn in turns), None]
        y += [*(round(center_y + error_y * math.sin(turn), 6) for turn in turns), None]
    return x, y


def _label_positions(split: SplitManifest) -> list[str]:
    """Position [N] of each name; neighbours on axis 1 take turns, so that names stay readable."""
    order = sorted(range(len(split.datasets)), key=lambda i: split.scores[i][0])
    turns = ("top center", "bottom center", "middle right", "middle left")
    positions = [""] * len(order)
    for rank, i in enumerate(order):
        positions[i] = turns[rank % 4]
    return positions


def _cut_lines(
    split: SplitManifest, bounds_x: tuple[float, float], bounds_y: tuple[float, float]
) -> list[dict[str, float]]:
    """End points of the cuts on axes 1 and 2.

    The cuts come in order: axis 1, then axis 2 on its low and on its high side.
    """
    first = [score for axis, score in split.cuts if axis == 0]
    second = [score for axis, score in split.cuts if axis == 1]
    lines = [{"x0": cut, "x1": cut, "y0": bounds_y[0], "y1": bounds_y[1]} for cut in first]
    sides = [bounds_x] * len(second)
    if len(first) == 1 and len(second) == 2:
        sides = [(bounds_x[0], first[0]), (first[0], bounds_x[1])]
    lines += [
        {"x0": low, "x1": high, "y0": cut, "y1": cut}
        for cut, (low, high) in zip(second, sides, strict=True)
    ]
    return lines


def _group_ticks(groups: list[int]) -> tuple[list[float], list[str]]:
    """Centre and label of each group's block on an axis of sorted groups."""
    present = list(dict.fromkeys(groups))
    blocks = [[i for i, g in enumerate(groups) if g == group] for group in present]
    centers = [sum(block) / len(block) for block in blocks]
    return centers, ["all" if group < 0 else str(group) for group in present]


def _bounds(split: SplitManifest, axis: int) -> tuple[float, float]:
    """The range of an axis that shows every point with its error."""
    pairs = [
        (score[axis], error[axis])
        for score, error in zip(split.scores, split.score_errors, strict=True)
    ]
    low = min(score - error for score, error in pairs)
    high = max(score + error for score, error in pairs)
    margin = 0.1 * (high - low) or 1.0
    return low - margin, high + margin
