"""The report's page: escaping, no network, equal bytes, errors."""

import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
from plotly.offline import get_plotlyjs
from support.report.manifests import (
    CASES,
    EVIL,
    Page,
    make_audit,
    make_evaluation,
    make_split,
    write,
)

from merit_fast.errors import InputError
from merit_fast.manifests.io import read_manifest, write_manifest
from merit_fast.manifests.schemas import SplitManifest

FIGURES = ("conflicts", "axes", "tree", "balance", "datasets")


def test_equal_input_equal_bytes_in_another_process(tmp_path):
    cases = [
        (split, make_evaluation(split) if evaluated else None) for split, evaluated in CASES.args[1]
    ]
    (tmp_path / "input").write_bytes(pickle.dumps(cases))
    code = """
import pickle, sys
from pathlib import Path
from merit_fast.report import write_report
folder = Path(sys.argv[1])
for i, (split, evaluation) in enumerate(pickle.loads((folder / "input").read_bytes())):
    write_report(split, evaluation, folder / f"{i}.html", title="a run", notes=["seed 17"])
"""
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], check=True, env={"PYTHONHASHSEED": "7"}
    )
    for i, (split, evaluation) in enumerate(cases):
        assert (tmp_path / f"{i}.html").read_text(encoding="utf-8") == write(
            tmp_path / "here.html", split, evaluation
        )
    assert not list(tmp_path.glob("*.tmp"))
    assert write(tmp_path / "other.html", replace(split, note="not balanced"), evaluation) != write(
        tmp_path / "here.html", split, evaluation
    )


def test_page_loads_nothing(tmp_path):
    split = make_split(6, 4, unresolved=1)
    text = write(tmp_path / "r.html", split, make_evaluation(split), audit=make_audit())
    assert text.count(get_plotlyjs()) == 1
    ours = text.replace(get_plotlyjs(), "")
    assert len(ours) < 100_000
    for load in ("http:", "https:", "src=", "@import", "url(", "src ="):
        assert load not in ours, load
    page = Page(text)
    assert all(a["href"].startswith("#") for _, a in page.tags if "href" in a)
    assert not {"link", "iframe", "img", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    assert (
        'showSendToCloud: false, plotlyServerURL: ""' in ours
    )  # else the tool bar offers to send the data away
    (policy,) = [
        a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy.startswith("default-src 'none';") and "http" not in policy


@pytest.mark.parametrize(
    "name", [EVIL, "a</script><b>&amp;'\"", "{{ 7 * 7 }}", "%{z} <!--", "naïve 数据 \u2028"]
)
def test_names_are_data(tmp_path, name):
    split = make_split(6, 4, first_name=name)
    evaluation = make_evaluation(split, arm=name)
    plain = Page(
        write(
            tmp_path / "plain.html",
            make_split(6, 4),
            make_evaluation(make_split(6, 4), arm="other"),
        )
    )
    text = write(tmp_path / "evil.html", split, evaluation, title=name, notes=[name])
    page = Page(text)
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]  # no name became markup
    assert page.text.count(name) >= 6  # and all are readable: title, heading, note, tables, groups
    assert page.json("report")["datasets"]["rows"][0][0] == name
    for block in (*FIGURES, "separations", "themes", "report"):
        assert not set("<>\u2028") & set(page.scripts[f"{block}-data"])


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"scores": ((0.0,),) * 6}, "scores"),
        ({"similarity": ((1.0,) * 5,) * 6}, "similarity"),
        ({"similarity_errors": ()}, "similarity_errors"),
        ({"controls": ((0,),)}, "controls"),
        ({"score_errors": ((0.0,) * 3,) * 5}, "score_errors"),
        ({"groups": 2}, "group"),
        (
            {"explained_variance": (1.0,), "scores": ((0.0,),) * 6, "score_errors": ((0.0,),) * 6},
            "explained_variance",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_lengths_are_named(tmp_path, change, key):
    with pytest.raises(
        InputError, match=rf"split\.json: .*{key}.*: must be|split\.json: .*{key} must|{key}: must"
    ):
        write(tmp_path / "r.html", replace(make_split(6, 4), **change))
    assert not list(tmp_path.iterdir())


def test_unwritable_path_and_old_page_kept(tmp_path, monkeypatch):
    split = make_split(6, 4)
    with pytest.raises(InputError, match="cannot be written"):
        write(tmp_path / "absent" / "r.html", split)
    file = tmp_path / "r.html"
    first = write(file, split)
    assert {path.name for path in tmp_path.iterdir()} == {
        "r.html",
        "report.json",
        "datasets.csv",
        "pairs.csv",
    }

    def crash(*_: object) -> None:
        raise RuntimeError("crash before the rename")

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(RuntimeError):
        write(file, split, title="another")
    assert file.read_text(encoding="utf-8") == first


def test_manifest_written_and_read_gives_the_page(tmp_path):
    split = make_split(6, 2, unresolved=2)
    write_manifest(split, tmp_path / "split.json")
    read = read_manifest(SplitManifest, tmp_path / "split.json")
    assert write(tmp_path / "a.html", split) == write(tmp_path / "b.html", read)
