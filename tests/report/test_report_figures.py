"""The report's figures: the numbers that the page embeds for plotly."""

import math
import re
from dataclasses import replace

import pytest
from support.report.manifests import (
    CASES,
    Page,
    make_evaluation,
    make_split,
    median_cuts,
    write,
)

from merit_fast.report.style import THEMES, group_color, group_symbol


def page_of(folder, split, evaluation=None):
    return Page(write(folder / "r.html", split, evaluation))


def short(value):
    return None if value is None else pytest.approx(value, rel=1e-5)


@CASES
def test_every_cosine_is_in_the_page_once_with_its_error(tmp_path, split, evaluated):
    cosines = page_of(tmp_path, split).json("report")["cosines"]
    for key, square in (("values", split.similarity), ("errors", split.similarity_errors)):
        assert cosines[key] == [
            [short(value) for value in row[: i + 1]] for i, row in enumerate(square)
        ]


@CASES
def test_rows_keep_groups_together_or_follow_the_tree(tmp_path, split, evaluated):
    page = page_of(tmp_path, split)
    orders = page.json("conflicts")["layout"]["meta"]["orders"]
    tree = page.json("tree")["data"][2]["meta"]["datasets"]
    assert orders["tree"] == tree and sorted(tree) == list(range(len(split.datasets)))
    groups = [split.datasets[i].group for i in orders["group"]]
    assert groups == sorted(groups, key=lambda group: (group < 0, group))
    for group in set(groups):
        assert [i for i in orders["group"] if split.datasets[i].group == group] == [
            i for i in tree if split.datasets[i].group == group
        ]
    colors = page.json("conflicts")["layout"]["meta"]["colors"]
    assert colors == [group_color(row.group) for row in split.datasets]


@CASES
def test_every_dataset_is_in_the_maps_with_its_numbers(tmp_path, split, evaluated):
    page = page_of(tmp_path, split)
    everyone = range(len(split.datasets))
    table = page.json("report")["datasets"]
    for i, cells in enumerate(table["rows"]):
        cell = dict(zip(table["columns"], cells, strict=True))
        row = split.datasets[i]
        assert (cell["dataset"], cell["group"]) == (row.name, row.group)
        assert cell["random"] == split.controls[0][i]
        for key in ("num_examples", "mean_loss", "gradient_norm", "signal_error", "margin"):
            assert cell[key] == short(getattr(row, key))
        assert cell["axis_2"] == short(split.scores[i][1])
        assert cell["axis_2_error"] == short(split.score_errors[i][1])

    points = [trace for trace in page.json("axes")["data"] if "meta" in trace]
    shown = {}
    for trace in points:
        for x, y, i in zip(trace["x"], trace["y"], trace["meta"]["datasets"], strict=True):
            shown[i] = (x, y)
            assert split.datasets[i].group == int(trace["name"].split()[-1].replace("groups", "-1"))
    assert shown == {i: (split.scores[i][0], split.scores[i][1]) for i in everyone}

    panels = page.json("datasets")["data"]
    order = page.json("datasets")["layout"]["meta"]["rows"]
    for trace in panels:
        assert trace["meta"]["datasets"] == order and trace["y"] == list(everyone)
    rows = [split.datasets[i] for i in order]
    assert panels[0]["x"] == [row.signal_fraction for row in rows]
    assert panels[0]["error_x"]["array"] == [row.signal_error for row in rows]
    assert [panel["x"] for panel in panels[1:]] == [
        [row.stability for row in rows],
        [row.margin for row in rows],
    ]
    assert (
        page.json("tree")["layout"]["meta"]["rows"]
        == (page.json("tree")["data"][2]["meta"]["datasets"])
    )


def test_ellipses_are_one_standard_error_wide(tmp_path):
    split = make_split(12, 3, spread=2)
    for outline, points in zip(
        *[iter(page_of(tmp_path, split).json("axes")["data"])] * 2, strict=True
    ):
        assert outline["hoverinfo"] == "skip"
        x = outline["x"]
        y = outline["y"]
        gaps = [i for i, value in enumerate(x) if value is None]
        assert len(gaps) == len(points["x"])
        for begin, end, i in zip(
            [0, *[gap + 1 for gap in gaps]], gaps, points["meta"]["datasets"], strict=False
        ):
            score = split.scores[i]
            error = split.score_errors[i]
            for px, py in zip(x[begin:end], y[begin:end], strict=True):
                distance = ((px - score[0]) / error[0]) ** 2 + ((py - score[1]) / error[1]) ** 2
                assert math.isclose(distance, 1, rel_tol=2e-3)


@CASES
def test_separation_of_every_number_of_groups_with_its_null(tmp_path, split, evaluated):
    page = page_of(tmp_path, split)
    if not split.separations:
        assert "separations-data" not in page.scripts
        assert "No number of groups was measured." in page.text
        return
    null, crossed, debiased = page.json("separations")["data"]
    tried = split.separations
    for trace in (null, crossed, debiased):
        assert trace["x"] == [str(row.groups) for row in tried]
    assert null["y"] == [row.null_mean for row in tried]
    assert null["error_y"]["array"] == [2 * row.null_std for row in tried]
    assert null["customdata"] == [[row.null_mean, row.null_std] for row in tried]
    assert crossed["y"] == [row.cross_validated for row in tried]
    assert debiased["y"] == [row.eta_squared for row in tried]
    (line,) = page.json("separations")["layout"]["shapes"]
    assert null["x"][line["x0"]] == str(split.groups)


@CASES
def test_bars_are_shares_of_the_mixture(tmp_path, split, evaluated):
    evaluation = make_evaluation(split) if evaluated else None
    page = page_of(tmp_path, split, evaluation)
    bars = {trace["name"]: trace for trace in page.json("balance")["data"]}
    assert set(bars) == {"target tokens", "examples"} | (
        {"optimizer steps"} if evaluated else set()
    )
    spread = [row for row in split.datasets if row.group < 0]
    for name, key in (("target tokens", "num_target_tokens"), ("examples", "num_examples")):
        total = sum(getattr(row, key) for row in split.datasets)
        for group in range(split.groups):
            amount = sum(getattr(row, key) for row in split.datasets if row.group == group)
            amount += sum(getattr(row, key) for row in spread) / split.groups
            assert abs(bars[name]["customdata"][group][0] - amount) <= 0.51
            assert math.isclose(bars[name]["y"][group], 100 * amount / total)
    for trace in bars.values():
        assert math.isclose(sum(trace["y"]), 100)
    if evaluated:
        assert [cell[0] for cell in bars["optimizer steps"]["customdata"]] == [
            evaluation.branches[f"merit-{k}"].steps for k in range(split.groups)
        ]


def test_a_tree_joins_what_agrees_first(tmp_path):
    split = make_split(4, 2)
    cosine = (
        (1.0, 0.1, 0.9, None),
        (0.1, 1.0, 0.2, -0.4),
        (0.9, 0.2, 1.0, 0.0),
        (None, -0.4, 0.0, 1.0),
    )
    lines, joints, leaves = page_of(tmp_path, replace(split, similarity=cosine)).json("tree")[
        "data"
    ]
    # 0 and 2 join at 0.1, then 1 at the mean of 0.9 and 0.8, then 3 at the mean of 1, 1.4 and 1
    assert joints["x"] == pytest.approx([0.1, 0.85, 3.4 / 3])
    assert [size for (size,) in joints["customdata"]] == [2, 3, 4]
    assert leaves["meta"]["datasets"] == [0, 2, 1, 3]
    assert joints["y"] == [0.5, 1.25, 2.125]
    assert lines["x"].count(None) == 3


def test_many_groups_look_different():
    looks = {(group_color(group), group_symbol(group)) for group in range(-1, 64)}
    assert len(looks) == 65


def test_cuts_bound_the_halves_they_cut(tmp_path):
    split = median_cuts(make_split(8, 4), (0, 0.25), (1, -0.5), (1, 0.75))
    deeper = replace(split, cuts=(*split.cuts, (2, 0.1)))
    for cut_split, has_note in ((split, False), (deeper, True)):
        text = page_of(tmp_path, cut_split).text
        assert ("cuts on axes above 2 are not drawn" in text) == has_note
    layout = Page(write(tmp_path / "r.html", split)).json("axes")["layout"]
    low, high = layout["xaxis"]["range"]
    lines = [{key: line[key] for key in ("x0", "x1", "y0", "y1")} for line in layout["shapes"]]
    bottom, top = layout["yaxis"]["range"]
    assert lines == [
        {"x0": 0.25, "x1": 0.25, "y0": bottom, "y1": top},
        {"x0": low, "x1": 0.25, "y0": -0.5, "y1": -0.5},
        {"x0": 0.25, "x1": high, "y0": 0.75, "y1": 0.75},
    ]


def test_conflict_map_scale(tmp_path):
    layout = Page(write(tmp_path / "r.html", make_split(136, 8))).json("conflicts")["layout"]
    assert (layout["coloraxis"]["cmin"], layout["coloraxis"]["cmax"]) == (-1, 1)


def test_themes_cover_the_same_keys():
    assert THEMES["light"]["layout"].keys() == THEMES["dark"]["layout"].keys()
    for theme in THEMES.values():
        scale = theme["layout"]["coloraxis"]["colorscale"]
        assert [position for position, _ in scale] == [0, 0.25, 0.5, 0.75, 1]
        assert all(re.fullmatch("#[0-9a-f]{6}", color) for _, color in scale)
        assert theme["layout"]["paper_bgcolor"] == "rgba(0,0,0,0)"
