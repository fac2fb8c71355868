"""The report in a real headless Chromium: light and dark, separate labels, narrow windows."""

import pytest
from support.report.chromium import EXECUTABLE
from support.report.pages import LABELS, LARGE, SMALL, SPLITS, luminance, overlaps

pytestmark = pytest.mark.skipif(
    EXECUTABLE is None,
    reason="no Chromium on this machine; Debian and Ubuntu: apt-get install chromium",
)


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
            '[...document.querySelectorAll("p, td, th, dd, dt, figcaption")]'
            ".map(e => getComputedStyle(e).color)"
        )
        for color in {label["color"] for label in texts} | set(words):
            bright, dim = sorted([luminance(color), grounds[scheme]], reverse=True)
            assert (bright + 0.05) / (dim + 0.05) >= 4.5, (scheme, color, ground)
    assert grounds["light"] > 0.9 and grounds["dark"] < 0.05


@pytest.mark.parametrize(
    ("name", "width"),
    [(LARGE, 1280), (LARGE, 390), ("136-in-34", 1280), (SMALL, 390), ("12-by-medians", 800)],
)
def test_labels_stay_apart_and_inside(browser, pages, name, width):
    browser.open(pages[name], width=width)
    labels = browser.run(LABELS)
    assert overlaps(labels) == []
    cut = [
        (label["plot"], label["text"])
        for label in labels
        if min(label["left"], label["top"]) < -1
        or label["right"] > label["width"] + 1
        or label["bottom"] > label["height"] + 1
    ]
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
