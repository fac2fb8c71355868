"""Reports for the tests in a browser: their splits, and what JavaScript reads from an open page."""

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from support.report.chromium import Browser
from support.report.manifests import make_split, median_cuts

from merit_fast.manifests.schemas import SplitManifest

T = TypeVar("T")

PLOTS = ["conflicts", "axes", "tree", "separations", "balance", "datasets"]


SPLITS = {
    "12-datasets": make_split(12, 4, unresolved=2, spread=1),
    "12-by-medians": median_cuts(make_split(12, 4), (0, 0.05), (1, -0.1), (1, 0.2)),
    "136-datasets": make_split(136, 8, unresolved=9),
    "136-in-34": make_split(136, 34, spread=3),
    "one-group": replace(
        make_split(5, 1), separations=(), reason="splitting would not help: too few datasets"
    ),
    "none-resolved": make_split(8, 8, unresolved=8),
}


SMALL = "12-datasets"
LARGE = "136-datasets"


# position in the window of the point (x, y) of a plot, after scrolling to it
POINT = """((name, x, y) => {
  const plot = document.querySelector(`[data-spec="${name}-data"]`);
  const { xaxis, yaxis } = plot._fullLayout;
  const at = () => {
    const box = plot.getBoundingClientRect();
    return [box.x + xaxis._offset + xaxis.d2p(x), box.y + yaxis._offset + yaxis.d2p(y)];
  };
  window.scrollBy(0, at()[1] - innerHeight / 2);
  return at();
})"""


# the lines of the hover labels of a plot
HOVERED = """(name => {
  const labels = document.querySelectorAll(`[data-spec="${name}-data"] .hoverlayer .hovertext`);
  return [...labels].map(label => {
    const text = label.querySelector("text.nums");
    const lines = [...text.querySelectorAll("tspan.line")];
    return lines.length ? lines.map(line => line.textContent) : [text.textContent];
  });
})"""


# labels of every plot: text, position, size and colour
LABELS = """[...document.querySelectorAll(".plot")].flatMap(plot => {
  const texts = plot.querySelectorAll(".xtick text, .ytick text, .xaxislayer-above text, " +
    ".yaxislayer-above text, .legendtext, .g-xtitle text, .g-ytitle text, .g-x2title text, " +
    ".g-x3title text, .g-gtitle text, .cbaxis text, .cbtitle text, .modebar-group");
  const frame = plot.getBoundingClientRect();
  return [...texts].filter((e, i, all) =>
    all.indexOf(e) === i && e.getBoundingClientRect().width).map(e => {
      const box = e.getBoundingClientRect(), style = getComputedStyle(e);
      return { plot: plot.dataset.spec.replace("-data", ""), text: e.textContent,
        tools: !e.matches("text"), tick: !!e.closest(".ytick, .yaxislayer-above"),
        size: parseFloat(style.fontSize), color: style.fill,
        left: box.left - frame.left, right: box.right - frame.left,
        top: box.top - frame.top, bottom: box.bottom - frame.top,
        width: frame.width, height: frame.height };
  });
})"""


def hover(browser: Browser, plot: str, x: Any, y: Any) -> list[str]:
    """The lines of the label that appears when the mouse is at (x, y) of a plot."""
    point = browser.run(f"{POINT}({json.dumps(plot)}, {json.dumps(x)}, {json.dumps(y)})")
    return hover_at(browser, plot, *point)


def hover_at(browser: Browser, plot: str, x: float, y: float) -> list[str]:
    """The lines of the label that appears when the mouse is at pixel (x, y) of the window."""
    browser.move_mouse(1, 1)  # away from the label of the last call
    read = f"{HOVERED}({json.dumps(plot)})"
    wait(lambda: not browser.run(read))
    browser.move_mouse(x, y)
    lines: list[str]
    (lines,) = wait(lambda: browser.run(read))
    return lines


def wait(condition: Callable[[], T], patience_s: float = 5) -> T:
    """Waits until ``condition()`` is true and returns its value."""
    end = time.monotonic() + patience_s
    while not (value := condition()):
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)
    return value


def dataset_lines(split: SplitManifest, i: int) -> list[str]:
    """The lines of the hover label of dataset ``i``."""
    row = split.datasets[i]
    group = "all groups" if row.group < 0 else f"group {row.group}"
    assert row.signal_error is not None
    about = "about" if row.signal_fraction > row.signal_error else "at least"
    unknown = (
        [f"not resolvable: needs {about} {row.more_examples:,} more examples"]
        if row.more_examples
        else []
    )
    return [
        row.name,
        f"{group} (random: {split.controls[0][i]})",
        f"{row.num_examples:,} examples, {row.num_target_tokens:,} target tokens",
        f"signal fraction {row.signal_fraction:z.3f} ± {row.signal_error:.3f} "
        f"over {row.num_sketched_examples} examples",
        *unknown,
        f"margin {float(f'{row.margin:.3g}'):g}, stability {row.stability:.3f}",
        f"loss {row.mean_loss:.3f}, gradient norm "
        f"{'not resolved' if row.gradient_norm is None else f'{row.gradient_norm:.3g}'}",
        *(
            f"score on axis {a + 1}: {score:z.3f} ± {error:.3f}"
            for a, (score, error) in enumerate(
                zip(split.scores[i], split.score_errors[i], strict=True)
            )
        ),
    ]


def as_numbers(lines: Sequence[str]) -> tuple[list[str], list[float | None]]:
    """A margin of 0.0102 may be written 0.0102 or 1.02e-2, a minus as − or -."""
    plain = [line.replace("−", "-") for line in lines]
    matches = [re.match(r"margin (\S+),", line) for line in plain]
    assert all(
        match or not line.startswith("margin") for match, line in zip(matches, plain, strict=True)
    ), plain
    margins = [float(match[1]) if match else None for match in matches]
    return [re.sub(r"^margin \S+,", "margin", line) for line in plain], margins


def luminance(color: str) -> float:
    """WCAG relative luminance of rgb(r, g, b)."""
    shares = [int(number) / 255 for number in re.findall(r"\d+", color)[:3]]
    r, g, b = (
        share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares
    )
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def overlaps(labels: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Pairs of labels of one plot that share more than a pixel in both directions."""
    return [
        (one["plot"], one["text"], two["text"])
        for i, one in enumerate(labels)
        for two in labels[i + 1 :]
        if one["plot"] == two["plot"]
        and min(one["right"], two["right"]) - max(one["left"], two["left"]) > 1
        and min(one["bottom"], two["bottom"]) - max(one["top"], two["top"]) > 1
    ]
