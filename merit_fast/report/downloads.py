"""The report's figures as data: report.json, from which the page draws, and CSV files for others.

Floats have six significant digits. A cosine is the debiased estimate, which noise can carry beyond
1 in size.
"""

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

from merit_fast.errors import InputError
from merit_fast.manifests.schemas import ArmResult, EvaluateManifest, PartConflict, SplitManifest
from merit_fast.report.advice import advise
from merit_fast.report.measured import measured_sentences
from merit_fast.report.split_tables import control_note

DATA_FILE = "report.json"
_MEASURES = ("loss", "token_loss", "exact_match", "text_loss", "chat_nll", "answer_length_tokens")
_COSTS = ("num_tokens", "num_target_tokens", "steps", "train_s", "peak_memory_bytes", "num_seeds")
_PAIR_COLUMNS = ("dataset", "group", "other_dataset", "other_group", "cosine", "error")


def report_data(
    split: SplitManifest, evaluation: EvaluateManifest | None, title: str
) -> dict[str, Any]:
    """Returns the content of report.json.

    A table is {"columns": [...], "rows": [[...], ...]}. ``cosines`` holds the lower triangle: row i
    has dataset i with the datasets 0..i, and so do the parts of the model.
    """
    advice = advise(split, branch_steps(split, evaluation))
    data: dict[str, Any] = {
        "title": title,
        "state": "before training" if evaluation is None else "after evaluation",
        "advice": {
            "advice": advice.advice,
            "sentence": advice.sentence,
            "groups": advice.groups,
            "reasons": list(advice.reasons),
            "next": list(advice.next),
        },
        "measured": [] if evaluation is None else list(measured_sentences(evaluation)),
        "split": {
            "groups": split.groups,
            "method": split.method,
            "balance": split.balance,
            "sketched_at": split.sketched_at,
            "num_splits": split.num_splits,
            "controls": list(split.control_arms),
            "control_note": control_note(split),
        },
        "datasets": _datasets(split),
        "cosines": {
            "values": _triangle(split.similarity),
            "errors": _triangle(split.similarity_errors),
        },
    }
    if split.parts:
        data["parts"] = {name: _part(part) for name, part in split.parts.items()}
    if evaluation is not None:
        data["arms"] = _arms(evaluation)
        data["dataset_results"] = _dataset_results(evaluation)
        data["comparisons"] = _comparisons(evaluation)
    return data


def data_files(data: dict[str, Any]) -> dict[str, str]:
    """The content of every file next to the page: name -> text."""
    files = {
        "datasets.csv": _csv(data["datasets"]["columns"], data["datasets"]["rows"]),
        "pairs.csv": _csv(_PAIR_COLUMNS, _pairs(data)),
    }
    for table, name in (("arms", "arms.csv"), ("comparisons", "comparisons.csv")):
        if table in data:
            files[name] = _csv(data[table]["columns"], data[table]["rows"])
    return files | {DATA_FILE: json_text(data)}


def json_text(data: dict[str, Any]) -> str:
    """The JSON of ``data``, in ASCII, without a character that could end a script element."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def branch_steps(split: SplitManifest, evaluation: EvaluateManifest | None) -> list[int] | None:
    """Optimizer steps [K] of each group's branch; None before all are trained."""
    branches = {} if evaluation is None else evaluation.branches
    steps = [
        branches[name].steps for k in range(split.groups) if (name := f"merit-{k}") in branches
    ]
    return steps if len(steps) == split.groups and all(steps) else None


def check_lengths(split: SplitManifest) -> None:
    """Checks every field of ``split`` that holds one entry per dataset.

    Raises:
        InputError: a length is wrong; names the field.
    """
    number = len(split.datasets)
    axes = len(split.explained_variance)
    squares: list[tuple[str, Sequence[Sequence[float | None]], int]] = [
        ("similarity", split.similarity, number),
        ("similarity_errors", split.similarity_errors, number),
        ("scores", split.scores, axes),
        ("score_errors", split.score_errors, axes),
    ]
    for name, part in split.parts.items():
        squares.append((f"parts.{name}.similarity", part.similarity, number))
        squares.append((f"parts.{name}.similarity_errors", part.similarity_errors, number))
    for key, rows, width in squares:
        widths = {len(row) for row in rows}
        if len(rows) != number or widths != {width}:
            raise InputError(
                f"split.json: {key}: must be [{number}, {width}], "
                f"got {len(rows)} rows of {sorted(widths)}"
            )
    for control in split.controls:
        if len(control) != number:
            raise InputError(f"split.json: controls: must have length {number}, got {len(control)}")
    if axes < 2:
        raise InputError(f"split.json: explained_variance: must have at least two axes, got {axes}")
    for row in split.datasets:
        if not -1 <= row.group < split.groups:
            raise InputError(
                f"split.json: {row.name}: group must be -1 or below {split.groups}, got {row.group}"
            )


def _datasets(split: SplitManifest) -> dict[str, Any]:
    axes = [f"axis_{axis + 1}" for axis in range(len(split.explained_variance))]
    keys = [
        "num_examples",
        "num_target_tokens",
        "num_sketched_examples",
        "mean_loss",
        "gradient_norm",
        "signal_fraction",
        "signal_error",
        "more_examples",
        "margin",
        "stability",
        "noise_scale",
        "noise_scale_error",
        "suggested_share",
        "suggested_share_error",
        "median_length",
        "long_length",
        "weighting_cosine",
    ]
    columns = ["dataset", "group", *split.control_arms, *keys]
    columns += [name for axis in axes for name in (axis, f"{axis}_error")]
    rows = []
    for i, row in enumerate(split.datasets):
        scores = zip(split.scores[i], split.score_errors[i], strict=True)
        rows.append(
            [
                *(row.name, row.group, *(control[i] for control in split.controls)),
                *(_short(getattr(row, key)) for key in keys),
                *(_short(value) for pair in scores for value in pair),
            ]
        )
    return {"columns": columns, "rows": rows}


def _arms(evaluation: EvaluateManifest) -> dict[str, Any]:
    columns = ["arm"]
    for measure in (*_MEASURES, "displacement"):
        columns += [measure, f"{measure}_error"]
    rows = []
    for arm, result in evaluation.arms.items():
        cells: list[Any] = [arm]
        for measure in (*_MEASURES, "displacement"):
            cells += [_short(getattr(result, measure)), _short(result.errors.get(measure))]
        rows.append([*cells, *(_short(getattr(result, cost)) for cost in _COSTS)])
    return {"columns": [*columns, *_COSTS], "rows": rows}


def _dataset_results(evaluation: EvaluateManifest) -> dict[str, Any]:
    def rows_of(arm: str, result: ArmResult) -> list[list[Any]]:
        return [
            [arm, name, _short(row.loss), _short(row.exact_match), row.num_examples]
            for name, row in result.datasets.items()
        ]

    columns = ["arm", "dataset", "loss", "exact_match", "num_examples"]
    rows = [row for arm, result in evaluation.arms.items() for row in rows_of(arm, result)]
    return {"columns": columns, "rows": rows}


def _comparisons(evaluation: EvaluateManifest) -> dict[str, Any]:
    columns = [
        "first",
        "second",
        "measure",
        "difference",
        "item_error",
        "seed_error",
        "num_items",
        "num_seeds",
    ]
    rows = [[_short(getattr(row, column)) for column in columns] for row in evaluation.comparisons]
    return {"columns": columns, "rows": rows}


def _pairs(data: dict[str, Any]) -> Iterable[list[Any]]:
    rows = data["datasets"]["rows"]
    values = data["cosines"]["values"]
    errors = data["cosines"]["errors"]
    for i, first in enumerate(rows):
        for j in range(i + 1, len(rows)):
            second = rows[j]
            yield [first[0], first[1], second[0], second[1], values[j][i], errors[j][i]]


def _part(part: PartConflict) -> dict[str, Any]:
    return {
        "values": _triangle(part.similarity),
        "errors": _triangle(part.similarity_errors),
        "norm_shares": [_short(share) for share in part.norm_shares],
        "sure_conflicts": part.sure_conflicts,
        "sure_conflicts_across": part.sure_conflicts_across,
    }


def _triangle(square: Sequence[Sequence[float | None]]) -> list[list[Any]]:
    return [[_short(value) for value in row[: i + 1]] for i, row in enumerate(square)]


def _short(value: Any) -> Any:
    """A float with six significant digits, None if it is not finite; anything else as it is."""
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return None
    short = float(f"{value:.6g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


def _csv(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """CSV of RFC 4180 with a header and line feeds; None is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()
