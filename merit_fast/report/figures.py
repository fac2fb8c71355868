"""The two maps of the conflict geometry: cosines of all pairs, datasets on the conflict axes.

Everything is plain lists: plotly then writes numbers, not base64, and the page's JSON can be read back.
"""

import math
from collections.abc import Sequence

import plotly.graph_objects as go

from merit_fast.manifests.schemas import SplitManifest
from merit_fast.report.parts import (
    LEGEND,
    NEUTRAL,
    dataset_hover,
    group_color,
    group_symbol,
    label,
    ordered,
    plain,
)
from merit_fast.report.split_tables import group_name, with_error

_NAMED_ROWS = 40  # more rows than this are labelled by group only
_NAMED_POINTS = 16
_TEXT_ROWS = 12  # so few rows have cells with room for their figures
_CORNERS = 24  # of an ellipse


def conflict_map(split: SplitManifest) -> go.Figure:
    """Heat map of the cosines, rows and columns in ``ordered``. Hover: names, groups, cosine and error.

    A cell that is not resolved has no colour of its own: the grey ground shows.
    """
    order = ordered(split)
    rows = [split.datasets[i] for i in order]
    names, groups = [plain(row.name) for row in rows], [row.group for row in rows]
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
        hovertemplate="%{customdata[0]}<br>%{customdata[1]}<br>cosine %{customdata[2]}<extra></extra>",
    )
    if len(rows) <= _TEXT_ROWS:
        heat.text = [
            [_cell_text(split.similarity[i][j], split.similarity_errors[i][j]) for j in order]
            for i in order
        ]
        heat.texttemplate, heat.textfont = "%{text}", {"size": 11}
    figure = go.Figure(heat)
    borders = [i - 0.5 for i in range(1, len(groups)) if groups[i] != groups[i - 1]]
    shapes = [{"x0": at, "x1": at, "y0": 0, "y1": 1, "yref": "y domain"} for at in borders]
    shapes += [{"x0": 0, "x1": 1, "y0": at, "y1": at, "xref": "x domain"} for at in borders]
    centers, labels = _group_ticks(groups)
    figure.update_layout(
        template="none",
        height=min(900, max(420, 150 + (46 if len(rows) <= _TEXT_ROWS else 32) * len(rows))),
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
        bare, side="top", title={"text": "group", "standoff": 4}, tickvals=centers, ticktext=labels
    )
    figure.update_xaxes(range=[-0.5, len(rows) - 0.5])
    figure.update_yaxes(bare, scaleanchor="x", range=[len(rows) - 0.5, -0.5], automargin=True)
    if len(rows) <= _NAMED_ROWS:
        figure.update_yaxes(
            tickvals=list(range(len(rows))), ticktext=[label(row.name) for row in rows]
        )
    else:
        figure.update_yaxes(title={"text": "group"}, tickvals=centers, ticktext=labels)
    return figure


def axes_map(split: SplitManifest) -> go.Figure:
    """Datasets on conflict axes 1 and 2 with ellipses of one standard error; median cuts as lines."""
    hover, template = dataset_hover(split)
    places, names = _label_places(split), [label(row.name) for row in split.datasets]
    figure = go.Figure()
    for group in sorted(
        {row.group for row in split.datasets}, key=lambda group: (group < 0, group)
    ):
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
            textposition=[places[i] for i in members],
            cliponaxis=False,
            marker={
                "size": 9,
                "opacity": 0.9,
                "color": group_color(group),
                "symbol": group_symbol(group),
            },
            hovertemplate=template,
        )
    bounds_x, bounds_y = _bounds(split, 0), _bounds(split, 1)
    for line in _cut_lines(split, bounds_x, bounds_y):
        figure.add_shape(type="line", line={"dash": "dash"}, layer="below", **line)
    titles = [
        f"axis {a + 1} ({100 * v:.1f} % of the variance)"
        for a, v in enumerate(split.explained_variance)
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


def _cosine_text(cosine: float | None, error: float | None) -> str:
    return "not resolved" if cosine is None else with_error(cosine, error)


def _cell_text(cosine: float | None, error: float | None) -> str:
    """Two short lines; nothing in a cell that is not resolved."""
    if cosine is None:
        return ""
    return f"{cosine:z.2f}" + (f"<br>±{error:.2f}" if error else "")


def _ellipses(
    split: SplitManifest, members: Sequence[int]
) -> tuple[list[float | None], list[float | None]]:
    """x and y of the outlines, half axes of one standard error, a gap after each."""
    x: list[float | None] = []
    y: list[float | None] = []
    turns = [2 * math.pi * corner / _CORNERS for corner in range(_CORNERS + 1)]
    for i in members:
        (center_x, center_y), (error_x, error_y) = split.scores[i][:2], split.score_errors[i][:2]
        x += [*(round(center_x + error_x * math.cos(turn), 6) for turn in turns), None]
        y += [*(round(center_y + error_y * math.sin(turn), 6) for turn in turns), None]
    return x, y


def _label_places(split: SplitManifest) -> list[str]:
    """[N] where each name stands; neighbours on axis 1 take turns, so that close points stay readable."""
    order = sorted(range(len(split.datasets)), key=lambda i: split.scores[i][0])
    turns = ("top center", "bottom center", "middle right", "middle left")
    places = [""] * len(order)
    for rank, i in enumerate(order):
        places[i] = turns[rank % 4]
    return places


def _cut_lines(
    split: SplitManifest, bounds_x: tuple[float, float], bounds_y: tuple[float, float]
) -> list[dict[str, float]]:
    """End points of the cuts on axes 1 and 2. The cuts come in order: axis 1, then axis 2 of its low and high side."""
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
    places = [[i for i, g in enumerate(groups) if g == group] for group in present]
    return [sum(block) / len(block) for block in places], [
        "all" if group < 0 else str(group) for group in present
    ]


def _bounds(split: SplitManifest, axis: int) -> tuple[float, float]:
    """What shows every point with its error."""
    pairs = [
        (score[axis], error[axis])
        for score, error in zip(split.scores, split.score_errors, strict=True)
    ]
    low, high = (
        min(score - error for score, error in pairs),
        max(score + error for score, error in pairs),
    )
    margin = 0.1 * (high - low) or 1.0
    return low - margin, high + margin
