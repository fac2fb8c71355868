"""The report's tables: every string against the manifests."""

import math
import subprocess
import sys
from dataclasses import replace

from support.report.manifests import (
    CASES,
    Page,
    make_audit,
    make_evaluation,
    make_split,
    make_tuned,
    write,
)

from merit_fast.manifests.schemas import (
    ArmResult,
    DatasetResult,
    EvaluateManifest,
    MergingGain,
)
from merit_fast.report import audit_sentence, gain_rows, results_rows
from merit_fast.report.split_tables import (
    group_rows,
    separation_rows,
    split_rows,
)
from merit_fast.report.tables import audit_rows, branch_rows, dataset_result_rows, tuning_rows


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
        counted = {
            "trained tokens": arm.num_tokens,
            "train s": arm.train_s,
            "peak GiB": arm.peak_memory_bytes / 2**30,
        }
        if name == "base":
            assert cell == dict.fromkeys(counted, "–")
        else:
            assert int(cell["trained tokens"].replace(",", "")) == arm.num_tokens
            assert abs(float(cell["train s"].replace(",", "")) - arm.train_s) <= 0.0501
            assert cell["peak GiB"] == "1.50"
        assert set(cell) == set(counted)


def test_branches_are_shown_without_the_retention_that_is_not_measured():
    evaluation = make_evaluation(make_split(6, 2))
    columns, rows = branch_rows(evaluation)
    assert columns[:3] == ("branch", "loss", "exact match %")
    assert not {"text loss", "chat NLL", "answer length"} & set(columns)
    assert [row[0] for row in rows] == list(evaluation.branches)
    assert all(len(row) == len(columns) for row in rows)


def test_results_formats():
    evaluation = EvaluateManifest(
        arms={
            "joint": ArmResult(
                1.55249, 1.5, 0.3614, 3.647, math.nan, 12.04, 27.666, 59_899, 0, 0, 1234.56, 2**31
            )
        },
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
def test_tables_reach_the_page(tmp_path, split, evaluated):
    evaluation = make_evaluation(split) if evaluated else None
    audit = make_audit() if evaluated else None
    tuned = make_tuned() if evaluated else None
    rows = {
        tuple(row)
        for row in Page(
            write(tmp_path / "r.html", split, evaluation, audit=audit, tuned=tuned)
        ).rows
    }
    steps = (
        [evaluation.branches[f"merit-{k}"].steps for k in range(split.groups)]
        if evaluation
        else None
    )
    expected = [group_rows(split, steps), split_rows(split)]
    if split.separations:
        expected.append(separation_rows(split))
    if evaluation:
        expected += [
            results_rows(evaluation),
            gain_rows(evaluation),
            audit_rows(audit),
            tuning_rows(tuned),
        ]
        assert set(dataset_result_rows(split, evaluation)[1]) <= rows
    for columns, body in expected:
        assert {columns, *body} <= rows


def test_audit_rows_are_the_manifest():
    columns, rows = audit_rows(make_audit())
    assert columns[-2:] == ("noise 0.01", "noise 0.1")
    assert rows[0] == (
        "merit", "0.1000", "0.0980", "1.020", "yes", "0.0123", "3.25", "0.310", "+0.0004", "+0.0456"
    )  # fmt: skip
    assert rows[1][:5] == ("random", "0.1000", "0.0500", "2.000", "no")
    inside, outside = map(audit_sentence, make_audit().arms.values())
    assert (
        "ratio 1.020: the branches lie in one" in inside
        and "ratio 2.000, more than 10 % off 1" in outside
    )


def test_tuning_rows_are_the_manifests():
    columns, rows = tuning_rows(make_tuned())
    assert columns == (
        "merged arm",
        "chosen",
        "before",
        "loss before",
        "fitted",
        "loss there",
        "taken",
        "losses tried",
    )
    assert rows == (
        ("random", "weights", "0.5 0.5", "2.5000", "0.3125 0.6875", "2.8750", "0.5 0.5",
         "2.7500, –, 2.6250"),
        ("random", "scale", "1", "2.0000", "–", "–", "1.5",
         "3.0000 at 0.5, 2.0000 at 1, 1.0000 at 1.5"),
        ("merit", "weights", "0.5 0.5", "2.5000", "0.3125 0.6875", "2.2500", "0.3125 0.6875",
         "2.7500, –, 2.6250"),
        ("merit", "scale", "1", "2.2500", "1.25", "2.1250", "1.25",
         "2.5000 at 0.5, 2.2500 at 1, 2.3750 at 1.5, 2.1250 at 1.25"),
    )  # fmt: skip


def test_dataset_rows_show_absent_and_extra_datasets():
    split = make_split(4, 1)
    evaluation = make_evaluation(split)
    base = evaluation.arms["base"]
    extra = {**base.datasets, "other": DatasetResult(1.25, 0.5, 10, 2)}
    del extra["task_001"]
    columns, rows = dataset_result_rows(
        split, replace(evaluation, arms={"base": replace(base, datasets=extra)})
    )
    assert columns == ("dataset", "base loss", "base exact match %")
    assert [row[0] for row in rows] == ["task_000", "task_001", "task_002", "task_003", "other"]
    assert rows[1][1:] == ("–", "–")
    assert rows[4][1:] == ("1.250", "50.0")


def test_tables_need_no_plotly():
    code = "import sys, merit_fast.report as r, merit_fast.report.tables; r.results_rows; "
    code += "assert not {'plotly', 'jinja2', 'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
