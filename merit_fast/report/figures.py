"""The page's two figures. Colours that depend on light and dark are in ``THEMES``, which the page applies.

Everything is plain lists: plotly then writes numbers, not base64, and the page's JSON can be read back.
"""

import html
from typing import Any

import plotly.graph_objects as go

from merit_fast.manifest import SplitManifest

# Okabe & Ito's colour-blind-safe palette without black; symbols carry the group as well.
GROUP_COLORS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#8C8C8C", "#A0A020")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "hexagon")
_NAMED_ROWS = 40  # more rows than this are labelled by group only
_NAMED_POINTS = 16


def conflict_map(split: SplitManifest) -> go.Figure:
    """Heat map of the cosines, rows and columns ordered by group and score. Hover: names, groups, cosine, error."""
    order = sorted(range(len(split.datasets)), key=lambda i: (split.datasets[i].group, split.scores[i][:1], i))
    rows = [split.datasets[i] for i in order]
    names = [_plain(row.name) for row in rows]
    hover = [
        [[names[y], names[x], split.similarity_errors[i][j], rows[y].group, rows[x].group] for x, j in enumerate(order)]
        for y, i in enumerate(order)
    ]
    heat = go.Heatmap(
        z=[[split.similarity[i][j] for j in order] for i in order],
        customdata=hover,
        coloraxis="coloraxis",
        hovertemplate="%{customdata[0]} (group %{customdata[3]})<br>%{customdata[1]} (group %{customdata[4]})"
        "<br>cosine %{z:.3f} ± %{customdata[2]:.3f}<extra></extra>",
    )
    if len(rows) <= 12:
        heat.texttemplate = "%{z:.2f}"
    figure = go.Figure(heat)
    groups = [row.group for row in rows]
    for i in range(1, len(groups)):
        if groups[i] != groups[i - 1]:
            figure.add_vline(x=i - 0.5)
            figure.add_hline(y=i - 0.5)
    centers, labels = _group_ticks(groups)
    figure.update_layout(
        template="none",
        height=min(900, max(420, 150 + 32 * len(rows))),
        margin={"l": 10, "r": 10, "t": 50, "b": 10},
        coloraxis={"cmin": -1, "cmax": 1, "colorbar": {"title": {"text": "cosine"}, "tickvals": [-1, -0.5, 0, 0.5, 1]}},
    )
    bare = {"constrain": "domain", "showgrid": False, "zeroline": False, "ticks": ""}
    figure.update_xaxes(bare, side="top", title={"text": "group", "standoff": 4}, tickvals=centers, ticktext=labels)
    figure.update_xaxes(range=[-0.5, len(rows) - 0.5])
    figure.update_yaxes(bare, scaleanchor="x", range=[len(rows) - 0.5, -0.5], automargin=True)
    if len(rows) <= _NAMED_ROWS:
        figure.update_yaxes(tickvals=list(range(len(rows))), ticktext=names)
    else:
        figure.update_yaxes(title={"text": "group"}, tickvals=centers, ticktext=labels)
    return figure


def axes_map(split: SplitManifest) -> go.Figure:
    """Datasets on conflict axes 1 and 2, or on axis 1 with one lane per group; median cuts as lines."""
    flat = len(split.explained_variance) == 1
    number_axes = len(split.explained_variance)
    scores = "".join(f"<br>score on axis {a + 1}: %{{customdata[{9 + a}]:.3f}}" for a in range(number_axes))
    template = (
        "<b>%{customdata[0]}</b><br>group %{customdata[1]} (random control: %{customdata[2]})"
        "<br>%{customdata[3]:,} examples, %{customdata[4]:,} target tokens"
        f"{scores}<br>signal fraction %{{customdata[8]:.3f}} over %{{customdata[5]:,}} examples"
        "<br>loss at base %{customdata[6]:.3f}, gradient norm %{customdata[7]:.3g}<extra></extra>"
    )
    places = _label_places(split)
    figure = go.Figure()
    for group in range(split.groups):
        members = [i for i, row in enumerate(split.datasets) if row.group == group]
        figure.add_scatter(
            name=f"group {group}",
            x=[split.scores[i][0] for i in members],
            y=[group if flat else split.scores[i][1] for i in members],
            customdata=[_hover_row(split, i) for i in members],
            text=[_plain(split.datasets[i].name) for i in members],
            mode="markers+text" if len(split.datasets) <= _NAMED_POINTS else "markers",
            textposition=[places[i] for i in members],
            cliponaxis=False,
            marker={"size": 10, "opacity": 0.85, "color": GROUP_COLORS[group % 8], "symbol": _SYMBOLS[group % 8]},
            hovertemplate=template,
        )
    bounds_x = _bounds([row[0] for row in split.scores])
    bounds_y = (-0.6, split.groups - 0.4) if flat else _bounds([row[1] for row in split.scores])
    for line in _cut_lines(split, bounds_x, bounds_y):
        figure.add_shape(type="line", line={"dash": "dash"}, layer="below", **line)
    titles = [f"axis {a + 1} ({100 * v:.1f} % of the variance)" for a, v in enumerate(split.explained_variance)]
    figure.update_layout(
        template="none",
        height=180 + 60 * split.groups if flat else 560,
        margin={"l": 10, "r": 10, "t": 10, "b": 10},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0},
        xaxis={"title": {"text": titles[0]}, "range": list(bounds_x), "automargin": True},
        yaxis={"range": list(bounds_y), "automargin": True},
    )
    if flat:
        ticks = list(range(split.groups))
        figure.update_yaxes(tickvals=ticks, ticktext=[f"group {g}" for g in ticks], showgrid=False, zeroline=False)
    else:
        figure.update_yaxes(title={"text": titles[1]})
    return figure


def _label_places(split: SplitManifest) -> list[str]:
    """[N] where each name stands; neighbours on axis 1 take turns, so that close points stay readable."""
    order = sorted(range(len(split.datasets)), key=lambda i: split.scores[i][0])
    turns = ("top center", "bottom center", "middle right", "middle left")
    places = [""] * len(order)
    for rank, i in enumerate(order):
        places[i] = turns[rank % 4]
    return places


def _hover_row(split: SplitManifest, i: int) -> list[Any]:
    row = split.datasets[i]
    counts = [row.num_examples, row.num_target_tokens, row.num_sketched_examples]
    measures = [row.mean_loss, row.gradient_norm, row.signal_fraction]
    return [_plain(row.name), row.group, split.random_groups[i], *counts, *measures, *split.scores[i]]


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
    lines += [{"x0": low, "x1": high, "y0": cut, "y1": cut} for cut, (low, high) in zip(second, sides, strict=True)]
    return lines


def _group_ticks(groups: list[int]) -> tuple[list[float], list[str]]:
    """Centre and label of each group's block on an axis of sorted groups."""
    present = sorted(set(groups))
    places = [[i for i, g in enumerate(groups) if g == group] for group in present]
    return [sum(block) / len(block) for block in places], [str(group) for group in present]


def _bounds(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.1 * (high - low) or 1.0
    return low - margin, high + margin


def _plain(text: str) -> str:
    """plotly reads a few HTML tags in labels; escaped text shows as it is."""
    return html.escape(text, quote=False)


def _theme(text: str, faint: str, surface: str, scale: list[str]) -> dict[str, Any]:
    font = {"color": text, "family": "system-ui, sans-serif", "size": 13}
    axis = {"gridcolor": faint, "zerolinecolor": faint, "linecolor": faint, "tickcolor": faint}
    return {
        "layout": {
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": font,
            "hoverlabel": {"bgcolor": surface, "bordercolor": faint, "font": font, "align": "left"},
            "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": faint, "activecolor": text},
            "coloraxis": {"colorscale": [[i / 4, color] for i, color in enumerate(scale)]},
            "shapedefaults": {"line": {"color": text, "width": 1.5}},
            "xaxis": axis,
            "yaxis": axis,
        }
    }


# Diverging, blue for agreement and red for conflict (ColorBrewer RdBu); the middle is the page's own background.
THEMES = {
    "light": _theme("#1f2328", "#c9ced6", "#ffffff", ["#b2182b", "#ef8a62", "#f7f7f7", "#67a9cf", "#2166ac"]),
    "dark": _theme("#e4e7eb", "#4a515b", "#22272e", ["#ff8f73", "#b04a3c", "#262b32", "#3679ad", "#7cc0f5"]),
}
