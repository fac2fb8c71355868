"""The data files next to the page, and pages of unusual splits: their size, their first words."""

import csv
import json
from dataclasses import replace

import pytest
from support.report.manifests import (
    Page,
    make_audit,
    make_evaluation,
    make_split,
    make_tuned,
    write,
)

from merit_fast.report.advice import advise
from merit_fast.report.split_tables import control_note, split_rows
from merit_fast.report.stage import stacked


def read_csv(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def number(text):
    return None if text == "" else float(text)


def close(value):
    return None if value is None else pytest.approx(value, rel=1e-5)


def test_files_hold_the_numbers_of_the_manifests(tmp_path):
    split = make_split(12, 4, first_name='a, "quoted" name', unresolved=2, spread=1)
    evaluation = make_evaluation(split)
    page = Page(write(tmp_path / "report.html", split, evaluation))
    rows = read_csv(tmp_path / "datasets.csv")
    assert [row["dataset"] for row in rows] == [row.name for row in split.datasets]
    for row, dataset, scores in zip(rows, split.datasets, split.scores, strict=True):
        assert int(row["num_examples"]) == dataset.num_examples
        assert number(row["gradient_norm"]) == close(dataset.gradient_norm)
        assert number(row["axis_1"]) == close(scores[0])
    names = [row.name for row in split.datasets]
    pairs = read_csv(tmp_path / "pairs.csv")
    assert len(pairs) == 12 * 11 // 2
    for row in pairs:
        i = names.index(row["dataset"])
        j = names.index(row["other_dataset"])
        assert number(row["cosine"]) == close(split.similarity[i][j])
        assert number(row["error"]) == close(split.similarity_errors[i][j])
    arms = read_csv(tmp_path / "arms.csv")
    assert [row["arm"] for row in arms] == list(evaluation.arms)
    for row in arms:
        result = evaluation.arms[row["arm"]]
        assert number(row["loss"]) == close(result.loss)
        assert number(row["peak_memory_bytes"]) == result.peak_memory_bytes
    data = json.loads((tmp_path / "report.json").read_text())
    assert data == page.json("report") and data["state"] == "after evaluation"
    assert (tmp_path / "report.json").read_text() == page.scripts["report-data"]
    links = [attributes["download"] for _, attributes in page.tags if "download" in attributes]
    assert set(links) == {path.name for path in tmp_path.iterdir()} - {"report.html"}


def test_a_page_before_training_opens_with_the_advice(tmp_path):
    split = make_split(12, 4)
    page = Page(write(tmp_path / "report.html", split))
    advice = advise(split)
    first = page.text.index(advice.sentence)
    assert first < page.text.index("Before training: this page is made of the split only")
    assert first < page.text.index("Conflict between datasets")
    for reason in advice.reasons:
        assert reason in page.text
    assert not (tmp_path / "arms.csv").exists()
    assert json.loads((tmp_path / "report.json").read_text())["state"] == "before training"


def test_a_page_of_176_datasets_stays_below_six_megabytes(tmp_path):
    split = make_split(176, 8, unresolved=9)
    rows = [
        replace(row, name=f"natural_instructions_{i:03d}_with_a_name_of_fifty_letters")
        for i, row in enumerate(split.datasets)
    ]
    split = replace(split, datasets=tuple(rows))
    evaluation = make_evaluation(split)
    text = write(tmp_path / "r.html", split, evaluation, audit=make_audit(), tuned=make_tuned())
    assert len(text.encode()) < 6_000_000


def test_a_split_without_a_control_has_tables_and_a_note(tmp_path):
    split = replace(make_split(6, 3), controls=(), num_splits=1)
    page = Page(write(tmp_path / "r.html", split, make_evaluation(split)))
    note = "No random control: no other balanced split of these datasets exists."
    assert page.text.count(note) == 2
    assert "random" not in split_rows(split)[0]
    assert page.json("report")["split"]["controls"] == []


def test_controls_drawn_from_few_splits_are_counted(tmp_path):
    split = make_split(6, 2)
    assert control_note(split) == ""
    few = replace(split, num_splits=3)
    assert control_note(few) == (
        "The random control is 1 of 2: only 2 other balanced splits exist."
    )
    both = replace(few, controls=(split.controls[0], tuple(1 - k for k in split.controls[0])))
    assert control_note(both).startswith("The 2 random controls are 2 of 2")
    assert {"random", "random2"} <= set(split_rows(both)[0])
    assert control_note(few) in Page(write(tmp_path / "r.html", few)).text
    assert control_note(replace(split, num_splits=4000)) == ""


def test_one_dataset_has_a_page(tmp_path):
    split = replace(make_split(1, 1), separations=(), controls=(), num_splits=1)
    page = Page(write(tmp_path / "r.html", split, make_evaluation(split)))
    assert "One dataset has no pairs." in page.text
    assert read_csv(tmp_path / "pairs.csv") == []


def test_a_cosine_beyond_one_is_shown_as_one_and_kept_in_the_files(tmp_path):
    split = make_split(6, 2)
    rows = [list(row) for row in split.similarity]
    rows[1][2] = rows[2][1] = 1.172
    split = replace(split, similarity=tuple(map(tuple, rows)), within_cosine=1.056)
    page = Page(write(tmp_path / "r.html", split))
    error = split.similarity_errors[1][2]
    assert any(row[-1] == f"+1.000 ± {error:.3f}" for row in page.rows)
    assert "1.172" not in page.text and "1.056" not in page.text
    assert "shown as at most 1.000" in page.text
    assert any(row["cosine"] == "1.172" for row in read_csv(tmp_path / "pairs.csv"))
    assert "shown as at most" not in Page(write(tmp_path / "r.html", make_split(6, 2))).text


@pytest.mark.parametrize("width", [40, 60, 100, 200])
def test_terminal_tables_fit_and_lose_nothing(width):
    table = (
        ("arm", "loss", "exact match %", "displacement", "trained tokens"),
        (("joint@0.25", "1.552 ± 0.012", "36.1 ± 0.4", "27.67 ± 0.11", "59,899"),),
    )
    blocks = stacked(table, width)
    assert sum((block[0][1:] for block in blocks), ()) == table[0][1:]
    assert sum((block[1][0][1:] for block in blocks), ()) == table[1][0][1:]
    assert {block[1][0][0] for block in blocks} == {"joint@0.25"}
    for columns, rows in blocks:
        widest = [
            max(len(cell), *map(len, column.split()))
            for column, cell in zip(columns, rows[0], strict=True)
        ]
        assert sum(widest) + 2 * (len(widest) - 1) <= width
    assert len(stacked(table, 200)) == 1
