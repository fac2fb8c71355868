"""report/tables and summary: every string against the manifests."""

import math
import subprocess
import sys
from dataclasses import replace

from reports import CASES, Page, make_evaluation, make_split, write

from merit_fast.manifest import (
    ArmResult,
    DatasetResult,
    EvaluateManifest,
    MergingGain,
)
from merit_fast.report import gain_rows, results_rows, verdict
from merit_fast.report.tables import dataset_result_rows, group_rows, percent, split_rows


def test_results_rows_are_the_manifest():
    split = make_split(6, 2)
    evaluation = make_evaluation(split)
    columns, rows = results_rows(evaluation)
    assert columns[0] == "arm"
    assert [row[0] for row in rows] == list(evaluation.arms)
    for name, *cells in rows:
        arm = evaluation.arms[name]
        cell = dict(zip(columns[1:], cells, strict=True))
        close = {
            "loss": arm.loss,
            "exact match %": 100 * arm.exact_match,
            "text loss": arm.text_loss,
            "chat NLL": arm.chat_nll,
            "answer length": arm.answer_length_tokens,
            "displacement": arm.displacement,
        }
        for column, value in close.items():
            assert abs(float(cell.pop(column)) - value) <= 0.0501, column
        counted = {"trained tokens": arm.num_tokens, "train s": arm.train_s, "peak GiB": arm.peak_memory_bytes / 2**30}
        if name == "base":
            assert cell == dict.fromkeys(counted, "–")
        else:
            assert int(cell["trained tokens"].replace(",", "")) == arm.num_tokens
            assert abs(float(cell["train s"].replace(",", "")) - arm.train_s) <= 0.0501
            assert cell["peak GiB"] == "1.50"
        assert set(cell) == set(counted)


def test_results_formats():
    evaluation = EvaluateManifest(
        arms={"joint": ArmResult(1.55249, 1.5, 0.3614, 3.647, math.nan, 12.04, 27.666, 59_899, 0, 0, 1234.56, 2**31)},
        branches={},
        merging_gain={"merit": MergingGain(-1e-9, 2.20304, 1.973, (1.0,))},
    )
    assert results_rows(evaluation)[1] == (
        ("joint", "1.552", "36.1", "3.647", "nan", "12.0", "27.67", "59,899", "1,234.6", "2.00"),
    )
    assert gain_rows(evaluation) == (
        ("merged arm", "merging gain", "mean branch loss", "merged loss"),
        (("merit", "0.0000", "2.2030", "1.9730"),),
    )


@CASES
def test_tables_reach_the_page(tmp_path, number, axes, evaluated):
    split = make_split(number, axes)
    evaluation = make_evaluation(split) if evaluated else None
    rows = {tuple(row) for row in Page(write(tmp_path / "r.html", split, evaluation)).rows}
    expected = [group_rows(split), split_rows(split)]
    if evaluation:
        expected += [results_rows(evaluation), gain_rows(evaluation)]
        assert set(dataset_result_rows(split, evaluation)[1]) <= rows
    for columns, body in expected:
        assert {columns, *body} <= rows


def test_dataset_rows_show_absent_and_extra_datasets():
    split = make_split(4, 1)
    evaluation = make_evaluation(split)
    base = evaluation.arms["base"]
    extra = {**base.datasets, "other": DatasetResult(1.25, 0.5, 10, 2)}
    del extra["task_001"]
    columns, rows = dataset_result_rows(split, replace(evaluation, arms={"base": replace(base, datasets=extra)}))
    assert columns == ("dataset", "base loss", "base exact match %")
    assert [row[0] for row in rows] == ["task_000", "task_001", "task_002", "task_003", "other"]
    assert rows[1][1:] == ("–", "–")
    assert rows[4][1:] == ("1.250", "50.0")


def test_group_rows_add_up():
    split = make_split(136, 3)
    _, rows = group_rows(split)
    for column, total in (
        (1, 136),
        (2, sum(row.num_examples for row in split.datasets)),
        (3, sum(row.num_target_tokens for row in split.datasets)),
    ):
        assert sum(int(row[column].replace(",", "")) for row in rows) == total
    assert abs(sum(float(row[4].split()[0]) for row in rows) - 100) < 0.5


def test_verdict_follows_the_figures(tmp_path):
    split = make_split(6, 2)
    calm = replace(split, negative_pair_fraction=0.0)
    sentence = "No pair of datasets conflicts at the base model: splitting has little to separate here."
    assert verdict(calm)[0] == sentence
    assert sentence in Page(write(tmp_path / "r.html", calm)).text
    assert verdict(replace(split, negative_pair_fraction=0.4))[0].startswith("40.0 % of the 15 pairs")
    assert verdict(split)[1].endswith(": more than two standard deviations above chance.")
    at_bound = replace(split, eta_squared=0.5, eta_squared_null_mean=0.25, eta_squared_null_std=0.125)
    assert verdict(at_bound)[1].endswith(": not more than two standard deviations above chance.")
    assert percent(0.0) == "0.0 %" and percent(0.0001) == "< 0.1 %"


def test_tables_need_no_plotly():
    code = "import sys, merit_fast.report as r, merit_fast.report.tables; r.results_rows; "
    code += "assert not {'plotly', 'jinja2', 'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_split_lines_name_every_dataset_once_and_end_with_the_verdict():
    from merit_fast.report import split_lines, verdict

    split = make_split(6, 2)
    lines = split_lines(split)
    assert lines[-3:] == verdict(split) and len(lines) == split.groups + 3
    named = [name for line in lines[:-3] for name in line.split(": ", 2)[2].split(", ")]
    assert sorted(named) == sorted(row.name for row in split.datasets)
