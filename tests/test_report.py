"""report/: the tables against the manifests, the page's embedded numbers, escaping, no network, equal bytes."""

import html
import json
import math
import pickle
import random
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from plotly.offline import get_plotlyjs

from merit_fast.errors import InputError
from merit_fast.manifest import (
    ArmResult,
    DatasetResult,
    EvaluateManifest,
    MergingGain,
    SplitDataset,
    SplitManifest,
    read_manifest,
    write_manifest,
)
from merit_fast.report import gain_rows, results_rows, verdict, write_report
from merit_fast.report.figures import THEMES
from merit_fast.report.tables import dataset_result_rows, group_rows, percent, split_rows

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


@CASES
def test_every_number_of_split_is_in_the_hover_data(tmp_path, number, axes, evaluated):
    split = make_split(number, axes)
    page = Page(write(tmp_path / "r.html", split, make_evaluation(split) if evaluated else None))
    places = {row.name: i for i, row in enumerate(split.datasets)}

    (heat,) = page.json("conflicts")["data"]
    seen = set()
    groups = []
    for cells, hovers in zip(heat["z"], heat["customdata"], strict=True):
        groups.append(hovers[0][3])
        for cosine, (one, other, error, group, other_group) in zip(cells, hovers, strict=True):
            i, j = places[one], places[other]
            assert (cosine, error) == (split.similarity[i][j], split.similarity_errors[i][j])
            assert (group, other_group) == (split.datasets[i].group, split.datasets[j].group)
            seen.add((i, j))
    assert len(seen) == number**2
    assert groups == sorted(groups)

    points = [
        (x, y, hover)
        for trace in page.json("axes")["data"]
        for x, y, hover in zip(trace["x"], trace["y"], trace["customdata"], strict=True)
    ]
    assert len(points) == number
    for x, y, (name, group, random_group, *figures) in points:
        i = places.pop(name)
        row = split.datasets[i]
        assert (group, random_group) == (row.group, split.random_groups[i])
        assert figures[:3] == [row.num_examples, row.num_target_tokens, row.num_sketched_examples]
        assert figures[3:6] == [row.mean_loss, row.gradient_norm, row.signal_fraction]
        assert figures[6:] == list(split.scores[i])
        assert (x, y) == (split.scores[i][0], split.scores[i][1] if axes > 1 else row.group)
    assert not places


@CASES
def test_equal_input_equal_bytes_in_another_process(tmp_path, number, axes, evaluated):
    split = make_split(number, axes)
    evaluation = make_evaluation(split) if evaluated else None
    (tmp_path / "input").write_bytes(pickle.dumps((split, evaluation)))
    first = write(tmp_path / "first.html", split, evaluation)
    code = """
import pickle, sys
from pathlib import Path
from merit_fast.report import write_report
folder = Path(sys.argv[1])
split, evaluation = pickle.loads((folder / "input").read_bytes())
write_report(split, evaluation, folder / "second.html", title="a run", notes=["seed 17"])
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env={"PYTHONHASHSEED": "7"})
    assert (tmp_path / "second.html").read_text(encoding="utf-8") == first
    assert not list(tmp_path.glob("*.tmp"))
    assert write(tmp_path / "third.html", replace(split, eta_squared=0.5), evaluation) != first


def test_page_loads_nothing(tmp_path):
    split = make_split(6, 2)
    text = write(tmp_path / "r.html", split, make_evaluation(split))
    assert text.count(get_plotlyjs()) == 1
    own = text.replace(get_plotlyjs(), "")
    assert len(own) < 100_000
    for load in ("http:", "https:", "src=", "href=", "@import", "url(", "//"):
        assert load not in own, load
    page = Page(text)
    assert not {"link", "iframe", "img", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    assert 'showSendToCloud: false, plotlyServerURL: ""' in own  # else the tool bar offers to send the data away
    (policy,) = [a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';") and "http" not in policy


@pytest.mark.parametrize("name", [EVIL, "a</script><b>&amp;'\"", "{{ 7 * 7 }}", "%{z} <!--", "naïve 数据 \u2028"])
def test_names_are_data(tmp_path, name):
    split = make_split(6, 2, first_name=name)
    evaluation = make_evaluation(split, arm=name)
    plain = Page(write(tmp_path / "plain.html", make_split(6, 2), make_evaluation(make_split(6, 2))))
    text = write(tmp_path / "evil.html", split, evaluation, title=name, notes=[name])
    page = Page(text)
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]  # no name became markup
    assert page.text.count(name) >= 6  # and all are readable: title, heading, note, tables, groups
    shown = [hover[0] for trace in page.json("axes")["data"] for hover in trace["customdata"]]
    assert name in [html.unescape(label) for label in shown]
    assert not any("<" in label for label in shown)  # plotly would read tags in labels
    for block in ("conflicts-data", "axes-data", "themes-data"):
        assert not set("<>\u2028") & set(page.scripts[block])


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


def test_cuts_bound_the_halves_they_cut(tmp_path):
    split = replace(make_split(8, 2), cuts=((0, 0.25), (1, -0.5), (1, 0.75)))
    layout = Page(write(tmp_path / "r.html", split)).json("axes")["layout"]
    low, high = layout["xaxis"]["range"]
    lines = [{key: line[key] for key in ("x0", "x1", "y0", "y1")} for line in layout["shapes"]]
    bottom, top = layout["yaxis"]["range"]
    assert lines == [
        {"x0": 0.25, "x1": 0.25, "y0": bottom, "y1": top},
        {"x0": low, "x1": 0.25, "y0": -0.5, "y1": -0.5},
        {"x0": 0.25, "x1": high, "y0": 0.75, "y1": 0.75},
    ]


def test_conflict_map_scale_and_boundaries(tmp_path):
    split = make_split(136, 3)
    layout = Page(write(tmp_path / "r.html", split)).json("conflicts")["layout"]
    assert (layout["coloraxis"]["cmin"], layout["coloraxis"]["cmax"]) == (-1, 1)
    counts = [sum(row.group == group for row in split.datasets) for group in range(8)]
    borders = [sum(counts[: group + 1]) - 0.5 for group in range(7)]
    vertical = [line["x0"] for line in layout["shapes"] if line["x0"] == line["x1"]]
    horizontal = [line["y0"] for line in layout["shapes"] if line["y0"] == line["y1"]]
    assert vertical == horizontal == borders


def test_themes_cover_the_same_keys():
    assert THEMES["light"]["layout"].keys() == THEMES["dark"]["layout"].keys()
    for theme in THEMES.values():
        scale = theme["layout"]["coloraxis"]["colorscale"]
        assert [place for place, _ in scale] == [0, 0.25, 0.5, 0.75, 1]
        assert all(re.fullmatch("#[0-9a-f]{6}", color) for _, color in scale)
        assert theme["layout"]["paper_bgcolor"] == "rgba(0,0,0,0)"


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"scores": ((0.0,),) * 6}, "scores"),
        ({"similarity": ((1.0,) * 5,) * 6}, "similarity"),
        ({"similarity_errors": ()}, "similarity_errors"),
        ({"random_groups": (0,)}, "random_groups"),
        ({"groups": 2}, "group"),
        ({"explained_variance": (), "scores": ((),) * 6}, "explained_variance"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_lengths_are_named(tmp_path, change, key):
    with pytest.raises(InputError, match=rf"split\.json: .*{key}.*: must be|split\.json: .*{key} must|{key}: must"):
        write(tmp_path / "r.html", replace(make_split(6, 2), **change))
    assert not list(tmp_path.iterdir())


def test_unwritable_path_and_old_page_kept(tmp_path, monkeypatch):
    split = make_split(6, 2)
    with pytest.raises(InputError, match="cannot be written"):
        write(tmp_path / "absent" / "r.html", split)
    file = tmp_path / "r.html"
    first = write(file, split)

    def crash(*_: object) -> None:
        raise RuntimeError("crash before the rename")

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(RuntimeError):
        write(file, split, title="another")
    assert file.read_text(encoding="utf-8") == first


def test_tables_need_no_plotly():
    code = "import sys, merit_fast.report as r, merit_fast.report.tables; r.results_rows; "
    code += "assert not {'plotly', 'jinja2', 'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_manifest_written_and_read_gives_the_page(tmp_path):
    split = make_split(6, 1)
    write_manifest(split, tmp_path / "split.json")
    read = read_manifest(SplitManifest, tmp_path / "split.json")
    assert write(tmp_path / "a.html", split) == write(tmp_path / "b.html", read)


def test_split_lines_name_every_dataset_once_and_end_with_the_verdict():
    from merit_fast.report import split_lines, verdict

    split = make_split(6, 2)
    lines = split_lines(split)
    assert lines[-3:] == verdict(split) and len(lines) == split.groups + 3
    named = [name for line in lines[:-3] for name in line.split(": ", 2)[2].split(", ")]
    assert sorted(named) == sorted(row.name for row in split.datasets)
