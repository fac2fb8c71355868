"""The report's tools in a real headless Chromium: search, sort, zoom, downloads, a phone."""

import csv
from dataclasses import replace

import pytest
from support.report.chromium import EXECUTABLE
from support.report.manifests import make_evaluation, make_split, write
from support.report.pages import LARGE, SMALL, SPLITS, hover, wait

from merit_fast.report.linkage import group_order

pytestmark = pytest.mark.skipif(
    EXECUTABLE is None,
    reason="no Chromium on this machine; Debian and Ubuntu: apt-get install chromium",
)
PLOT = "document.querySelector('[data-spec=\"conflicts-data\"]')"
LONG = "natural_instructions_of_one_family_that_differ_at_their_end_"


@pytest.fixture(scope="module")
def long_names(tmp_path_factory):
    """A page of 176 datasets whose long names differ at their ends only."""
    split = make_split(176, 8, unresolved=9)
    rows = (replace(row, name=f"{LONG}{i:03d}") for i, row in enumerate(split.datasets))
    split = replace(split, datasets=tuple(rows))
    file = tmp_path_factory.mktemp("long") / "report.html"
    write(file, split, make_evaluation(split))
    return file, split


def type_into(browser, selector, text):
    browser.run(
        f"""(() => {{
          const input = document.querySelector('{selector}');
          input.value = {text!r};
          input.dispatchEvent(new Event("input"));
        }})()"""
    )


def shown_names(browser, table):
    return browser.run(
        f"[...document.querySelectorAll('#{table} tbody tr')].filter(row => !row.hidden)"
        ".map(row => row.cells[0].textContent.trim())"
    )


def test_the_table_of_datasets_is_searched_and_sorted(browser, pages):
    browser.open(pages[LARGE])
    everyone = [row.name for row in SPLITS[LARGE].datasets]
    assert shown_names(browser, "datasets-table") == everyone
    type_into(browser, "input[data-table=datasets-table]", "TASK_01")
    assert shown_names(browser, "datasets-table") == everyone[10:20]
    type_into(browser, "input[data-table=datasets-table]", "")
    heads = browser.run(
        "[...document.querySelectorAll('#datasets-table thead th')].map(e => e.textContent)"
    )
    click = (
        f"document.querySelectorAll('#datasets-table button')[{heads.index('examples')}].click()"
    )
    counts = {row.name: row.num_examples for row in SPLITS[LARGE].datasets}
    for descending in (False, True):
        browser.run(click)
        values = [counts[name] for name in shown_names(browser, "datasets-table")]
        assert values == sorted(values, reverse=descending)
    assert browser.errors == []


def test_pairs_are_found_by_name_with_their_errors(browser, pages):
    browser.open(pages[SMALL])
    split = SPLITS[SMALL]
    number = len(split.datasets)
    cosines = {
        f"{split.datasets[i].name} {split.datasets[j].name}": split.similarity[i][j]
        for i in range(number)
        for j in range(i + 1, number)
        if split.similarity[i][j] is not None
    }
    order = sorted(cosines, key=cosines.__getitem__)
    assert shown_names(browser, "pairs-table") == [*order[:10], *order[-10:]]
    type_into(browser, "#pairs input", "task_004")
    found = shown_names(browser, "pairs-table")
    assert found == [pair for pair in order if "task_004" in pair]
    type_into(browser, "#pairs input", "task_004 task_007")
    assert shown_names(browser, "pairs-table") == ["task_004 task_007"]
    cell = browser.run("document.querySelector('#pairs-table tbody tr').cells[2].textContent")
    assert cell == f"{split.similarity[4][7]:+.3f} ± {split.similarity_errors[4][7]:.3f}"


def test_rows_of_the_conflict_map_get_names_when_zoomed(browser, long_names):
    file, split = long_names
    browser.open(file)
    labels = f"{PLOT}.layout.yaxis.ticktext"
    assert browser.run(labels) == [str(group) for group in range(8)]
    browser.run(
        f"Plotly.relayout({PLOT}, {{'xaxis.range': [9.5, 29.5], 'yaxis.range': [39.5, 19.5]}})"
        ".then(() => null)"
    )
    named = wait(lambda: browser.run(f"{labels}.length == 176 ? {labels} : null"))
    order = group_order(split)
    assert [label[-3:] for label in named] == [f"{i:03d}" for i in order]  # the telling end stays
    assert all(label.startswith("natural_") and "…" in label for label in named)
    browser.run(
        f"Plotly.relayout({PLOT}, {{'xaxis.autorange': true, 'yaxis.range': [175.5, -0.5]}})"
        ".then(() => null)"
    )
    wait(lambda: browser.run(f"{labels}.length == 8"))
    assert browser.errors == []


@pytest.mark.parametrize("width", [320, 390, 720])
def test_every_width_has_a_page_without_sideways_scrolling(browser, long_names, width):
    file, _ = long_names
    browser.open(file, width=width)
    assert browser.run("document.documentElement.scrollWidth") <= width
    beyond = browser.run(
        "[...document.querySelectorAll('table')].filter(t => !t.closest('.scroll')).length"
    )
    assert beyond == 0 and browser.errors == []


@pytest.mark.parametrize("name", [SMALL, LARGE])
def test_on_a_phone_the_conflict_map_has_the_whole_width(browser, pages, name):
    browser.open(pages[name], width=390)
    side, labelled, bar, bottom = browser.run(
        f"""(() => {{
          const {{ xaxis, yaxis }} = {PLOT}._fullLayout;
          const bar = {PLOT}.querySelector(".cbfills").getBoundingClientRect();
          const frame = {PLOT}.getBoundingClientRect();
          return [xaxis._length, xaxis.showticklabels || yaxis.showticklabels,
            bar.top - frame.top, yaxis._offset + yaxis._length];
        }})()"""
    )
    assert side > 0.85 * 390 and not labelled
    assert bar >= bottom


def test_links_download_the_files_next_to_the_page(browser, tmp_path):
    page = tmp_path / "made" / "report.html"
    loads = tmp_path / "loads"
    page.parent.mkdir()
    loads.mkdir()
    write(page, SPLITS[SMALL], make_evaluation(SPLITS[SMALL]))
    browser.open(page)
    browser.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(loads))
    names = browser.run("[...document.querySelectorAll('a[download]')].map(a => a.download)")
    assert {"datasets.csv", "pairs.csv", "arms.csv", "report.json"} <= set(names)
    for name in names:
        browser.run(f"document.querySelector('a[download=\"{name}\"]').click()")
        load = wait(lambda name=name: (loads / name).exists() and (loads / name).read_bytes(), 20)
        if name.endswith(".json"):
            assert load == (page.parent / name).read_bytes()
            continue
        with (loads / name).open(newline="") as got, (page.parent / name).open(newline="") as kept:
            for mine, theirs in zip(csv.reader(got), csv.reader(kept), strict=True):
                assert [parsed(cell) for cell in mine] == [parsed(cell) for cell in theirs]
    assert browser.errors == []


def parsed(cell):
    try:
        return float(cell)
    except ValueError:
        return cell


def test_names_are_text_in_the_figures(browser, tmp_path):
    name = "<img src=x onerror=missing()> %{z} & co"
    split = make_split(6, 2, first_name=name)
    write(tmp_path / "r.html", split)
    browser.open(tmp_path / "r.html")
    at = group_order(split).index(0)
    assert hover(browser, "conflicts", at, at)[0] == f"{name} (group {split.datasets[0].group})"
    assert hover(browser, "axes", *split.scores[0][:2])[0] == name
    labels = browser.run('document.querySelector(`[data-spec="tree-data"]`).textContent')
    assert "<img" in labels and browser.errors == []


def test_a_split_without_a_control_hovers(browser, tmp_path):
    split = replace(make_split(6, 3), controls=(), num_splits=1)
    write(tmp_path / "r.html", split)
    browser.open(tmp_path / "r.html")
    group = f"group {split.datasets[2].group}"
    assert hover(browser, "axes", *split.scores[2][:2])[1] == group
    assert browser.errors == []
