"""report/: the page's embedded numbers, escaping, no network, equal bytes."""

import html
import pickle
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from plotly.offline import get_plotlyjs
from reports import CASES, EVIL, Page, make_evaluation, make_split, write

from merit_fast.errors import InputError
from merit_fast.manifest import (
    SplitManifest,
    read_manifest,
    write_manifest,
)
from merit_fast.report.figures import THEMES


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


def test_manifest_written_and_read_gives_the_page(tmp_path):
    split = make_split(6, 1)
    write_manifest(split, tmp_path / "split.json")
    read = read_manifest(SplitManifest, tmp_path / "split.json")
    assert write(tmp_path / "a.html", split) == write(tmp_path / "b.html", read)
