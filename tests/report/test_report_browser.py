"""The report in a real headless Chromium: no error, no network, hover, light and dark, room for 136 datasets.

Screenshots go to artefacts/report/, which git ignores.
"""

import json
import random
import re
import time
from dataclasses import replace

import pytest
from support.chromium import EXECUTABLE, Browser
from support.paths import ROOT
from support.reports import make_audit, make_evaluation, make_split, make_tuned, median_cuts, write

from merit_fast.manifests.io import read_manifest, write_manifest
from merit_fast.manifests.schemas import SplitManifest

SCREENSHOTS = ROOT / "artefacts" / "report"
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
SMALL, LARGE = "12-datasets", "136-datasets"
# where the point (x, y) of a plot is in the window, after scrolling there
PLACE = """((name, x, y) => {
  const plot = document.querySelector(`[data-spec="${name}-data"]`), { xaxis, yaxis } = plot._fullLayout;
  const at = () => {
    const box = plot.getBoundingClientRect();
    return [box.x + xaxis._offset + xaxis.d2p(x), box.y + yaxis._offset + yaxis.d2p(y)];
  };
  window.scrollBy(0, at()[1] - innerHeight / 2);
  return at();
})"""
# the lines of the hover labels of a plot
HOVERED = """(name => [...document.querySelectorAll(`[data-spec="${name}-data"] .hoverlayer .hovertext`)].map(label => {
  const lines = [...label.querySelectorAll("text.nums tspan.line")];
  return lines.length ? lines.map(line => line.textContent) : [label.querySelector("text.nums").textContent];
}))"""
# labels of every plot: what they say, where they are, how they look
LABELS = """[...document.querySelectorAll(".plot")].flatMap(plot =>
  [...plot.querySelectorAll(".xtick text, .ytick text, .xaxislayer-above text, .yaxislayer-above text, .legendtext, " +
    ".g-xtitle text, .g-ytitle text, .g-x2title text, .g-x3title text, .g-gtitle text, .cbaxis text, .cbtitle text, " +
    ".modebar-group")].filter((e, i, all) => all.indexOf(e) === i && e.getBoundingClientRect().width).map(e => {
    const box = e.getBoundingClientRect(), own = plot.getBoundingClientRect(), style = getComputedStyle(e);
    return { plot: plot.dataset.spec.replace("-data", ""), text: e.textContent, tools: !e.matches("text"),
      tick: !!e.closest(".ytick, .yaxislayer-above"), size: parseFloat(style.fontSize), color: style.fill,
      left: box.left - own.left, right: box.right - own.left, top: box.top - own.top, bottom: box.bottom - own.top,
      width: own.width, height: own.height };
  }))"""

pytestmark = pytest.mark.skipif(
    EXECUTABLE is None,
    reason="no Chromium on this machine; Debian and Ubuntu: apt-get install chromium",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """name -> its report; the split is read back from a split.json beside it, as in a run."""
    folder = tmp_path_factory.mktemp("reports")
    found = {}
    for name, split in SPLITS.items():
        write_manifest(split, folder / f"{name}.json")
        read = read_manifest(SplitManifest, folder / f"{name}.json")
        found[name] = folder / f"{name}.html"
        write(
            found[name],
            read,
            make_evaluation(read),
            title=name,
            audit=make_audit(),
            tuned=make_tuned(),
        )
    return found


def hover(browser, plot, x, y):
    """The lines of the label that a mouse at (x, y) of a plot brings up."""
    place = browser.run(f"{PLACE}({json.dumps(plot)}, {json.dumps(x)}, {json.dumps(y)})")
    return hover_at(browser, plot, *place)


def hover_at(browser, plot, x, y):
    browser.move_mouse(1, 1)  # away from what the last call brought up
    read = f"{HOVERED}({json.dumps(plot)})"
    wait(lambda: not browser.run(read))
    browser.move_mouse(x, y)
    (lines,) = wait(lambda: browser.run(read))
    return lines


def wait(condition, patience_s=5):
    end = time.monotonic() + patience_s
    while not (value := condition()):
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)
    return value


def test_the_watch_sees_errors_and_requests(browser, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        '<img src="http://127.0.0.1:9/x.png"><script>console.error("planted"); missing()</script>'
    )
    browser.open(page)
    assert [url for url in browser.requests if url.startswith("http")] == [
        "http://127.0.0.1:9/x.png"
    ]
    assert any("planted" in text for text in browser.errors)
    assert any("missing is not defined" in text for text in browser.errors)


@pytest.mark.parametrize("name", SPLITS)
def test_opens_without_an_error_and_without_the_network(browser, pages, name):
    browser.open(pages[name])
    plots = '[...document.querySelectorAll(".plot")].map(p => [p.dataset.spec, !!p.querySelector(".main-svg")])'
    expected = [plot for plot in PLOTS if plot != "separations" or SPLITS[name].separations]
    assert browser.run(plots) == [[f"{plot}-data", True] for plot in expected]
    assert browser.run("document.title") == name
    for scheme in ("light", "dark"):
        browser.scheme(scheme)
        browser.screenshot(SCREENSHOTS / f"{name}-{scheme}.png")
    browser.run('document.querySelectorAll("details").forEach(details => { details.open = true; })')
    browser.run("window.scrollTo(0, document.body.scrollHeight)")
    browser.settle()
    assert browser.errors == []
    outside = [url for url in browser.requests if not url.startswith(("data:", "blob:"))]
    assert outside == [pages[name].as_uri()]


@pytest.mark.parametrize("name", [SMALL, LARGE])
def test_hovering_a_cell_shows_the_numbers_of_split_json(browser, pages, name):
    split = read_manifest(SplitManifest, pages[name].with_suffix(".json"))
    browser.open(pages[name])
    rows = split.datasets
    order = sorted(
        range(len(rows)), key=lambda i: (rows[i].group < 0, rows[i].group, split.scores[i][0])
    )
    draw, number = random.Random(0), len(rows)
    cells = [(draw.randrange(number), draw.randrange(number)) for _ in range(12)] + [
        (0, 0),
        (number - 1, 0),
    ]
    unknown = next(place for place, i in enumerate(order) if rows[i].more_examples)
    for x, y in [*cells, (unknown, number // 2)]:
        i, j = order[y], order[x]
        cosine, error = split.similarity[i][j], split.similarity_errors[i][j]
        group = ["all groups" if rows[k].group < 0 else f"group {rows[k].group}" for k in (i, j)]
        assert hover(browser, "conflicts", x, y) == [
            f"{rows[i].name} ({group[0]})",
            f"{rows[j].name} ({group[1]})",
            "cosine not resolved" if cosine is None else f"cosine {cosine:z.3f} ± {error:.3f}",
        ]


def dataset_lines(split, i):
    row = split.datasets[i]
    about = "about" if row.signal_fraction > row.signal_error else "at least"
    unknown = (
        [f"not resolvable: needs {about} {row.more_examples:,} more examples"]
        if row.more_examples
        else []
    )
    return [
        row.name,
        f"{'all groups' if row.group < 0 else f'group {row.group}'} (random control: {split.random_groups[i]})",
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


def as_numbers(lines):
    """A margin of 0.0102 may be written 0.0102 or 1.02e-2, a minus as − or -."""
    plain = [line.replace("−", "-") for line in lines]
    margins = [
        float(re.match(r"margin (\S+),", line)[1]) if line.startswith("margin") else None
        for line in plain
    ]
    return [re.sub(r"^margin \S+,", "margin", line) for line in plain], margins


def test_hovering_a_dataset_shows_its_numbers_in_every_figure(browser, pages):
    split = read_manifest(SplitManifest, pages[SMALL].with_suffix(".json"))
    browser.open(pages[SMALL])
    everyone = range(len(split.datasets))
    alone = [
        i for i in everyone
        if all(abs(split.scores[i][0] - split.scores[j][0]) > 0.05 for j in everyone if i != j)
    ]  # fmt: skip
    assert len(alone) > 3
    for i in alone:
        assert as_numbers(hover(browser, "axes", *split.scores[i][:2])) == as_numbers(
            dataset_lines(split, i)
        )

    split = read_manifest(SplitManifest, pages[LARGE].with_suffix(".json"))
    browser.open(pages[LARGE])
    for plot, trace in (("datasets", 0), ("tree", 2)):
        labels = browser.run(
            f'document.querySelector(`[data-spec="{plot}-data"]`).layout.yaxis.ticktext'
        )
        places = browser.run(f'document.querySelector(`[data-spec="{plot}-data"]`).data[{trace}].x')
        for row in (0, 1, 67, 135):
            i = next(i for i, one in enumerate(split.datasets) if one.name == labels[row])
            assert as_numbers(hover(browser, plot, places[row], row)) == as_numbers(
                dataset_lines(split, i)
            )


def test_hovering_the_other_figures_shows_their_numbers(browser, pages):
    split = read_manifest(SplitManifest, pages[SMALL].with_suffix(".json"))
    browser.open(pages[SMALL])
    for place, found in enumerate(split.separations):
        k = found.groups
        assert hover(browser, "separations", place, found.null_mean) == [
            f"{k} random groups", f"η² {found.null_mean:.4f}, standard deviation {found.null_std:.4f}"
        ]  # fmt: skip
        crossed = hover(browser, "separations", place, found.cross_validated)
        assert crossed == [f"{k} groups", f"η² cross-validated {found.cross_validated:.4f}"]
        debiased = hover(browser, "separations", place, found.eta_squared)
        assert debiased == [f"{k} groups", f"η² debiased {found.eta_squared:.4f}"]

    bars = browser.run(
        """(() => { const plot = document.querySelector('[data-spec="balance-data"]'); plot.scrollIntoView();
        return [...plot.querySelectorAll(".bars .point path")].map(p => {
          const box = p.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; }); })()"""
    )
    tokens = [
        sum(
            row.num_target_tokens * (1 if row.group == k else 0.25)
            for row in split.datasets
            if row.group in (k, -1)
        )
        for k in range(4)
    ]
    for k in range(4):
        share = 100 * tokens[k] / sum(tokens)
        assert hover_at(browser, "balance", *bars[k]) == [
            f"group {k}", f"{round(tokens[k]):,} target tokens", f"{share:.2f} %"
        ]  # fmt: skip

    heights = browser.run("document.querySelector('[data-spec=\"tree-data\"]').data[1].x")
    joint = browser.run("document.querySelector('[data-spec=\"tree-data\"]').data[1].y")
    assert hover(browser, "tree", heights[-1], joint[-1]) == [
        "12 datasets", f"mean distance of the two sides {heights[-1]:.3f}"
    ]  # fmt: skip


def luminance(color):
    """WCAG relative luminance of rgb(r, g, b)."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    r, g, b = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def test_light_and_dark_follow_the_reader_and_stay_readable(browser, pages):
    browser.open(pages[SMALL], scheme="dark")
    grounds = {}
    for scheme in ("dark", "light", "dark"):
        browser.scheme(scheme)
        ground = browser.run("getComputedStyle(document.body).backgroundColor")
        grounds[scheme] = luminance(ground)
        texts = [label for label in browser.run(LABELS) if not label["tools"]]
        assert len(texts) > 60
        words = browser.run(
            '[...document.querySelectorAll("p, td, th, dd, dt, figcaption")].map(e => getComputedStyle(e).color)'
        )
        for color in {label["color"] for label in texts} | set(words):
            bright, dim = sorted([luminance(color), grounds[scheme]], reverse=True)
            assert (bright + 0.05) / (dim + 0.05) >= 4.5, (scheme, color, ground)
    assert grounds["light"] > 0.9 and grounds["dark"] < 0.05


def overlaps(labels):
    """Pairs of labels of one plot that share more than a pixel in both directions."""
    return [
        (one["plot"], one["text"], two["text"])
        for i, one in enumerate(labels)
        for two in labels[i + 1 :]
        if one["plot"] == two["plot"]
        and min(one["right"], two["right"]) - max(one["left"], two["left"]) > 1
        and min(one["bottom"], two["bottom"]) - max(one["top"], two["top"]) > 1
    ]


@pytest.mark.parametrize(
    ("name", "width"),
    [(LARGE, 1280), (LARGE, 390), ("136-in-34", 1280), (SMALL, 390), ("12-by-medians", 800)],
)
def test_labels_stay_apart_and_inside(browser, pages, name, width):
    browser.open(pages[name], width=width)
    labels = browser.run(LABELS)
    assert overlaps(labels) == []
    cut = [
        (one["plot"], one["text"]) for one in labels
        if min(one["left"], one["top"]) < -1 or one["right"] > one["width"] + 1 or one["bottom"] > one["height"] + 1
    ]  # fmt: skip
    assert cut == []
    assert min(label["size"] for label in labels if not label["tools"]) >= 10
    assert browser.run("document.documentElement.scrollWidth") <= width
    for plot in ("tree", "datasets"):
        names = sorted(label["text"] for label in labels if label["plot"] == plot and label["tick"])
        assert names == sorted(row.name for row in SPLITS[name].datasets)


def test_the_overlap_check_sees_an_overlap(browser, pages):
    browser.open(pages[LARGE])
    browser.run(
        """document.querySelectorAll('[data-spec="tree-data"] .ytick text').forEach(
        e => { e.style.fontSize = "30px"; })"""
    )
    assert len(overlaps(browser.run(LABELS))) > 100
