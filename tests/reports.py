"""Split and evaluation manifests, and a reader of the page, for the tests of the report."""

import json
import random
from html.parser import HTMLParser
from pathlib import Path

import pytest

from merit_fast.manifest import (
    ArmResult,
    DatasetResult,
    EvaluateManifest,
    MergingGain,
    SplitDataset,
    SplitManifest,
)
from merit_fast.report import write_report

EVIL = "<script>alert(1)</script>"


def make_split(number: int, axes: int, first_name: str = "", seed: int = 0) -> SplitManifest:
    draw = random.Random(seed)
    groups = 2**axes
    cosine = [[0.0] * number for _ in range(number)]
    error = [[0.0] * number for _ in range(number)]
    for i in range(number):
        cosine[i][i] = 1.0
        for j in range(i):
            cosine[i][j] = cosine[j][i] = draw.uniform(-0.6, 0.9)
            error[i][j] = error[j][i] = draw.uniform(0.01, 0.2)
    datasets = tuple(
        SplitDataset(
            name=first_name if first_name and i == 0 else f"task_{i:03d}",
            group=(i * 7) % groups,
            num_examples=draw.randint(100, 5_000),
            num_target_tokens=draw.randint(1_000, 200_000),
            num_sketched_examples=draw.randint(32, 200),
            mean_loss=draw.uniform(0.5, 6),
            gradient_norm=draw.uniform(5, 50),
            signal_fraction=draw.random(),
        )
        for i in range(number)
    )
    negative = sum(cosine[i][j] < 0 for i in range(number) for j in range(i)) / (number * (number - 1) / 2)
    return SplitManifest(
        groups=groups,
        datasets=datasets,
        similarity=tuple(map(tuple, cosine)),
        similarity_errors=tuple(map(tuple, error)),
        negative_pair_fraction=negative,
        explained_variance=tuple(0.4 / 2**a for a in range(axes)),
        scores=tuple(tuple(draw.gauss(0, 1) for _ in range(axes)) for _ in range(number)),
        cuts=tuple((a, draw.gauss(0, 0.3)) for a in range(axes) for _ in range(2**a)),
        eta_squared=0.388,
        eta_squared_null_mean=0.038,
        eta_squared_null_std=0.011,
        random_groups=tuple((i * 3 + 1) % groups for i in range(number)),
        base_fingerprint="b" * 32,
        mixture_fingerprint="c" * 32,
    )


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
            datasets={row.name: DatasetResult(draw.uniform(0, 3), draw.random(), 100, 24) for row in split.datasets},
        )

    return EvaluateManifest(
        arms={"base": result(False), "joint": result(True), arm: result(True), "random": result(True)},
        branches={f"{arm}-{k}": result(True) for k in range(split.groups)},
        merging_gain={
            name: MergingGain(draw.random(), draw.uniform(2, 4), draw.uniform(1, 2), (1 / split.groups,) * split.groups)
            for name in (arm, "random")
        },
    )


class Page(HTMLParser):
    """Tags with attributes, the text outside scripts and styles, table rows, and the scripts by id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.rows, self.scripts = "", [], {}  # type: ignore[var-annotated]
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

    def json(self, name: str) -> dict:  # type: ignore[type-arg]
        return json.loads(self.scripts[f"{name}-data"])


def write(path: Path, split: SplitManifest, evaluation: EvaluateManifest | None = None, **more) -> str:  # type: ignore[no-untyped-def]
    write_report(split, evaluation, path, **{"title": "a run", "notes": ["seed 17"], **more})
    return path.read_text(encoding="utf-8")


CASES = pytest.mark.parametrize(
    ("number", "axes", "evaluated"),
    [(6, 1, True), (6, 2, False), (136, 3, True), (136, 2, False), (2, 1, True), (8, 3, True)],
    ids=["6-1axis", "6-2axes-split-only", "136-3axes", "136-2axes-split-only", "2-1axis", "one-dataset-each"],
)
