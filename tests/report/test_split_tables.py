"""The report's tables of the split: every string against the manifest."""

from dataclasses import replace

import pytest
from support.report.manifests import (
    Page,
    make_split,
    write,
)

from merit_fast.manifests.schemas import (
    GroupCount,
    SharedRows,
    TriedNumber,
)
from merit_fast.report import verdict
from merit_fast.report.split_tables import (
    group_rows,
    separation_rows,
    tried_rows,
)
from merit_fast.report.summary import rows_sentences, small_margins


def figure(cell):
    return float(cell.split()[0].replace(",", ""))


@pytest.mark.parametrize("spread", [0, 5])
def test_group_rows_add_up_to_the_mixture(spread):
    split = make_split(136, 8, spread=spread)
    columns, rows = group_rows(split)
    assert columns == (
        "group",
        "datasets",
        "examples",
        "target tokens",
        "share",
        "cosine within",
        "cosine to others",
    )
    assert sum(figure(row[1]) for row in rows) == 136 - spread
    assert all(row[1].endswith(f" + {spread} in part") for row in rows) == bool(spread)
    for column, total in (
        (2, sum(row.num_examples for row in split.datasets)),
        (3, sum(row.num_target_tokens for row in split.datasets)),
    ):
        assert abs(sum(figure(row[column]) for row in rows) - total) <= (4 if spread else 0)
    assert abs(sum(figure(row[4]) for row in rows) - 100) < 0.5


def test_group_rows_show_steps_and_cosines_of_resolved_pairs():
    split = make_split(5, 2, unresolved=1)  # groups 0 1 0 1 0; dataset 0 is not resolved
    columns, rows = group_rows(split, [120, 98])
    cell = [dict(zip(columns, row, strict=True)) for row in rows]
    assert [row["steps"] for row in cell] == ["120", "98"]
    s = split.similarity
    assert cell[0]["cosine within"] == f"{s[2][4]:+.3f}"
    assert cell[1]["cosine within"] == f"{s[1][3]:+.3f}"
    across = (s[1][2] + s[1][4] + s[3][2] + s[3][4]) / 4
    assert {row["cosine to others"] for row in cell} == {f"{across:+.3f}"}
    alone = group_rows(make_split(2, 2))[1]
    assert [row[-2] for row in alone] == ["–", "–"]


def test_separation_rows_mark_the_chosen_number_and_what_is_not_known():
    split = replace(
        make_split(12, 4),
        separations=(GroupCount(2, 0.5, 0.04, 0.02, 0.01), GroupCount(4, 0.6, None, None, None)),
    )
    assert separation_rows(split)[1] == (
        ("2", "0.5000", "0.0400", "0.0200 ± 0.0100", "+2.0"),
        ("4 (chosen)", "0.6000", "–", "–", "–"),
    )


def test_a_split_that_no_control_differs_from_is_called_the_same():
    """Rounding over rounding is no deviation: 0.9262 against 0.9262 ± 0."""
    rounded = GroupCount(4, 0.9262, 0.9262, 0.9262 - 1e-16, 1e-16, 200, 100)
    only = GroupCount(4, 0.6, 0.9262, None, None, 0, 0, num_splits=1)
    for count in (rounded, only):
        split = replace(make_split(12, 4), separations=(count,))
        assert separation_rows(split)[1][0][-1] == "the same"
    apart = GroupCount(4, 0.6, 0.5, 0.3, 0.0, 200, 200)
    assert separation_rows(replace(make_split(12, 4), separations=(apart,)))[1][0][-1] == "–"


def test_tried_rows_show_both_contrasts():
    tried = (
        TriedNumber(2, 0.5, -0.3, 0.01, 1, -0.3, 0.8, 0.02, taken=True),
        TriedNumber(4, None, 0.1, 0.02, 2, None, None, None),
    )
    split = replace(make_split(12, 2), numbers_tried=tried)
    assert tried_rows(split)[1] == (
        ("2 (chosen)", "+0.500", "-0.300 ± 0.010", "1 group", "-0.300", "0.800 ± 0.020"),
        ("4", "–", "0.100 ± 0.020", "2 groups", "–", "–"),
    )


def test_the_page_shows_the_numbers_tried_noise_scales_and_suggested_shares(tmp_path):
    split = make_split(6, 2)
    rows = tuple(
        replace(
            row,
            noise_scale=1234.0,
            noise_scale_error=56.0,
            suggested_share=0.25,
            suggested_share_error=0.0125,
        )
        for row in split.datasets
    )
    tried = (TriedNumber(2, 0.5, -0.3, 0.01, 1, -0.3, 0.8, 0.02, taken=True),)
    split = replace(
        split, datasets=rows, numbers_tried=tried, noise_scale=99.0, noise_scale_error=9.0
    )
    page = Page(write(tmp_path / "r.html", split, None))
    shown = {tuple(row) for row in page.rows}
    assert tried_rows(split)[1][0] in shown
    cells = [row for row in shown if row[0] == rows[0].name and "1,234 ± 56" in row]
    assert any("0.2500 ± 0.0125" in row for row in cells)
    text = " ".join(verdict(split))
    assert "noise scale of the mixture is 99 ± 9 examples" in text
    assert "the pairs that they part have a mean cosine of -0.300 ± 0.010" in text


def test_small_margins_are_those_near_a_border():
    split = make_split(6, 2, spread=1)
    margins = (0.10, 0.0001, -0.01, 0.12, 0.09, 0.0)
    rows = tuple(
        replace(row, margin=margin, num_target_tokens=1000)
        for row, margin in zip(split.datasets, margins, strict=True)
    )
    split = replace(split, datasets=rows)
    assert [row.name for row in small_margins(split)] == [
        "task_002",
        "task_001",
    ]  # not the one dealt to all
    light = replace(split, datasets=(*rows[:1], replace(rows[1], num_target_tokens=1), *rows[2:]))
    assert [row.name for row in small_margins(light)] == [
        "task_002"
    ]  # a small dataset has a small margin anywhere
    assert small_margins(make_split(5, 1)) == []


def test_rows_of_unlike_lengths_and_shared_rows_are_named(tmp_path):
    split = make_split(4, 2)
    assert rows_sentences(split) == ()
    first, *others = split.datasets
    odd = replace(first, median_length=26, long_length=3400, weighting_cosine=0.549)
    even = replace(others[0], median_length=9, long_length=9, weighting_cosine=0.95)
    split = replace(
        split,
        datasets=(odd, even, *others[1:]),
        weight="tokens",
        shared_rows=(SharedRows(odd.name, even.name, 2), SharedRows(odd.name, "z", 41)),
    )
    unlike, shared = rows_sentences(split)
    assert f"{odd.name} (0.549; median 26 tokens, 95 % at most 3,400)" in unlike
    assert even.name not in unlike and "long rows decide, as in training" in unlike
    assert f"{odd.name} and z (41), {odd.name} and {even.name} (2)" in shared
    by_examples = rows_sentences(replace(split, weight="examples"))[0]
    assert "counts every row once" in by_examples and "split.weight: tokens" in by_examples
    page = Page(write(tmp_path / "r.html", split, None))
    assert any(row[0] == odd.name and {"26", "3,400", "0.549"} <= set(row) for row in page.rows)
    assert set(verdict(split)) >= {unlike, shared}
