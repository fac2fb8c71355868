"""Links of README.md, CONTRIBUTING.md and docs/ lead somewhere; tables list what the code has.

Paths in text: tests/layout/test_paths.py.
"""

import re

import pytest
from support.docs.pages import PAGES, ROOT, anchors_of, inline_code, links_of, name_of

from merit_fast.data.rows.formats import common_columns_markdown, row_formats_markdown
from merit_fast.merge.read.quantised.formats import formats_markdown


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


def test_the_page_on_rows_lists_every_format_and_column():
    text = (ROOT / "docs" / "data" / "rows.md").read_text()
    assert row_formats_markdown() in text and common_columns_markdown() in text


def test_the_page_on_quantised_checkpoints_lists_every_format():
    assert formats_markdown() in (ROOT / "docs" / "checkpoints" / "formats.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_examples_exist(page):
    for text in inline_code(page):
        for path in re.findall(r"examples/[\w.]+", text):
            assert (ROOT / path).is_file(), path
