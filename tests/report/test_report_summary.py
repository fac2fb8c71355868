"""The report's sentences and the split's lines for a terminal."""

from dataclasses import replace

import pytest
from support.report.manifests import Page, make_split, write

from merit_fast.manifests.schemas import GroupCount
from merit_fast.report import advise, split_lines, verdict
from merit_fast.report.reasons import COSINE_NOTE
from merit_fast.report.split_tables import group_rows, separation_rows
from merit_fast.report.summary import small_margins
from merit_fast.report.tables import percent


def test_verdict_follows_the_figures(tmp_path):
    split = make_split(6, 4)
    calm = replace(split, negative_pair_fraction=0.0)
    sentence = (
        "None of the 15 pairs of datasets conflicts at the base model: "
        "no cosine of mean gradients is below 0."
    )
    assert verdict(calm)[:2] == (advise(calm).sentence, sentence)
    assert sentence in Page(write(tmp_path / "r.html", calm)).text
    assert "that is structure, not conflict" in verdict(calm)[3]

    warm = replace(
        split,
        negative_pair_fraction=0.4,
        certain_negative_fraction=0.25,
        sure_conflicts=3,
        sure_conflicts_across=2,
        sketched_at="after a warm-up",
    )
    assert verdict(warm)[1] == (
        "40.0 % of the 15 pairs of datasets conflict after a warm-up "
        "(their mean gradients have a cosine below 0), "
        "25.0 % by more than two standard errors; 3 of them surely, 2 across groups."
    )
    assert (
        "of the 6 resolved pairs of datasets (of 15) conflict"
        in verdict(make_split(6, 4, unresolved=2))[1]
    )
    assert verdict(make_split(1, 1))[1] == "One dataset has none to conflict with."
    assert verdict(make_split(6, 4, unresolved=6))[1].startswith(
        "The cosine of no pair of datasets is resolved"
    )

    assert "more than two standard deviations above chance (+32.7)" in verdict(split)[2]
    assert percent(0.0) == "0.0 %" and percent(0.0001) == "< 0.1 %"


@pytest.mark.parametrize(
    ("found", "end"),
    [
        (
            GroupCount(4, 0.6, 0.5, 0.25, 0.125),
            ": not more than two standard deviations above chance (+2.0).",
        ),
        (
            GroupCount(4, 0.6, 0.55, 0.25, 0.125),
            ": more than two standard deviations above chance (+2.4).",
        ),
        (
            GroupCount(4, 0.6, 0.1, 0.25, 0.0),
            ": not more than two standard deviations above chance.",
        ),
        (
            GroupCount(4, 0.6, None, None, None),
            "; there are too few examples to tell that from chance.",
        ),
        (
            GroupCount(4, 0.6, 0.5, 0.25, None, 9, 7, 10),
            "; this cannot be judged with 6 datasets: 10 balanced splits exist, p >= 0.1 "
            "(it is better than 7 of 9 others).",
        ),
        (
            GroupCount(4, 0.6, 0.5, None, None, 0, 0, 1),
            "; this cannot be judged with 6 datasets: no other balanced split exists, p >= 1.",
        ),
        (GroupCount(4, None, None, None, None), ": no split can be told from another."),
    ],
    ids=["at-the-bound", "above", "constant-null", "no-halves", "few", "none", "no-spread"],
)
def test_verdict_on_the_separation(found, end):
    assert verdict(replace(make_split(6, 4), separations=(found,)))[2].endswith(end)


def test_verdict_says_why_so_many_groups_and_what_is_out_of_balance():
    one = replace(
        make_split(5, 1), reason="splitting would not help: no split stands out of random ones"
    )
    assert verdict(one)[2] == "Splitting would not help: no split stands out of random ones."
    assert verdict(make_split(5, 1))[2] == "One group was asked for, so nothing is split."
    four = replace(
        make_split(6, 4), reason="4 groups: so it is", note="the tolerance of 0.01 is not kept"
    )
    assert verdict(four)[2] == "The number of groups was chosen automatically: 4 groups: so it is."
    assert verdict(four)[-2] == "Balance: the tolerance of 0.01 is not kept."
    assert (
        "the signal of 2 of 6 datasets is not resolved by so few examples (at least "
        in verdict(make_split(6, 4, unresolved=2))[-1]
    )


def test_split_lines_show_the_split():
    split = make_split(12, 4, unresolved=2, spread=1)
    lines = split_lines(split, [120, 130, 110, 121])
    advice, *said = verdict(split, [120, 130, 110, 121])
    assert lines[0] == advice and list(lines[-len(said) :]) == said
    assert lines[2] == "12 datasets in 4 groups by pca-swap, balanced by tokens:"
    for (columns, rows), first in (
        (group_rows(split, [120, 130, 110, 121]), 3),
        (separation_rows(split), 9),
    ):
        for line, cells in zip(lines[first:], (columns, *rows), strict=False):
            assert line.split("  ")[0] == cells[0] and line.split() == " ".join(cells).split()
        assert (
            len({len(line) for line in lines[first : first + 1 + len(rows)]}) == 1
        )  # figures end in one column
    text = "\n".join(lines)
    assert (
        f"within groups {split.within_cosine:+.3f}, across groups {split.across_cosine:+.3f}"
        in text
    )
    for row in split.datasets[:2]:
        assert (
            f"{row.name}: not resolvable: needs at least {row.more_examples:,} more examples"
            in text
        )
    for row in small_margins(split):
        assert f"{row.name} (margin" in text
    members = [
        line.split(": ")[1].split(", ")
        for line in lines
        if line.startswith(("group ", "all groups")) and ": " in line
    ]
    assert sorted(sum(members, [])) == sorted(row.name for row in split.datasets)


def test_split_lines_of_one_group_give_the_reason_and_no_separation():
    split = replace(
        make_split(5, 1),
        separations=(),
        reason="splitting would not help: there are too few datasets",
    )
    lines = split_lines(split)
    assert lines[2] == "5 datasets in one group:"
    assert "Splitting would not help: there are too few datasets." in lines
    assert not any("across groups" in line or "small margin" in line for line in lines)


def test_split_lines_list_ten_of_many():
    lines = split_lines(make_split(136, 8, unresolved=30))
    (unknown,) = [line for line in lines if "not resolvable" in line]
    assert unknown.count("not resolvable") == 10 and unknown.endswith("; and 20 more")


def test_a_signal_error_that_is_not_known_is_said(tmp_path):
    split = make_split(6, 2)
    row = replace(split.datasets[0], signal_error=None, more_examples=40)
    split = replace(split, datasets=(row, *split.datasets[1:]))
    assert f"{row.signal_fraction:.3f} ± unknown" in Page(write(tmp_path / "r.html", split)).text
    assert any(
        "task_000: not resolvable: needs at least 40 more examples" in line
        for line in split_lines(split)
    )


def test_a_cosine_above_one_is_shown_as_one_and_explained():
    split = make_split(6, 2)
    assert COSINE_NOTE not in split_lines(split)
    lines = split_lines(replace(split, within_cosine=1.056))
    assert COSINE_NOTE in lines
    assert any("within groups +1.000, across groups" in line for line in lines)
