"""The common style of the figures: colours, symbols, light and dark themes.

Colours that depend on light and dark are in ``THEMES``, which the page applies. All others are
readable on both.
"""

from typing import Any

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
HOVER = "%{customdata}<extra></extra>"  # the page's script writes the text into customdata
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "hexagon")
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
