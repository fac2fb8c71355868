"""The two maps of the conflict geometry: cosines of all pairs, datasets on the conflict axes.

All values are plain lists, so that plotly writes numbers instead of base64 and the page's JSON can
be read back. A trace with ``meta.datasets`` shows these rows of report.json: the page's script adds
their names and hover texts.
"""

import math
from collections.abc import Sequence

import plotly.graph_objects as go

from merit_fast.manifests.schemas import SplitManifest
from merit_fast.report.linkage import group_order, tree_order
from merit_fast.report.split_tables import group_name
from merit_fast.report.style import (
    HOVER,
    LEGEND,
    NEUTRAL,
    group_color,
    group_symbol,
)

_NAMED_POINTS = 16
_WIDE_ROWS = 12  # up to this number, cells have room for their figures
_CORNERS = 24  # points of an ellipse's outline


def conflict_map(split: SplitManifest, part: str | None = None) -> go.Figure:
    """Heat map of the cosines; the page's script adds the numbers of report.json.

    ``layout.meta`` has the two orders of the rows, the same for every ``part`` of the model and for
    the whole (None), the colour of each group, and the part. A cell that is not
    resolved is transparent, so that the grey background shows.
    """
    tree = tree_order(split)
    heat = go.Heatmap(coloraxis="coloraxis", hoverongaps=True, hovertemplate=HOVER)
    figure = go.Figure(heat)
    count = len(tree)
    figure.update_layout(
        template="none",
        height=min(900, max(420, 150 + (46 if count <= _WIDE_ROWS else 32) * count)),
        margin={"l": 10, "r": 10, "t": 70, "b": 10},
        plot_bgcolor=NEUTRAL,
        coloraxis={"cmin": -1, "cmax": 1, "colorbar": {"tickvals": [-1, -0.5, 0, 0.5, 1]}},
        meta={
            "orders": {"group": group_order(split), "tree": tree},
            "colors": [group_color(row.group) for row in split.datasets],
            **({} if part is None else {"part": part}),
        },
    )
    # labels stand off by the length of invisible ticks: the groups' colours are between
    bare = {
        "constrain": "domain",
        "showgrid": False,
        "zeroline": False,
        "ticks": "outside",
        "ticklen": 12,
        "tickcolor": "rgba(0,0,0,0)",
    }
    figure.update_xaxes(bare, side="top", automargin=True)
    figure.update_yaxes(bare, scaleanchor="x", automargin=True)
    return figure


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
    positions = _label_positions(split)
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
            meta={"datasets": members},
            mode="markers+text" if len(split.datasets) <= _NAMED_POINTS else "markers",
            textposition=[positions[i] for i in members],
            cliponaxis=False,
            marker={
                "size": 9,
                "opacity": 0.9,
                "color": group_color(group),
                "symbol": group_symbol(group),
            },
            hovertemplate=HOVER,
        )


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
