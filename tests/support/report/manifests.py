"""Split and evaluation manifests, and a reader of the page, for the tests of the report."""

import json
import math
import random
from collections.abc import Iterable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from merit_fast.manifests.schemas import (
    ArmResult,
    AuditManifest,
    Barrier,
    DatasetResult,
    EvaluateManifest,
    GroupCount,
    MergeAudit,
    MergingGain,
    ScaleSearch,
    SplitDataset,
    SplitManifest,
    TuneManifest,
    WeightSearch,
)
from merit_fast.report import write_report

EVIL = "<script>alert(1)</script>"


def make_split(
    number: int,
    groups: int,
    first_name: str = "",
    seed: int = 0,
    *,
    unresolved: int = 0,
    spread: int = 0,
) -> SplitManifest:
    """Datasets around one direction per group.

    The first ``unresolved`` are noise; the last ``spread`` belong to all groups.
    """
    draw = random.Random(seed)
    label = [(i * 7) % groups if i < number - spread else -1 for i in range(number)]
    centers = [[draw.gauss(0, 1) for _ in range(6)] for _ in range(groups + 1)]
    points = [_unit([c + draw.gauss(0, 0.7) for c in centers[label[i]]]) for i in range(number)]
    cosine: list[list[float | None]] = [[_dot(a, b) for b in points] for a in points]
    error: list[list[float | None]] = [[0.0] * number for _ in range(number)]
    for i in range(number):
        cosine[i][i] = 1.0
        for j in range(i):
            error[i][j] = error[j][i] = draw.uniform(0.01, 0.2)
    for i in range(number):
        for j in range(number):
            if i < unresolved or j < unresolved:
                cosine[i][j] = error[i][j] = None
    datasets = _make_datasets(draw, label, groups, first_name, unresolved)
    pairs = [
        (cosine[i][j], error[i][j], label[i] == label[j]) for i in range(number) for j in range(i)
    ]
    known = [(c, e, together) for c, e, together in pairs if c is not None and e is not None]
    scores = tuple((point[0], point[1], point[2]) for point in points)
    return SplitManifest(
        groups=groups,
        datasets=datasets,
        method="pca-swap",
        balance="tokens",
        reason="",
        note="",
        sketched_at="at the base model",
        similarity=tuple(map(tuple, cosine)),
        similarity_errors=tuple(map(tuple, error)),
        negative_pair_fraction=_share(c < 0 for c, _, _ in known),
        certain_negative_fraction=_share(c + 2 * e < 0 for c, e, _ in known),
        within_cosine=_mean(c for c, _, together in known if together),
        across_cosine=_mean(c for c, _, together in known if not together),
        explained_variance=(0.4, 0.2, 0.1),
        scores=scores,
        score_errors=tuple(tuple(draw.uniform(0.01, 0.15) for _ in row) for row in scores),
        cuts=(),
        separations=tuple(
            GroupCount(k, 0.42 + 0.02 * k, 0.36 + 0.01 * k, 0.01 * k, 0.011)
            for k in sorted({2, 4, 8, groups} - {1})
        ),
        controls=(tuple((i * 3 + 1) % groups for i in range(number)),),
        num_splits=None,
        base_fingerprint="b" * 32,
        start_fingerprint="b" * 32,
        mixture_fingerprint="c" * 32,
    )


def _make_datasets(
    draw: random.Random, label: list[int], groups: int, first_name: str, unresolved: int
) -> tuple[SplitDataset, ...]:
    """One dataset per label, with figures drawn at random."""
    return tuple(
        SplitDataset(
            name=first_name if first_name and i == 0 else f"task_{i:03d}",
            group=label[i],
            num_examples=draw.randint(100, 5_000),
            num_target_tokens=draw.randint(1_000, 200_000),
            num_sketched_examples=draw.randint(32, 200),
            mean_loss=draw.uniform(0.5, 6),
            gradient_norm=None if i < unresolved else draw.uniform(5, 50),
            signal_fraction=draw.uniform(-0.05, 0.1) if i < unresolved else draw.uniform(0.4, 1),
            signal_error=draw.uniform(0.06, 0.2) if i < unresolved else draw.uniform(0.01, 0.1),
            more_examples=draw.randint(100, 4_000) if i < unresolved else 0,
            margin=0.0 if label[i] < 0 or groups == 1 else draw.uniform(-0.001, 0.02),
            stability=draw.uniform(0.6, 1),
        )
        for i in range(len(label))
    )


def median_cuts(split: SplitManifest, *cuts: tuple[int, float]) -> SplitManifest:
    return replace(split, method="pca-median", balance="samples", cuts=cuts)


def make_audit() -> AuditManifest:
    barriers = (Barrier("merit-0", "merit-1", 0.0123), Barrier("merit-0", "merit-2", -0.002))
    noise = ((0.01, 0.0004), (0.1, 0.0456))
    inside = MergeAudit(0.1, 0.098, (1.9, 2.1), 1.9, barriers, noise, 3.25, 0.31, 128)
    return AuditManifest({"merit": inside, "random": replace(inside, predicted_gain=0.05)})


def make_tuned() -> dict[str, TuneManifest]:
    branches = ("merit-0", "merit-1")
    start = (0.5, 0.5)
    fitted = (0.3125, 0.6875)
    by = WeightSearch(start, 2.5, (start,) * 3, (2.75, None, 2.625), fitted, 2.25, True)
    along = ScaleSearch((0.5, 1.0, 1.5, 1.25), (2.5, 2.25, 2.375, 2.125), 1.25)
    kept = replace(by, fitted_loss=2.875, accepted=False)
    return {
        "random": TuneManifest(
            branches, start, 1.5, 9, 90, kept, ScaleSearch((0.5, 1.0, 1.5), (3.0, 2.0, 1.0), None)
        ),
        "merit": TuneManifest(branches, fitted, 1.25, 9, 90, by, along),
    }


def _unit(vector: list[float]) -> list[float]:
    length = math.sqrt(_dot(vector, vector))
    return [value / length for value in vector]


def _dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def _share(flags: Iterable[bool]) -> float:
    flags = list(flags)
    return sum(flags) / len(flags) if flags else 0.0


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None


def make_evaluation(split: SplitManifest, arm: str = "merit") -> EvaluateManifest:
    draw = random.Random(1)

    def result(trained: bool) -> ArmResult:
        return ArmResult(
            loss=draw.uniform(1, 6),
            token_loss=draw.uniform(1, 6),
            exact_match=draw.random(),
            text_loss=draw.uniform(3, 4),
            chat_nll=draw.uniform(0.6, 1.3),
            answer_length_tokens=draw.uniform(4, 48),
            displacement=draw.uniform(1, 30) if trained else 0.0,
            num_tokens=draw.randint(10**5, 10**7) if trained else 0,
            num_target_tokens=59_899 if trained else 0,
            steps=174 if trained else 0,
            train_s=draw.uniform(100, 2_000) if trained else 0.0,
            peak_memory_bytes=3 * 2**29 if trained else 0,
            datasets={
                row.name: DatasetResult(draw.uniform(0, 3), draw.random(), 100, 24)
                for row in split.datasets
            },
        )

    def of_branch() -> ArmResult:
        return replace(result(True), text_loss=None, chat_nll=None, answer_length_tokens=None)

    return EvaluateManifest(
        arms={
            "base": result(False),
            "joint": result(True),
            arm: result(True),
            "random": result(True),
        },
        branches={f"{arm}-{k}": of_branch() for k in range(split.groups)},
        merging_gain={
            name: MergingGain(
                draw.random(),
                draw.uniform(2, 4),
                draw.uniform(1, 2),
                (1 / split.groups,) * split.groups,
            )
            for name in (arm, "random")
        },
    )


class Page(HTMLParser):
    """The tags with attributes, the visible text, the table rows, and the scripts by id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.scripts: dict[str, str] = {}
        self._script: str | None = None
        self._cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._script = dict(attrs).get("id") or f"{tag} {len(self.scripts)}"
            self.scripts[self._script] = ""
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._script = None
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        if self._script is not None:
            self.scripts[self._script] += data
            return
        self.text += data
        if self._cell:
            self.rows[-1][-1] += data

    def json(self, name: str) -> Any:
        """The JSON of a script element."""
        return json.loads(self.scripts[f"{name}-data"])


def write(
    path: Path, split: SplitManifest, evaluation: EvaluateManifest | None = None, **options: Any
) -> str:
    """Writes a report and returns its HTML."""
    write_report(split, evaluation, path, **{"title": "a run", "notes": ["seed 17"], **options})
    return path.read_text(encoding="utf-8")


CASES = pytest.mark.parametrize(
    ("split", "evaluated"),
    [
        (make_split(6, 2), True),
        (median_cuts(make_split(6, 4), (0, 0.25), (1, -0.5), (1, 0.1)), False),
        (make_split(136, 8, unresolved=9), True),
        (make_split(136, 34, spread=3), False),
        (make_split(2, 2), True),
        (make_split(8, 8, unresolved=8), True),
        (
            replace(
                make_split(5, 1),
                separations=(),
                reason="splitting would not help: too few datasets",
            ),
            True,
        ),
        (make_split(6, 3, spread=6), False),
    ],
    ids=[
        "6-in-2",
        "6-in-4-medians",
        "136-in-8",
        "136-in-34",
        "one-each",
        "none-resolved",
        "one-group",
        "iid",
    ],
)
