"""Paths, links and headings that README.md, CONTRIBUTING.md and docs/ name exist."""

import re

import pytest
from support.doc_pages import PAGES, ROOT, anchors_of, inline_code, links_of, name_of

from merit_fast.data.formats import row_formats_markdown

FOLDERS = ("merit_fast", "kernels", "csrc", "bench", "tests", "docs", "examples", ".ci", ".github")


def paths_in(text):
    """Paths of the repository in `...`; a part in capitals, such as NAME, stands for any name."""
    for word in re.findall(r"[\w./*-]+", text):
        if word.split("/")[0] in FOLDERS and "/" in word or re.fullmatch(r"[A-Z]+\.md", word):
            yield re.sub(r"(?<=/)[A-Z]+(?=/|$)", "*", word.rstrip("."))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_paths_exist(page):
    absent = {
        path
        for text in inline_code(page)
        if "<" not in text
        for path in paths_in(text)
        if not any(ROOT.glob(path.rstrip("/")))
    }
    assert not absent


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings(page):
    for link in links_of(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors_of(target), link


def test_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 100 and len(text.split()) <= 1300


def test_the_quick_start_lists_every_row_format():
    assert row_formats_markdown() in (ROOT / "docs" / "quickstart.md").read_text()
