"""The common style of the figures: colours, symbols, labels, hover texts, light and dark themes.

Colours that depend on light and dark are in ``THEMES``, which the page applies. All others are
readable on both.
"""

import html
from typing import Any

from merit_fast.manifests.schemas import SplitManifest
from merit_fast.report.split_tables import group_name, norm_text, signal_text, with_error

# Okabe and Ito's colour-blind-safe palette without black and yellow; symbols show the group too.
GROUP_COLORS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#E69F00",
    "#CC79A7",
    "#56B4E9",
    "#8A63D2",
    "#A0A020",
)
NEUTRAL = "#8C8C8C"  # for marks outside every group
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "hexagon")
_LONGEST = 28  # characters of a name in a label; the hover text shows it whole
ROW = 16  # pixels of a line of text
# at the foot of the figure, since its tools are on top
LEGEND = {
    "orientation": "h",
    "yref": "container",
    "yanchor": "bottom",
    "y": 0,
    "x": 0,
}


def group_color(group: int) -> str:
    return NEUTRAL if group < 0 else GROUP_COLORS[group % 8]


def group_symbol(group: int) -> str:
    """A symbol that changes when the colours repeat, so that 64 groups look different."""
    return "circle-open" if group < 0 else _SYMBOLS[(group + group // 8) % 8]


def ordered(split: SplitManifest) -> list[int]:
    """The datasets sorted by group, those of all groups last, then by score on axis 1."""
    rows = split.datasets
    return sorted(
        range(len(rows)), key=lambda i: (rows[i].group < 0, rows[i].group, split.scores[i][:1], i)
    )


def plain(text: str) -> str:
    """Escapes a text, since plotly reads a few HTML tags in labels."""
    return html.escape(text, quote=False)


def label(text: str) -> str:
    """Shortens a name to fit an axis."""
    return plain(text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…")


def dataset_hover(split: SplitManifest) -> tuple[list[list[Any]], str]:
    """One row of customdata per dataset, and the hover template that reads it."""
    rows = []
    for i, row in enumerate(split.datasets):
        names = [plain(row.name), group_name(row.group), split.controls[0][i]]
        counts = [row.num_examples, row.num_target_tokens, row.num_sketched_examples]
        signal = [
            with_error(row.signal_fraction, row.signal_error),
            f"<br>{signal_text(row)}".removesuffix("<br>"),
        ]
        measures = [row.margin, row.stability, row.mean_loss, norm_text(row)]
        scores = [
            with_error(*pair) for pair in zip(split.scores[i], split.score_errors[i], strict=True)
        ]
        rows.append([*names, *counts, *signal, *measures, *scores])
    axes = range(len(split.explained_variance))
    scores_text = "".join(
        f"<br>score on axis {axis + 1}: %{{customdata[{12 + axis}]}}" for axis in axes
    )
    template = (
        "<b>%{customdata[0]}</b><br>%{customdata[1]} (random control: %{customdata[2]})"
        "<br>%{customdata[3]:,} examples, %{customdata[4]:,} target tokens"
        "<br>signal fraction %{customdata[6]} over %{customdata[5]:,} examples%{customdata[7]}"
        "<br>margin %{customdata[8]:.3g}, stability %{customdata[9]:.3f}"
        "<br>loss %{customdata[10]:.3f}, gradient norm %{customdata[11]}"
        f"{scores_text}<extra></extra>"
    )
    return rows, template


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


# Diverging, blue for agreement and red for conflict (ColorBrewer RdBu); the middle is the
# background.
THEMES = {
    "light": _theme(
        "#1f2328", "#c9ced6", "#ffffff", ["#b2182b", "#ef8a62", "#f7f7f7", "#67a9cf", "#2166ac"]
    ),
    "dark": _theme(
        "#e4e7eb", "#4a515b", "#22272e", ["#ff8f73", "#b04a3c", "#262b32", "#3679ad", "#7cc0f5"]
    ),
}
