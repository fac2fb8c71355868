"""The report in a real headless Chromium: no error, no network, numbers in the hover labels.

Screenshots go to artefacts/report/, which git ignores.
"""

import random

import pytest
from support.paths import ROOT
from support.report.chromium import EXECUTABLE
from support.report.manifests import write
from support.report.pages import (
    LARGE,
    PLOTS,
    SMALL,
    SPLITS,
    as_numbers,
    dataset_lines,
    hover,
    hover_at,
)
from support.report.parts import with_parts

from merit_fast.manifests.io import read_manifest
from merit_fast.manifests.schemas import SplitManifest
from merit_fast.report.linkage import group_order

SCREENSHOTS = ROOT / "artefacts" / "report"


pytestmark = pytest.mark.skipif(
    EXECUTABLE is None,
    reason="no Chromium on this machine; Debian and Ubuntu: apt-get install chromium",
)


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
    plots = (
        '[...document.querySelectorAll(".plot")]'
        '.map(p => [p.dataset.spec, !!p.querySelector(".main-svg")])'
    )
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
    order = group_order(split)
    draw = random.Random(0)
    number = len(rows)
    cells = [(draw.randrange(number), draw.randrange(number)) for _ in range(12)] + [
        (0, 0),
        (number - 1, 0),
    ]
    unknown = next(x for x, i in enumerate(order) if rows[i].more_examples)
    for x, y in [*cells, (unknown, number // 2)]:
        i = order[y]
        j = order[x]
        cosine = split.similarity[i][j]
        error = split.similarity_errors[i][j]
        group = ["all groups" if rows[k].group < 0 else f"group {rows[k].group}" for k in (i, j)]
        assert hover(browser, "conflicts", x, y) == [
            f"{rows[i].name} ({group[0]})",
            f"{rows[j].name} ({group[1]})",
            "cosine not resolved" if cosine is None else f"cosine {cosine:+z.3f} ± {error:.3f}",
        ]


def test_hovering_a_cell_of_a_part_shows_the_numbers_of_that_part(browser, tmp_path):
    split = with_parts(SPLITS[SMALL], "attention", "mlp")
    write(tmp_path / "parts.html", split)
    browser.open(tmp_path / "parts.html")
    order = group_order(split)
    for name, part in split.parts.items():
        for x, y in ((1, 2), (5, 0), (7, 9)):
            cosine = part.similarity[order[y]][order[x]]
            error = part.similarity_errors[order[y]][order[x]]
            assert hover(browser, f"part-{name}", x, y)[2] == (
                "cosine not resolved" if cosine is None else f"cosine {cosine:+z.3f} ± {error:.3f}"
            )
    assert browser.errors == []


def test_hovering_a_dataset_shows_its_numbers_in_every_figure(browser, pages):
    split = read_manifest(SplitManifest, pages[SMALL].with_suffix(".json"))
    browser.open(pages[SMALL])
    everyone = range(len(split.datasets))
    separate = [
        i
        for i in everyone
        if all(abs(split.scores[i][0] - split.scores[j][0]) > 0.05 for j in everyone if i != j)
    ]
    assert len(separate) > 3
    for i in separate:
        assert as_numbers(hover(browser, "axes", *split.scores[i][:2])) == as_numbers(
            dataset_lines(split, i)
        )

    split = read_manifest(SplitManifest, pages[LARGE].with_suffix(".json"))
    browser.open(pages[LARGE])
    for plot, trace in (("datasets", 0), ("tree", 2)):
        labels = browser.run(
            f'document.querySelector(`[data-spec="{plot}-data"]`).layout.yaxis.ticktext'
        )
        xs = browser.run(f'document.querySelector(`[data-spec="{plot}-data"]`).data[{trace}].x')
        for row in (0, 1, 67, 135):
            i = next(i for i, dataset in enumerate(split.datasets) if dataset.name == labels[row])
            assert as_numbers(hover(browser, plot, xs[row], row)) == as_numbers(
                dataset_lines(split, i)
            )


def test_hovering_the_other_figures_shows_their_numbers(browser, pages):
    split = read_manifest(SplitManifest, pages[SMALL].with_suffix(".json"))
    browser.open(pages[SMALL])
    for x, row in enumerate(split.separations):
        k = row.groups
        assert hover(browser, "separations", x, row.null_mean) == [
            f"{k} random groups",
            f"η² {row.null_mean:.4f}, standard deviation {row.null_std:.4f}",
        ]
        crossed = hover(browser, "separations", x, row.cross_validated)
        assert crossed == [f"{k} groups", f"η² cross-validated {row.cross_validated:.4f}"]
        debiased = hover(browser, "separations", x, row.eta_squared)
        assert debiased == [f"{k} groups", f"η² debiased {row.eta_squared:.4f}"]

    bars = browser.run(
        """(() => {
          const plot = document.querySelector('[data-spec="balance-data"]');
          plot.scrollIntoView();
          return [...plot.querySelectorAll(".bars .point path")].map(p => {
            const box = p.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2];
          });
        })()"""
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
