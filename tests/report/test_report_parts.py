"""The report on the parts of a model: a heat map, a row and a line each, and their numbers."""

from dataclasses import replace

import pytest
from support.report.manifests import Page, make_split, write
from support.report.parts import with_parts

from merit_fast.errors import InputError
from merit_fast.manifests.io import read_manifest, write_manifest
from merit_fast.manifests.schemas import SplitManifest
from merit_fast.report import split_lines

NAMES = ("attention", "mlp", "__proto__")
SPLIT = with_parts(make_split(6, 2), *NAMES)


def test_split_json_gives_the_parts_back(tmp_path):
    write_manifest(SPLIT, tmp_path / "split.json")
    assert read_manifest(SplitManifest, tmp_path / "split.json") == SPLIT


def test_every_part_has_a_heat_map_with_its_own_numbers(tmp_path):
    page = Page(write(tmp_path / "r.html", SPLIT))
    plots = [attributes["data-spec"] for _, attributes in page.tags if "data-spec" in attributes]
    assert plots[:4] == ["conflicts-data", *(f"part-{name}-data" for name in NAMES)]
    whole = page.json("conflicts")["layout"]["meta"]
    parts = page.json("report")["parts"]
    assert list(parts) == list(NAMES)
    for name, part in SPLIT.parts.items():
        assert page.json(f"part-{name}")["layout"]["meta"] == {**whole, "part": name}
        for key, square in (("values", part.similarity), ("errors", part.similarity_errors)):
            expected = [[value for value in row[: i + 1]] for i, row in enumerate(square)]
            assert parts[name][key] == [
                [None if v is None else pytest.approx(v, rel=1e-5) for v in row] for row in expected
            ]
        assert parts[name]["norm_shares"] == list(part.norm_shares)


def test_every_part_has_a_row_and_a_line(tmp_path):
    page = Page(write(tmp_path / "r.html", SPLIT))
    lines = split_lines(SPLIT)
    # An odd seed leaves one of the 6 datasets unresolved.
    for seed, (name, pairs) in enumerate(zip(NAMES, (10, 15, 10), strict=True), 1):
        share = f"{12.5 * seed:.1f} %"
        (row,) = [row for row in page.rows if row and row[0] == name]
        assert row[1:4] == [share, f"{2 * seed} of {pairs}", str(seed)]
        (line,) = [line for line in lines if line.startswith(f"{name}: ")]
        assert line == (
            f"{name}: {2 * seed} of {pairs} pairs surely conflict, {seed} of them across groups; "
            f"{share} of the squared gradient"
        )


def test_a_run_without_parts_has_no_word_about_them(tmp_path):
    page = Page(write(tmp_path / "r.html", make_split(6, 2)))
    assert "Parts of the model" not in page.text and "parts" not in page.json("report")
    assert len(split_lines(SPLIT)) == len(split_lines(make_split(6, 2))) + len(NAMES)


def test_a_part_of_the_wrong_size_is_named(tmp_path):
    wrong = replace(SPLIT.parts["mlp"], similarity=SPLIT.parts["mlp"].similarity[:5])
    split = replace(SPLIT, parts={**SPLIT.parts, "mlp": wrong})
    with pytest.raises(InputError, match=r"parts.mlp.similarity: must be \[6, 6\], got 5 rows"):
        write(tmp_path / "r.html", split)
